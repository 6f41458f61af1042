"""Where the arrays of parameters are put; and what dtype="auto" and layout="auto" stand for there."""

from __future__ import annotations

import typing
from collections.abc import Callable
from typing import Literal, TypeAlias

import jax
import numpy as np
from jax.sharding import Sharding

from phi3_jax.kernels import why_unavailable

Layout = Literal["rows", "packed", "layers", "columns"]
TABLE = "embed_tokens/weight"  # it stays by rows in every layout but "packed", because rows of it are looked up
Place: TypeAlias = jax.Device | Sharding
# One place for all arrays, or a function of a parameter's path and the shape of its array; None: JAX's default device.
Device: TypeAlias = Place | Callable[[str, tuple[int, ...]], Place] | None
Put = Callable[[np.ndarray], jax.Array]


def put_function(device: Device, path: str) -> Put:
    """A function that puts an array of the parameter at `path` where it belongs, straight from the host's memory."""
    if device is None:
        return jax.device_put

    def put(array: np.ndarray) -> jax.Array:
        place = device(path, array.shape) if callable(device) else device
        try:
            return jax.device_put(array, place)
        except ValueError as error:
            raise ValueError(f"{path} {list(array.shape)} cannot be put to {place}: {error}") from None

    return put


def platform(device: Device = None) -> str:
    """The platform of a place, such as "cpu" or "gpu"; that of the default device for a function."""
    if device is None or callable(device):
        return jax.default_backend()
    return _devices(device)[0].platform


def auto_dtype(device: Device = None) -> str:
    """The dtype that floats get: float32 on the CPU, bfloat16 elsewhere."""
    return "float32" if platform(device) == "cpu" else "bfloat16"


def compute_dtype(floats: str, device: Device = None) -> str:
    """The dtype that a model with a table of integers computes in, if its floats are of the dtype `floats`."""
    return "float32" if platform(device) == "cpu" else floats


def fastest_layout(device: Device = None) -> Layout:
    """ "packed" for a single CPU with kernels that read it; "layers" for a GPU; "columns" for a TPU; else "rows"."""
    kind = platform(device)
    if callable(device) or (device is not None and len(_devices(device)) > 1):
        return "rows"
    if kind == "gpu":
        return "layers"
    if kind == "tpu":
        return "columns"
    # Where another platform computes, the compiler of the CPU kernels is not even looked for.
    is_cpu = kind == jax.default_backend() == "cpu"
    return "packed" if is_cpu and why_unavailable() is None else "rows"


def known_layout(layout: str, device: Device = None) -> Layout:
    """The layout of this name; "auto" is the fastest one. Raises ValueError if there is none."""
    if layout not in ("auto", *typing.get_args(Layout)):
        raise ValueError(f"layout={layout!r} is not 'auto', 'rows', 'packed', 'layers' or 'columns'")
    return fastest_layout(device) if layout == "auto" else typing.cast(Layout, layout)


def _devices(place: Place) -> list[jax.Device]:
    if not isinstance(place, jax.Device | Sharding):
        raise ValueError(
            f"device={place!r} is no jax.Device, no Sharding, and no function that gives one of these; take "
            "jax.devices()[0], for example"
        )
    return list(place.device_set) if isinstance(place, Sharding) else [place]

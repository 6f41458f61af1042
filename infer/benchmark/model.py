"""The model that phi3-benchmark runs: a checkpoint, or random weights of a published size."""

from __future__ import annotations

import dataclasses
import zlib

import ml_dtypes
import numpy as np

import phi3_jax
from phi3_jax.checkpoint import Layout, auto_dtype, fastest_layout
from phi3_jax.checkpoint.assemble import assemble
from phi3_jax.checkpoint.gguf.blocks import IntegerForm, IntegerRows
from phi3_jax.checkpoint.tensor_source import TensorSource
from phi3_jax.config import Phi3Config
from phi3_jax.kernels.linear.quantized import ZERO
from phi3_jax.model import parameter_shapes, tensor_names
from phi3_jax.quantization import Format, formats

_NOISE_BYTES = (1 << 20) + 7  # odd, so that a row of a matrix never repeats the one above
_GROUP = 32
# The integers -8 ... 7 times this have a standard deviation of 0.018, which is about that of newly initialised weights;
# bfloat16 holds the products exactly, because this is a power of two.
_SCALE = 2.0**-8


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """Which weights, in which form.

    Attributes:
      checkpoint: what `phi3_jax.load` takes, or with `is_random` the name of a preset.
      dtype: "auto", or a name that `phi3_jax.load` knows.
      quantize: a policy that `phi3_jax.load` knows, or None.
      adapter: a folder or hub id, or None.
      window: False leaves the model's sliding window out.
    """

    checkpoint: str
    is_random: bool = False
    dtype: str = "auto"
    quantize: str | None = None
    adapter: str | None = None
    window: bool = True

    @property
    def name(self) -> str:
        """A name for files and titles."""
        return self.checkpoint.rstrip("/").rsplit("/", 1)[-1].removesuffix(".gguf")

    def resolved_dtype(self) -> str:
        """The dtype's name with "auto" looked up, for a checkpoint of bfloat16."""
        return auto_dtype() if self.dtype == "auto" else self.dtype


def load_model(spec: ModelSpec, layout: Layout | None = None) -> phi3_jax.Checkpoint:
    """Loads or makes the weights; layout is the fastest one by default. Raises what `phi3_jax.load` raises."""
    layout = layout or fastest_layout()
    if spec.is_random:
        checkpoint = random_checkpoint(phi3_jax.PRESETS[spec.checkpoint], spec.resolved_dtype(), spec.quantize, layout)
    else:
        checkpoint = phi3_jax.load(
            spec.checkpoint, spec.dtype, quantize=spec.quantize, layout=layout, adapter=spec.adapter
        )
    if spec.window:
        return checkpoint
    return dataclasses.replace(checkpoint, config=dataclasses.replace(checkpoint.config, sliding_window=None))


def random_checkpoint(
    config: Phi3Config, dtype: str, quantize: str | None = None, layout: Layout = "rows"
) -> phi3_jax.Checkpoint:
    """Random weights as if they were read from a file, one tensor at a time; always the same ones.

    They lie on a grid that bfloat16 and integers of 8 and 4 bits hold exactly: all forms are the same model, and
    quantising takes no search. Raises what `assemble` raises.
    """
    params = assemble(_random_sources(config, quantize), config, dtype, "random weights", None, quantize, layout)
    return phi3_jax.Checkpoint(config, params, None, phi3_jax.GenerationSettings())


def _random_sources(config: Phi3Config, quantize: str | None) -> dict[str, TensorSource]:
    noise = np.random.default_rng(0).integers(0, 16, _NOISE_BYTES, np.uint8)
    shapes, sources = parameter_shapes(config), {}
    forms: dict[str, Format | None] = formats(quantize, shapes) if quantize is not None else dict.fromkeys(shapes)
    for path, shape in shapes.items():
        is_stack = path.startswith("layers/")
        for name in tensor_names(path, config.num_hidden_layers):
            sources[name] = _random_source(name, shape[1:] if is_stack else shape, forms[path], noise)
    return sources


def _random_source(name: str, shape: tuple[int, ...], form: Format | None, noise: np.ndarray) -> TensorSource:
    if len(shape) == 1:  # a norm
        return TensorSource(shape, "bfloat16", lambda: np.ones(shape, ml_dtypes.bfloat16))

    def nibbles() -> np.ndarray:
        """Integers 0 ... 15: the noise, repeated, from an offset that depends on the name."""
        return np.resize(np.roll(noise, -(zlib.crc32(name.encode()) % len(noise))), shape)

    def floats() -> np.ndarray:
        table = ((np.arange(16) - ZERO[4]) * _SCALE).astype(ml_dtypes.bfloat16).view(np.uint16)
        return table[nibbles()].view(ml_dtypes.bfloat16)

    def integers(bits: int) -> IntegerRows:
        scales = np.full((shape[0], shape[1] // _GROUP), _SCALE, np.float16)
        q = nibbles()
        if bits == 8:
            return IntegerRows(q + np.uint8(ZERO[8] - ZERO[4]), scales, None, 8)
        return IntegerRows(q[:, 0::2] | q[:, 1::2] << 4, scales, None, 4)

    if form is None or form.group != _GROUP or not form.symmetric or shape[1] % _GROUP:
        return TensorSource(shape, "bfloat16", floats)  # which are rounded like any others, if necessary
    return TensorSource(shape, "bfloat16", floats, IntegerForm(form.bits, False), lambda: integers(form.bits))

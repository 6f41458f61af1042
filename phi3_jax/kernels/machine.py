"""The limits of the machine: measured on the CPU, from data sheets for accelerators."""

from __future__ import annotations

import ctypes
import dataclasses
import os
import re
from typing import Literal, Self

import jax

from phi3_jax.kernels.native.build import library, why_unavailable

Rate = Literal["float32", "bfloat16", "int8"]  # kinds of arithmetic, in the order of native/machine.cpp
_RATES: tuple[Rate, ...] = ("float32", "bfloat16", "int8")
_BYTES = 1 << 30  # read repeatedly; far more than processors' caches hold (some hundred megabytes in servers)

# From the makers' data sheets, by a pattern for jax's `device_kind`: operations per second of bfloat16 matrix products
# (sums in float32, no sparsity), and bytes per second of the memory. A part of a card (MIG) has another name.
_PUBLISHED = {
    r"NVIDIA A100-SXM4?-80GB": (312e12, 2039e9),
    r"NVIDIA A100 80GB PCIe": (312e12, 1935e9),
    r"NVIDIA A100-(SXM4?|PCIE)-40GB": (312e12, 1555e9),
    r"NVIDIA L4": (121e12, 300e9),
    r"NVIDIA L40S": (362e12, 864e9),
    r"NVIDIA GeForce RTX 4090": (165e12, 1008e9),
    r"NVIDIA H100 PCIe": (756e12, 2000e9),
    r"NVIDIA H100 NVL": (835e12, 3900e9),
    r"NVIDIA H100 80GB HBM3": (989e12, 3350e9),
    r"NVIDIA H200": (989e12, 4800e9),
    r"NVIDIA B200": (2250e12, 8000e9),
    r"TPU v4": (275e12, 1200e9),
    r"TPU v5 lite|TPU v5e": (197e12, 819e9),
    r"TPU v5|TPU v5p": (459e12, 2765e9),
    r"TPU v6 lite|TPU v6e": (918e12, 1638e9),
}


class Machine:
    """Measures this machine with the functions of native/machine.cpp, on all processors that this process may use."""

    def __init__(self, library: ctypes.CDLL, seconds: float = 0.3) -> None:
        """Measures the rates, `seconds` each; the bandwidth is measured anew by each call of `bandwidth`."""
        self.threads, self._seconds = threads(), seconds
        self._read, peak = library.phi3_read_bandwidth, library.phi3_peak_rate
        self._read.restype = peak.restype = ctypes.c_double
        self._read.argtypes = [ctypes.c_int64, ctypes.c_int, ctypes.c_double]
        peak.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_double]
        self.rates: dict[str, float] = {name: peak(kind, self.threads, seconds) for kind, name in enumerate(_RATES)}

    def bandwidth(self) -> float:
        """Bytes per second that can be read from memory now."""
        return self._read(_BYTES, self.threads, self._seconds)


@dataclasses.dataclass(frozen=True)
class Published:
    """An accelerator's limits as its maker gives them; used like a `Machine`.

    Attributes:
      rates: the figure for bfloat16, whatever the type: integers are multiplied as bfloat16 there.
      bytes_per_second: of its memory.
    """

    rates: dict[str, float]
    bytes_per_second: float

    @classmethod
    def of(cls, device_kind: str) -> Self | None:
        """The limits of a device, by jax's name of its kind; None if they are not known."""
        for pattern, (rate, bytes_per_second) in _PUBLISHED.items():
            if re.fullmatch(pattern, device_kind):
                return cls(dict.fromkeys(_RATES, rate), bytes_per_second)
        return None

    def bandwidth(self) -> float:
        """Bytes per second that can be read from its memory at best."""
        return self.bytes_per_second


def threads() -> int:
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def peak_rate(dtype: Rate) -> float | None:
    """Operations (products and sums) per second of all devices together in matrix products; None if it is not known.

    On the CPU it is measured, which takes half a second; it is 0 if the CPU has no instructions for the type. For an
    accelerator it is the maker's figure for bfloat16, whatever the type.
    """
    device = jax.devices()[0]
    if device.platform == "cpu":
        # Several CPU devices are one machine.
        return None if why_unavailable() else Machine(library(), seconds=0.15).rates[dtype]
    published = Published.of(device.device_kind)
    return None if published is None else published.rates[dtype] * jax.device_count()

"""The limits of the machine: measured on the CPU, from data sheets for accelerators."""

from __future__ import annotations

import ctypes
import os
from typing import Literal

import jax

from phi3_jax.kernels.native.build import library, why_unavailable

Rate = Literal["float32", "bfloat16", "int8"]  # kinds of arithmetic, in the order of native/machine.cpp
_RATES: tuple[Rate, ...] = ("float32", "bfloat16", "int8")
_BYTES = 1 << 30  # read repeatedly; far more than processors' caches hold (some hundred megabytes in servers)

# From the makers' data sheets: operations per second of bfloat16 matrix products, without sparsity. Keys are prefixes
# of jax's `device_kind`; the first that matches is used.
_PUBLISHED = {
    "NVIDIA A100": 312e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA L4": 121e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
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
    published = (rate for kind, rate in _PUBLISHED.items() if device.device_kind.startswith(kind))
    each = next(published, None)
    return None if each is None else each * jax.device_count()

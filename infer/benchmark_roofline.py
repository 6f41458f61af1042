"""What the machine can do, measured, and how long a model's work must take at least (the roofline).

S. Williams, A. Waterman, D. Patterson: Roofline, an insightful visual performance model (2009): work takes at least as
long as its bytes take to be read, and as its operations take to be computed.
"""

from __future__ import annotations

import ctypes
import dataclasses
import os
from typing import Literal

from phi3_jax.config import Phi3Config

Rate = Literal["float32", "bfloat16", "int8"]  # kinds of arithmetic, in the order of native/machine.cpp
_RATES: tuple[Rate, ...] = ("float32", "bfloat16", "int8")
_BYTES = 1 << 28  # read over and over; far beyond every cache but small beside a model


@dataclasses.dataclass(frozen=True)
class Work:
    """What one measurement asks of the machine at least.

    Attributes:
      bytes: read from memory.
      linear: operations (products and sums) of the matrix products.
      attention: operations of the scores and the weighted sums of values.
    """

    bytes: float
    linear: float
    attention: float


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


def prefill_work(config: Phi3Config, length: int, weight_bytes: float) -> Work:
    """Reading `length` tokens at once; the head is needed for the last one only."""
    layers, head = parameters(config)
    seen = sum(_visible(config, position) for position in range(length))
    return Work(weight_bytes, 2.0 * (length * layers + head), _attention_operations(config) * seen)


def decode_work(
    config: Phi3Config, context: int, batch: int, new_tokens: int, weight_bytes: float, cache_bytes: float
) -> Work:
    """`new_tokens` steps of `batch` rows, each of which has `context` tokens in its cache at first.

    Args:
      weight_bytes: what a step reads of the weights: all but an embedding that is not the head as well.
      cache_bytes: of one number in the cache.
    """
    layers, head = parameters(config)
    seen = batch * sum(_visible(config, context + step) for step in range(new_tokens))
    numbers = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return Work(
        new_tokens * weight_bytes + seen * numbers * cache_bytes,
        2.0 * batch * new_tokens * (layers + head),
        _attention_operations(config) * seen,
    )


def least_seconds(work: Work, bandwidth: float, rates: dict[str, float], kind: Rate) -> float:
    """How long the work takes at least, on a machine of this bandwidth and these rates.

    Attention is taken to run at the faster one of the two rates for floats, whatever a program makes of it.
    """
    linear = rates[kind] or rates["float32"]
    computing = work.linear / linear + work.attention / max(rates["float32"], rates["bfloat16"])
    return max(work.bytes / bandwidth, computing)


def parameters(config: Phi3Config) -> tuple[int, int]:
    """Numbers in the matrices of all layers, and in the output head."""
    c = config
    heads = (c.num_attention_heads + 2 * c.num_key_value_heads + c.num_attention_heads) * c.head_dim
    return c.num_hidden_layers * c.hidden_size * (heads + 3 * c.intermediate_size), c.vocab_size * c.hidden_size


def _visible(config: Phi3Config, position: int) -> int:
    """How many keys the token at a position sees."""
    return min(position + 1, config.sliding_window or position + 1)


def _attention_operations(config: Phi3Config) -> float:
    """Of one token and one key that it sees: a product and a sum, for the score and for the value."""
    return 4.0 * config.num_hidden_layers * config.num_attention_heads * config.head_dim

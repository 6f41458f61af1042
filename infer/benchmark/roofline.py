"""How long a model's work must take at least on this machine (the roofline).

S. Williams, A. Waterman, D. Patterson: Roofline, an insightful visual performance model (2009): work takes at least as
long as its bytes take to be read, and as its operations take to be computed.
"""

from __future__ import annotations

import dataclasses

from phi3_jax.config import Phi3Config
from phi3_jax.kernels.machine import Rate


@dataclasses.dataclass(frozen=True)
class Work:
    """The least work of one measurement.

    Attributes:
      bytes: read from memory.
      linear: operations (products and sums) of the matrix products.
      attention: operations of the scores and the weighted sums of values.
    """

    bytes: float
    linear: float
    attention: float


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

    Attention is assumed to run at the faster of the two rates for floats, whatever a program really uses.
    """
    linear = max(rates[kind], rates["float32"])  # a type without fast instructions is multiplied as float32
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

"""The input of a training step.

Axis letters: B rows, T tokens.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """Rows of tokens, each with one text or several; leaves may have one more axis in front, for accumulation.

    Attributes:
      tokens: int32 [B, T].
      weights: float32 [B, T]: the weight of the loss of predicting this token from those before; 0 for tokens that are
        not learned, for padding and for the first token of each text.
      positions: int32 [B, T], restarting at 0 with each text; -1 for padding.
      segments: int32 [B, T]: which text of the row it belongs to, ids in [0, T).
    """

    tokens: Any
    weights: Any
    positions: Any
    segments: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pair:
    """Preferences: the text in each row of `chosen` is better than the text in the same row of `rejected`."""

    chosen: Batch
    rejected: Batch

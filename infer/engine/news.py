"""What the host hears of a call of a compiled function, in one array, so that one transfer tells it.

Axis letters: B batch, M tokens of prompt and answer together, J the newest token and the guesses after it, V vocab.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

MOST = 32  # new tokens of a row that fit; if a call writes more, the host fetches all tokens
_FLAGS = 4  # numbers before the tokens


def no_news(rows: int) -> jax.Array:
    """News of nothing: int32 [B, 4 + MOST]."""
    return jnp.zeros((rows, _FLAGS + MOST), jnp.int32)


def news(
    tokens: jax.Array, before: jax.Array, after: jax.Array, done: jax.Array, failed: jax.Array, restart: jax.Array
) -> jax.Array:
    """What a call did: int32 [B, 4 + MOST], for `News.read`.

    Args:
      tokens: int32 [B, M], of which a row had `before` and has `after` (int32 [B]).
      done, failed: of the state, bool and int32 [B].
      restart: bool scalar, of `must_restart`.
    """
    places = jnp.minimum(before[:, None] + jnp.arange(MOST), tokens.shape[1] - 1)
    flags = [after - before, done, failed, jnp.broadcast_to(restart, done.shape)]
    return jnp.concatenate([jnp.stack(flags, axis=1), jnp.take_along_axis(tokens, places, axis=1)], axis=1)


@dataclasses.dataclass(frozen=True)
class News:
    """`news` on the host.

    Attributes:
      counts: how many new tokens each row has.
      done: bool [B].
      failed: int32 [B].
      restart: whether rows must be read again before more tokens can be written.
      tokens: int32 [B, MOST]: the first new tokens.
    """

    counts: list[int]
    done: np.ndarray
    failed: np.ndarray
    restart: bool
    tokens: np.ndarray

    @classmethod
    def read(cls, array: jax.Array, rows: int) -> News:
        """Fetches the news of the first `rows` rows; waits until they are there."""
        fetched = np.asarray(array)[:rows]
        restart = bool(fetched[:, 3].any())
        return cls(fetched[:, 0].tolist(), fetched[:, 1] > 0, fetched[:, 2], restart, fetched[:, _FLAGS:])


def has_watched(tokens: jax.Array, before: jax.Array, after: jax.Array, most: int, watched: jax.Array) -> jax.Array:
    """Whether a new token may complete a stop string: bool scalar.

    Args:
      tokens, before, after: as in `news`; a row has at most `most` new ones.
      watched: uint8 [V], of `sampling.watched_tokens`.
    """
    places = before[:, None] - 1 + jnp.arange(most + 1)  # of the new tokens, and the one before them
    marks = watched[jnp.take_along_axis(tokens, jnp.minimum(places, tokens.shape[1] - 1), axis=1)]
    new, previous = marks[:, 1:], marks[:, :-1]
    is_watched = (new & 1 > 0) | ((new & 2 > 0) & (previous & 4 > 0))
    return (is_watched & (places[:, 1:] < after[:, None])).any()

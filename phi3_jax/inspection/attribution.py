"""Which parts of the model speak for a token: direct logit attribution (used in arXiv:2211.00593, for instance).

The residual stream at the end is the sum of what the embedding, every head and every MLP put into it. Once the final
norm has been read as what it was in this run, a factor for each number of the stream, a token's logit is linear in
that sum: the logit is the sum of the parts' own.

Axis letters: L layer, B batch, P chosen positions, N query heads, H head dim, D model, F ffn, k chosen neurons.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from phi3_jax.config import Phi3Config
from phi3_jax.inspection.running import run
from phi3_jax.inspection.words import token_rows
from phi3_jax.kernels import has_per_layer
from phi3_jax.kernels.linear import linear
from phi3_jax.model import Params
from phi3_jax.model.points import Edit

_READS = ("embed", "attn.z", "mlp_out", "resid_post", "ln_final.out", "logits")


class Attribution(NamedTuple):
    """The parts of tokens' logits. embed + heads + mlps + rest, summed, are the logit.

    Attributes:
      ids: int32 [B, P], the tokens.
      logit: float32 [B, P], or the difference of two tokens' logits.
      embed: float32 [B, P], what the token's own embedding adds to the logit.
      heads: float32 [L, B, P, N], what each head adds.
      mlps: float32 [L, B, P], what each MLP adds.
      neurons: float32 [L, B, P, F], what each neuron of the MLPs adds, or None where they were not asked for.
      rest: float32 [B, P], what no part has added: edits of the residual stream, and rounding. In float32 it is below
        1e-3 without such edits; a bfloat16 stream is rounded after each of its 2 L sums.
    """

    ids: jax.Array
    logit: jax.Array
    embed: jax.Array
    heads: jax.Array
    mlps: jax.Array
    neurons: jax.Array | None
    rest: jax.Array


def logit_attribution(
    config: Phi3Config,
    params: Params,
    tokens: Any,
    target: Any = None,
    against: Any = None,
    *,
    positions: Any = (-1,),
    neurons: bool = False,
    edits: Sequence[Edit] = (),
    token_positions: Any = None,
) -> Attribution:
    """What each part adds to the logit of a next token.

    Args:
      params: of any kind: floats, integers, packed, with adapters attached.
      tokens: int [B, T].
      target: int, broadcastable to [B, P]: the next token; by default the one with the highest logit.
      against: like `target`: another token, whose logit is taken off: what speaks for the one rather than the other.
      positions: places along T whose next token is meant, int [P] or [B, P], negative ones from the end.
      neurons: whether to look into the MLPs, too.
      edits: changes of the run. Those of attn.result and of attn_out are counted in `rest`.
      token_positions: int32 [B, T], -1 for padding.

    Raises:
      ValueError: what `run` raises.
    """
    reads = (*_READS, "mlp.post") if neurons else _READS
    options: Any = {"positions": positions, "edits": edits, "token_positions": token_positions}
    seen = run(config, params, tokens, reads, **options)
    target, against = (None if each is None else jnp.asarray(each, jnp.int32) for each in (target, against))
    return attribution_of(config, params, seen, target, against)


def biggest(values: jax.Array, top: int = 10) -> list[tuple[tuple[int, ...], float]]:
    """The places of the largest values, in size, and the values: [((layer, neuron), value), ...], largest first.

    Args:
      values: float [...], of heads or neurons at one place of one row: `neurons[:, 0, 0]` [L, F].
    """
    found = np.asarray(values, np.float32)
    order = np.argsort(-np.abs(found), axis=None, kind="stable")[:top]
    places = zip(*np.unravel_index(order, found.shape), strict=True)
    return [(tuple(int(each) for each in place), float(found[place])) for place in places]


@functools.partial(jax.jit, static_argnames="config")
def attribution_of(
    config: Phi3Config, params: Params, seen: dict[str, jax.Array], target: jax.Array | None, against: jax.Array | None
) -> Attribution:
    """`logit_attribution` of what one has read: embed, attn.z, mlp_out, resid_post, ln_final.out, logits, at places P.

    These are as `run` returns them; `target` and `against` are int32, broadcastable to [B, P], or None.
    """
    wide = {name: value.astype(jnp.float32) for name, value in seen.items()}
    x, normed, logits = wide["resid_post"][-1], wide["ln_final.out"], wide["logits"]
    ids = logits.argmax(axis=-1).astype(jnp.int32) if target is None else jnp.broadcast_to(target, logits.shape[:2])
    row, logit = token_rows(params, ids, "output"), _of(logits, ids)
    if against is not None:
        other = jnp.broadcast_to(against, ids.shape)
        row, logit = row - token_rows(params, other, "output"), logit - _of(logits, other)
    direction = row * jnp.where(x == 0, 0.0, normed / jnp.where(x == 0, 1.0, x))  # [B, P, D]

    def of_layer(layer: Any) -> tuple[jax.Array, jax.Array | None]:
        own = params["layers"]
        z = wide["attn.z"][layer]  # [B, P, N, H]
        heads = (z * _before(own["self_attn"]["o_proj"]["weight"], layer, direction).reshape(z.shape)).sum(axis=-1)
        if "mlp.post" not in wide:
            return heads, None
        return heads, wide["mlp.post"][layer] * _before(own["mlp"]["down_proj"]["weight"], layer, direction)

    heads, neurons = _each_layer(config, params, of_layer)
    exact: Any = {"precision": jax.lax.Precision.HIGHEST}
    embed = jnp.einsum("BPD,BPD->BP", wide["embed"], direction, **exact)
    mlps = jnp.einsum("LBPD,BPD->LBP", wide["mlp_out"], direction, **exact)
    rest = logit - embed - heads.sum(axis=(0, 3)) - mlps.sum(axis=0)
    return Attribution(ids, logit, embed, heads, mlps, neurons, rest)


def _of(logits: jax.Array, ids: jax.Array) -> jax.Array:
    return jnp.take_along_axis(logits, ids[..., None], axis=-1)[..., 0]


def _before(weight: Any, layer: Any, direction: jax.Array) -> jax.Array:
    """direction @ weight: [B, P, out] -> [B, P, in]: how much each input of a product adds along the direction.

    The transpose of the product itself, so that it is right for weights of every kind.
    """
    product = functools.partial(linear, weight=weight, layer=layer, implementation="xla")
    inputs = jnp.zeros((*direction.shape[:-1], weight.shape[-1]), jnp.float32)
    return jax.vjp(product, inputs)[1](direction)[0]


def _each_layer(config: Phi3Config, params: Params, function: Callable[[Any], Any]) -> Any:
    """The results for all layers, stacked; one after another, as their weights become floats on the way."""
    numbers = np.arange(config.num_hidden_layers, dtype=np.int32)
    if has_per_layer(params):
        return jax.tree.map(lambda *each: jnp.stack(each), *[function(number) for number in numbers])
    return jax.lax.map(function, jnp.asarray(numbers))

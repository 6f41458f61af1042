"""From the trained weights and a batch to the sums that the loss is made of.

Axis letters: B rows, T tokens, D model.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from phi3_jax.adapters import Adapter, LoraConfig, attach
from phi3_jax.config import Phi3Config
from phi3_jax.kernels import LoraTensor, QuantizedTensor
from phi3_jax.kernels.attention import training
from phi3_jax.kernels.attention.arguments import KeysValues, Visibility
from phi3_jax.kernels.attention.masks import sequence_lengths
from phi3_jax.model import Params, Phi3

from .data import Batch, Pair
from .dpo import interleave, preference_sums
from .loss import RowSums, row_sums
from .settings import Settings, adapter_config, resolved


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Reference:
    """What stays frozen where preferences are compared with an adapter on the base.

    Attributes:
      base: the parameters below both adapters.
      adapter, lora: the reference's.
    """

    base: Params
    adapter: Adapter
    lora: LoraConfig = dataclasses.field(metadata={"static": True})


def batch_sums(
    settings: Settings,
    config: Phi3Config,
    trainable: Params,
    frozen: Params | Reference,
    batch: Batch | Pair,
    key: jax.Array | None = None,
) -> dict[str, jax.Array]:
    """The sums of a batch, float32 scalars: "loss", "weight" (what the loss is divided by), "correct" and "tokens".

    For texts all of them are over learned tokens; for preferences see `preference_sums`.

    Args:
      trainable, frozen: see `step.start`.
      key: of the random numbers of training: dropout, noise. None computes the plain loss, without these and without
        z-loss and label smoothing.
    """
    if isinstance(batch, Batch):
        sums = _row_sums(settings, config, parameters(settings, trainable, frozen, key), batch, key)
        loss, weight, correct = sums.loss.sum(), sums.weight.sum(), sums.correct.sum()
        return {"loss": loss, "weight": weight, "correct": correct, "tokens": weight}
    both = interleave(batch)
    ours = _row_sums(settings, config, parameters(settings, trainable, frozen, key), both, key)
    reference = _reference(settings, frozen)
    theirs = jax.lax.stop_gradient(_row_sums(settings, config, reference, both, None))
    return preference_sums(-ours.loss, -theirs.loss, ours.weight, settings.dpo_beta)


def parameters(settings: Settings, trainable: Params, frozen: Params | Reference, key: jax.Array | None) -> Params:
    """The model's parameters in `compute_dtype`, with the adapter, if one is trained."""
    dtype = resolved(settings).compute_dtype
    trainable = _cast(trainable, dtype)
    if settings.train == "all":
        return trainable
    dropout_key = None if key is None else jax.random.fold_in(key, 0)
    base = frozen.base if isinstance(frozen, Reference) else frozen
    return attach(_cast(base, dtype), trainable, adapter_config(settings), dropout_key)


def _reference(settings: Settings, frozen: Params | Reference) -> Params:
    """The parameters that preferences are compared with."""
    dtype = resolved(settings).compute_dtype
    if isinstance(frozen, Reference):
        return attach(_cast(frozen.base, dtype), _cast(frozen.adapter, dtype), frozen.lora)
    return _cast(frozen, dtype)


def neftune(embedded: jax.Array, batch: Batch, alpha: float, key: jax.Array) -> jax.Array:
    """Embeddings [B, T, D] with uniform noise of +- alpha / sqrt(a text's own length * D) (arXiv:2310.05914)."""
    lengths = sequence_lengths(batch.positions, batch.segments)[..., None].astype(jnp.float32)  # 0 in rows of padding
    bound = alpha * jax.lax.rsqrt(jnp.maximum(lengths, 1) * embedded.shape[-1])
    noise = bound * jax.random.uniform(key, embedded.shape, jnp.float32, -1, 1)
    return embedded + noise.astype(embedded.dtype)


def _row_sums(settings: Settings, config: Phi3Config, params: Params, batch: Batch, key: jax.Array | None) -> RowSums:
    s = resolved(settings)
    apply: Any = Phi3(config, walk="slice", remat=s.remat, in_order=True).apply
    run = functools.partial(apply, {"params": params})  # Phi3's methods, with these parameters
    x = run(batch.tokens, method="embed").astype(s.compute_dtype)  # a quantised embedding gives float32
    if key is not None and s.neftune_alpha:
        x = neftune(x, batch, s.neftune_alpha, jax.random.fold_in(key, 1))
    segments = batch.segments if s.pack else None  # without them more kernels can compute attention
    x, _, _ = run(batch.tokens, batch.positions, segments, embedded=x, method="hidden")
    # Preferences and evaluations need the plain log-probabilities.
    plain = key is None or s.method == "dpo"
    z_loss, label_smoothing = (0.0, 0.0) if plain else (s.z_loss, s.label_smoothing)

    def unembed(x: jax.Array, *chunk: jax.Array) -> jax.Array:
        own = _with_dropout_of_chunk(params, *chunk) if chunk else params
        logits: jax.Array = apply({"params": own}, x, method="unembed")
        return logits

    return row_sums(unembed, x, batch, s.loss_chunk, z_loss, label_smoothing, _drops_at_head(params))


def how_attention_is_computed(settings: Settings, config: Phi3Config) -> str:
    """One line about the kernels of a step, with why they are no faster ones; "" on a CPU, which has no choice."""
    s = resolved(settings)
    heads = (s.batch_size, s.sequence_length, config.num_attention_heads, config.head_dim)
    keys = (s.batch_size, config.num_key_value_heads, s.sequence_length, config.head_dim)
    shapes: Any = [jax.ShapeDtypeStruct(shape, s.compute_dtype) for shape in (heads, keys)]
    (q, k), ids = shapes, jnp.zeros(heads[:2], jnp.int32)
    segments = ids if s.pack else None
    visible = Visibility(ids, ids, segments, segments, config.sliding_window, in_order=True)
    name, reason = training.choice(q, KeysValues(k, k), visible)
    if jax.default_backend() == "cpu":
        return ""
    return f"attention: {name}" + (f", because {reason}" if reason else "")


def _head(params: Params) -> str:
    return "lm_head" if "lm_head" in params else "embed_tokens"


def _drops_at_head(params: Params) -> bool:
    """Whether the head has an adapter with dropout."""
    weight = params[_head(params)]["weight"]
    return isinstance(weight, LoraTensor) and weight.keys is not None


def _with_dropout_of_chunk(params: Params, number: jax.Array) -> Params:
    """The parameters with a key of the head's dropout that is the chunk's own."""
    name = _head(params)
    weight = params[name]["weight"]
    return params | {name: {"weight": dataclasses.replace(weight, keys=jax.random.fold_in(weight.keys, number))}}


def _cast(params: Params, dtype: str) -> Params:
    """Converts floats to this dtype; quantised weights, with their scales, stay as they are."""

    def of_leaf(leaf: Any) -> Any:
        return leaf if isinstance(leaf, QuantizedTensor) else leaf.astype(dtype)

    return jax.tree.map(of_leaf, params, is_leaf=lambda leaf: isinstance(leaf, QuantizedTensor))

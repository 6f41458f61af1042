"""The decoder once more, in float64 NumPy: one row and one head at a time; every point can be seen and changed."""

from collections.abc import Callable, Sequence

import numpy as np

import phi3_jax
from phi3_jax.model import rope

At = Callable[[str, int | None, np.ndarray], np.ndarray]


def logits(
    config: phi3_jax.Phi3Config, params: dict, ids: Sequence[int], at: At, length: int | None = None
) -> np.ndarray:
    """ids [T] -> [T, V].

    Args:
      params: floats, stacked over layers.
      at: is called with a point's name, the layer (None outside of the layers) and the value without its axis B; it
        returns what is used instead.
      length: the one by which LongRoPE picks its factors, where it is not T.
    """
    layers, N = params["layers"], config.num_attention_heads
    x = at("embed", None, np.asarray(params["embed_tokens"]["weight"], np.float64)[np.asarray(ids)])
    for i in range(config.num_hidden_layers):
        weights = {
            name: np.asarray(layers[room][name]["weight"][i], np.float64)
            for room, name in (
                ("self_attn", "qkv_proj"),
                ("self_attn", "o_proj"),
                ("mlp", "gate_up_proj"),
                ("mlp", "down_proj"),
            )
        }
        norms = [
            np.asarray(layers[name]["weight"][i], np.float64)
            for name in ("input_layernorm", "post_attention_layernorm")
        ]
        x = at("resid_pre", i, x)
        z = attention(config, weights["qkv_proj"], norm(config, x, norms[0], "ln1", i, at), i, at, length or len(ids))
        z = at("attn.z", i, z)
        parts = np.split(weights["o_proj"], N, axis=1)  # [D, H] of each head
        result = at("attn.result", i, np.stack([z[:, n] @ parts[n].T for n in range(N)], axis=1))
        x = at("resid_mid", i, x + at("attn_out", i, result.sum(axis=1)))
        gate, up = np.split(norm(config, x, norms[1], "ln2", i, at) @ weights["gate_up_proj"].T, 2, axis=1)
        gate, up = at("mlp.pre", i, gate), at("mlp.pre_linear", i, up)
        post = at("mlp.post", i, gate / (1 + np.exp(-gate)) * up)
        x = at("resid_post", i, x + at("mlp_out", i, post @ weights["down_proj"].T))
    head = params["embed_tokens" if config.tie_word_embeddings else "lm_head"]["weight"]
    x = norm(config, x, np.asarray(params["norm"]["weight"], np.float64), "ln_final", None, at)
    return at("logits", None, x @ np.asarray(head, np.float64).T)


def norm(config, x, weight, name, layer, at):
    scale = at(f"{name}.scale", layer, np.sqrt((x**2).mean(axis=1) + config.rms_norm_eps))
    return at(f"{name}.out", layer, at(f"{name}.normalized", layer, x / scale[:, None]) * weight)


def attention(config, weight, x, layer, at, length):
    """[T, D] -> z [T, N, H]."""
    T, N, K, H = len(x), config.num_attention_heads, config.num_key_value_heads, config.head_dim
    q, k, v = np.split((x @ weight.T).reshape(T, N + 2 * K, H), [N, N + K], axis=1)
    q, k, v = at("attn.q", layer, q), at("attn.k", layer, k), at("attn.v", layer, v)
    q, k = (np.stack([turned(config, row, t, length) for t, row in enumerate(each)]) for each in (q, k))
    q, k = at("attn.rot_q", layer, q), at("attn.rot_k", layer, k)
    window = config.sliding_window or T
    visible = [[t - window < s <= t for s in range(T)] for t in range(T)]
    scores = np.full((N, T, T), float(np.finfo(np.float32).min))
    for n, t, s in np.ndindex(N, T, T):
        if visible[t][s]:
            scores[n, t, s] = q[t, n] @ k[s, n // (N // K)] / H**0.5
    scores = np.where(visible, at("attn.scores", layer, scores), -np.inf)
    pattern = np.exp(scores - scores.max(axis=-1, keepdims=True))
    pattern = at("attn.pattern", layer, pattern / pattern.sum(axis=-1, keepdims=True))
    return np.stack([pattern[n] @ v[:, n // (N // K)] for n in range(N)], axis=1)


def turned(config, heads, position, length):
    """The heads [N, H] of one token, rotated to its position."""
    R, out = config.rotary_dim // 2, heads.copy()
    long = config.long_rope
    factors = [1.0] * R if long is None else long.short_factor
    if long is not None and length > long.original_max_position_embeddings:
        factors = long.long_factor
    for i, factor in enumerate(factors):
        angle = position / (factor * config.rope_theta ** (2 * i / config.rotary_dim))
        a, b, strength = heads[:, i], heads[:, i + R], rope.attention_factor(config)
        out[:, i] = (a * np.cos(angle) - b * np.sin(angle)) * strength
        out[:, i + R] = (b * np.cos(angle) + a * np.sin(angle)) * strength
    return out

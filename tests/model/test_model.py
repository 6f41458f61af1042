"""What the goldens (test_goldens.py) do not show: intermediate values, gradients, argument checks, low precision."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import phi3_jax
from phi3_jax.model import rope
from phi3_jax.model.points import Hooks

pytestmark = pytest.mark.usefixtures("quick_compilation")

B, T = 3, 11


@pytest.fixture(scope="module")
def tokens():
    return jnp.asarray(np.random.default_rng(5).integers(0, 97, (B, T)), jnp.int32)


def apply(checkpoint, tokens, *, walk=None, remat="none", **arguments):
    model = phi3_jax.Phi3(checkpoint.config, walk=walk, remat=remat)
    return model.apply({"params": checkpoint.params}, tokens, **arguments)


def slow_attention(config, weights, x, length):
    """Attention probabilities of one row and one layer, one head and one query at a time, in float64 -> [N, T, T]."""
    N, K, H = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    normed = x / np.sqrt((x**2).mean(-1, keepdims=True) + config.rms_norm_eps) * weights["norm"]
    qkv = normed @ weights["qkv"].T
    long = config.long_rope
    factors = long.long_factor if length > long.original_max_position_embeddings else long.short_factor
    attention_factor = rope.attention_factor(config)

    def turned(vector, position):
        out = vector.copy()
        for i, factor in enumerate(factors):
            angle = position / (factor * config.rope_theta ** (2 * i / H))
            a, b = vector[i], vector[i + H // 2]
            out[i] = (a * np.cos(angle) - b * np.sin(angle)) * attention_factor
            out[i + H // 2] = (b * np.cos(angle) + a * np.sin(angle)) * attention_factor
        return out

    probs = np.zeros((N, len(x), len(x)))
    for n in range(N):
        k_start = (N + n // (N // K)) * H
        for t in range(len(x)):
            seen = range(max(0, t - config.sliding_window + 1), t + 1)
            q = turned(qkv[t, n * H : (n + 1) * H], t)
            scores = np.array([q @ turned(qkv[s, k_start : k_start + H], s) for s in seen]) / np.sqrt(H)
            probs[n, t, seen] = np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum()
    return probs


@pytest.mark.parametrize("length", [11, 23])  # below and above LongRoPE's border and the window
def test_captured_attention_equals_the_slow_formula_in_every_layer(tiny, length):
    tokens = jnp.asarray(np.random.default_rng(6).integers(0, 97, (2, length)))
    _, seen = apply(tiny, tokens, hooks=Hooks(("resid_pre", "attn.pattern")))
    layers = tiny.params["layers"]
    for i in range(tiny.config.num_hidden_layers):
        weights = {"qkv": layers["self_attn"]["qkv_proj"]["weight"][i], "norm": layers["input_layernorm"]["weight"][i]}
        weights = {name: np.asarray(weight, np.float64) for name, weight in weights.items()}
        for row in range(2):
            x = np.asarray(seen["resid_pre"][i, row], np.float64)
            expected = slow_attention(tiny.config, weights, x, length)
            np.testing.assert_allclose(seen["attn.pattern"][i, row], expected, atol=2e-5)


def test_the_residual_stream_starts_with_the_embedding_and_ends_before_the_norm(tiny, tokens):
    logits, seen = apply(tiny, tokens, hooks=Hooks(("resid_pre", "resid_post")))
    assert seen.keys() == {"resid_pre", "resid_post"}
    np.testing.assert_array_equal(seen["resid_pre"][0], tiny.params["embed_tokens"]["weight"][tokens])
    last = np.asarray(seen["resid_post"][-1], np.float64)
    last = last / np.sqrt((last**2).mean(-1, keepdims=True) + tiny.config.rms_norm_eps)
    expected = last * tiny.params["norm"]["weight"] @ np.asarray(tiny.params["lm_head"]["weight"]).T
    np.testing.assert_allclose(logits, expected, atol=1e-4)


def test_capture_costs_nothing_when_off(tiny, tokens):
    """The compiled program without capture holds no array over all layers of [T, T] or [T, D]."""
    stacked = [f"[{tiny.config.num_hidden_layers},{B},{tiny.config.num_attention_heads},{T},{T}]"]
    stacked.append(f"[{tiny.config.num_hidden_layers},{B},{T},{tiny.config.hidden_size}]")

    def program(**arguments):
        return jax.jit(lambda p, t: apply(dataclasses.replace(tiny, params=p), t, **arguments)).lower(
            tiny.params, tokens
        )

    on, off = program(hooks=Hooks(("resid_post", "attn.pattern"))).compile().as_text(), program().compile().as_text()
    assert all(shape in on for shape in stacked)
    assert not any(shape in off for shape in stacked)


@pytest.mark.parametrize(
    "options", [{"walk": "index"}, {"remat": "dots"}, {"remat": "full"}, {"walk": "index", "remat": "full"}]
)
def test_gradients_do_not_depend_on_walk_or_remat(tiny, tokens, options):
    def loss(params, **options):
        logits = apply(dataclasses.replace(tiny, params=params), tokens, **options)
        return -jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), tokens[:, 1:, None], axis=-1).mean()

    expected, got = jax.jit(jax.grad(loss))(tiny.params), jax.jit(jax.grad(lambda p: loss(p, **options)))(tiny.params)
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(got), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6 + 1e-5 * float(jnp.abs(a).max()))


def test_the_pad_row_of_the_embedding_gets_no_gradient(tiny):
    pad = tiny.config.pad_token_id
    tokens = jnp.asarray([[5, pad, 8, 21]])

    def grad(config):
        changed = dataclasses.replace(tiny, config=config)
        of = jax.grad(lambda p: apply(dataclasses.replace(changed, params=p), tokens)[0, -1, 0])
        return of(tiny.params)["embed_tokens"]["weight"]

    without_pad = grad(dataclasses.replace(tiny.config, pad_token_id=None))
    assert jnp.abs(without_pad[pad]).max() > 1e-4
    np.testing.assert_allclose(grad(tiny.config), without_pad.at[pad].set(0), atol=1e-7)


def test_an_id_outside_of_the_vocabulary_gives_nan_not_another_tokens_row(tiny, tokens):
    logits = apply(tiny, tokens.at[1, 4].set(97))
    assert jnp.isnan(logits[1, 4:]).all()
    assert jnp.isfinite(logits[jnp.asarray([0, 2])]).all()


def test_bfloat16_parameters_give_float32_logits_near_the_exact_ones(tiny, tokens):
    low = dataclasses.replace(tiny, params=jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), tiny.params))
    exact = dataclasses.replace(tiny, params=jax.tree.map(lambda leaf: leaf.astype(jnp.float32), low.params))
    logits, expected = apply(low, tokens), apply(exact, tokens)
    assert logits.dtype == jnp.float32
    # bfloat16 keeps 8 bits: three layers of rounding stay within some per cent of the logits' spread.
    assert float(jnp.abs(logits - expected).mean() / expected.std()) < 0.03
    # Logits are not rounded to bfloat16 at the end.
    assert (logits != logits.astype(jnp.bfloat16).astype(jnp.float32)).mean() > 0.9


def test_angles_of_far_positions_are_computed_in_float32(tiny):
    """bf16 rounds 257 to 256: at position 100003 the angle would be off by hundreds of radians."""
    positions = jnp.asarray([[257, 100_003, 131_071]], jnp.int32)
    lengths = jnp.asarray([[131_072]], jnp.int32)
    exact = rope.cos_sin(tiny.config, positions, lengths, jnp.float32)
    low = rope.cos_sin(tiny.config, positions, lengths, jnp.bfloat16)
    _, long = rope.inverse_frequencies(tiny.config)
    angles = np.asarray(positions, np.float64)[..., None] * np.asarray(long, np.float64)
    scale = rope.attention_factor(tiny.config)
    for function, values, rounded in zip((np.cos, np.sin), exact, low, strict=True):
        # float32 angles of 1e5 radians carry an error of up to 2^-8.
        np.testing.assert_allclose(values, function(angles) * scale, atol=5e-3)
        np.testing.assert_array_equal(rounded, values.astype(jnp.bfloat16))


def test_long_and_short_are_decided_as_asked(tiny):
    tokens = jnp.asarray(np.random.default_rng(8).integers(0, 97, (1, 20)))
    as_long, as_short = apply(tiny, tokens), apply(tiny, tokens, rope_lengths=jnp.asarray([[16]]))
    assert jnp.abs(as_long - as_short).max() > 1e-2
    np.testing.assert_array_equal(as_long, apply(tiny, tokens, rope_lengths=jnp.asarray([[17]])))
    # The reference's rule for a batch: its longest row decides for all.
    np.testing.assert_allclose(apply(tiny, tokens[:, :9], rope_lengths=jnp.asarray([[20]])), as_long[:, :9], atol=5e-5)


def test_rotating_cached_keys_anew_would_not_do(tiny):
    """The guard of the crossing: short hidden states under long keys are far from a run that is long throughout."""
    tokens = jnp.asarray(np.random.default_rng(9).integers(0, 97, (1, 20)))
    _, short = apply(tiny, tokens[:, :16], hooks=Hooks(("resid_pre", "resid_post")))
    _, long = apply(tiny, tokens, hooks=Hooks(("resid_pre", "resid_post")))
    assert (short["resid_pre"][0] == long["resid_pre"][0, :, :16]).all()
    difference = jnp.abs(short["resid_post"] - long["resid_post"][:, :, :16]).max(axis=(1, 2, 3))
    assert (difference > 1e-2).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tokens": jnp.zeros((4,), jnp.int32)}, r"shape \[B, T\]"),
        ({"tokens": jnp.zeros((1, 4))}, "tokens must be integers"),
        ({"cache": (2, 16)}, "do not fit a cache of 2 rows"),
        ({"cache": (B, 8)}, "do not fit a cache of 3 rows and 8 slots"),
        ({"cache": (B, 16), "segments": jnp.zeros((B, T), jnp.int32)}, "cannot be combined"),
    ],
)
def test_arguments_that_contradict_one_another(tiny, tokens, arguments, message):
    if "cache" in arguments:
        rows, capacity = arguments["cache"]
        arguments = arguments | {"cache": phi3_jax.KVCache.create(tiny.config, rows, capacity)}
    with pytest.raises(ValueError, match=message):
        apply(tiny, **({"tokens": tokens} | arguments))


def test_fresh_weights_have_the_configured_spread(tiny):
    config = dataclasses.replace(tiny.config, initializer_range=0.07, hidden_size=48)
    params = phi3_jax.random_params(config, "bfloat16", seed=3)
    assert params["embed_tokens"]["weight"].dtype == jnp.bfloat16
    spread = float(params["layers"]["mlp"]["gate_up_proj"]["weight"].astype(jnp.float32).std())
    assert spread == pytest.approx(0.07, 0.05)
    assert (params["norm"]["weight"] == 1).all()
    stack = params["layers"]["mlp"]["down_proj"]["weight"]
    assert not (stack[0] == stack[1]).any()

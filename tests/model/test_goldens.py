"""The decoder against numbers recorded from transformers (goldens/README.md), and against itself in other guises."""

import dataclasses
import functools
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import phi3_jax
from phi3_jax.model.rope import attention_factor, cos_sin, inverse_frequencies, rotate

pytestmark = pytest.mark.usefixtures("quick_compilation")

GOLDENS = Path(__file__).parents[1] / "goldens"
NAMES = sorted(path.parent.name for path in GOLDENS.glob("*/expected.safetensors"))


@functools.cache
def golden(name: str) -> phi3_jax.Checkpoint:
    return phi3_jax.load(GOLDENS / name)


@functools.cache
def recorded(name: str) -> dict[str, np.ndarray]:
    return safetensors.numpy.load_file(GOLDENS / name / "expected.safetensors")


@functools.partial(jax.jit, static_argnames=("config", "walk"))
def run(config: phi3_jax.Phi3Config, params: Any, tokens: Any, walk: Any = None, **kwargs: Any) -> Any:
    return phi3_jax.Phi3(config, walk=walk).apply({"params": params}, tokens, **kwargs)


def logits(name: str, tokens: Any, **kwargs: Any) -> np.ndarray:
    checkpoint = golden(name)
    return np.asarray(run(checkpoint.config, checkpoint.params, jnp.asarray(tokens), **kwargs))


def random_tokens(name: str, *shape: int) -> np.ndarray:
    return np.random.default_rng(7).integers(6, golden(name).config.vocab_size, shape, dtype=np.int32)


def padded(rows: list[np.ndarray], length: int, side: str) -> tuple[np.ndarray, np.ndarray]:
    """Rows of ids -> (tokens, positions), both [B, length]; the padding's tokens are noise that must not matter."""
    tokens = np.random.default_rng(8).integers(6, 90, (len(rows), length), dtype=np.int32)
    positions = np.full((len(rows), length), -1, np.int32)
    for i, row in enumerate(rows):
        where = slice(length - len(row), length) if side == "left" else slice(0, len(row))
        tokens[i, where], positions[i, where] = row, np.arange(len(row))
    return tokens, positions


# ---------------------------------------------------------------------------------------------- the recorded numbers


def test_all_goldens_are_there():
    assert NAMES == ["gqa", "longrope", "partial_tied", "theta", "window", "window_one_layer"]


CASES = [(name, key.removesuffix("/logits")) for name in NAMES for key in sorted(recorded(name)) if "/logits" in key]


@pytest.mark.parametrize("walk", ["slice", "index"])
@pytest.mark.parametrize(("name", "case"), CASES)
def test_logits(name, case, walk):
    expected = recorded(name)
    tokens, wanted = expected[f"{case}/tokens"], expected[f"{case}/logits"]
    positions = expected.get(f"{case}/positions", np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape))
    got = logits(name, tokens, positions=positions, walk=walk)
    assert got.dtype == np.float32
    real = positions >= 0
    np.testing.assert_allclose(got[real], wanted[real], rtol=0, atol=1e-4)
    np.testing.assert_array_equal(got[real].argmax(-1), wanted[real].argmax(-1))


LONG = golden("longrope").config.long_rope
FOUR = dataclasses.replace(LONG, short_factor=(1.0, 1.3, 1.7, 2.0), long_factor=(2.0, 5.0, 11.0, 20.0))
SHORT_AND_LONG_SWAPPED = dataclasses.replace(LONG, short_factor=LONG.long_factor, long_factor=LONG.short_factor)
MISTAKES = [
    ("window", "length29", {"sliding_window": 4}),
    ("window", "length29", {"sliding_window": 6}),
    ("window", "length29", {"sliding_window": None}),
    ("longrope", "length16", {"long_rope": SHORT_AND_LONG_SWAPPED}),
    ("longrope", "length17", {"long_rope": SHORT_AND_LONG_SWAPPED}),
    ("longrope", "length16", {"long_rope": dataclasses.replace(LONG, original_max_position_embeddings=15)}),
    ("longrope", "length17", {"long_rope": dataclasses.replace(LONG, original_max_position_embeddings=17)}),
    ("longrope", "length16", {"long_rope": dataclasses.replace(LONG, attention_factor=1.0)}),
    ("longrope", "length16", {"long_rope": None}),
    ("gqa", "length19", {"rms_norm_eps": 1e-5}),
    ("partial_tied", "length16", {"partial_rotary_factor": 1.0, "long_rope": FOUR}),
    ("theta", "length23", {"rope_theta": 10000.0}),
]


@pytest.mark.parametrize(("name", "case", "mistake"), MISTAKES)
def test_a_mistake_would_show(name, case, mistake):
    """The recorded numbers can tell a wrong constant from rounding: by a hundred times the tolerance."""
    config = dataclasses.replace(golden(name).config, **mistake)
    got = run(config, golden(name).params, recorded(name)[f"{case}/tokens"])
    assert np.abs(got - recorded(name)[f"{case}/logits"]).max() > 1e-2


def test_the_window_counts_the_query_itself():
    wanted = recorded("window_one_layer")["edge/logits"]
    got = logits("window_one_layer", recorded("window_one_layer")["edge/tokens"])
    for rows in (wanted, got):
        base, four_back, five_back = rows[:, 11]
        assert np.abs(four_back - base).max() > 1e-2
        np.testing.assert_array_equal(five_back, base)


@pytest.mark.parametrize("name", ["window", "longrope", "theta"])
def test_greedy_continuation(name):
    prompt, answer = recorded(name)["greedy/prompt"], recorded(name)["greedy/answer"]
    [result] = phi3_jax.infer.generate(golden(name), [prompt.tolist()], max_new_tokens=24, temperature=0.0)
    assert list(result.token_ids) == answer.tolist()


@jax.jit
def cross_entropy(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """Mean over the next tokens."""
    return -jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), tokens[:, 1:, None], axis=-1).mean()


@pytest.mark.parametrize("walk", ["slice", "index"])
@pytest.mark.parametrize("name", ["gqa", "partial_tied"])
def test_gradients(name, walk):
    checkpoint, expected = golden(name), recorded(name)
    tokens = jnp.asarray(expected["gradient/tokens"])

    def loss(params: Any) -> jax.Array:
        return cross_entropy(run(checkpoint.config, params, tokens, walk=walk), tokens)

    got = jax.grad(loss)(checkpoint.params)
    of_name = {
        "model.embed_tokens.weight": got["embed_tokens"]["weight"],
        "model.layers.0.self_attn.qkv_proj.weight": got["layers"]["self_attn"]["qkv_proj"]["weight"][0],
        "model.norm.weight": got["norm"]["weight"],
    }
    for key, gradient in of_name.items():
        wanted = expected[f"gradient/{key}"]
        np.testing.assert_allclose(gradient, wanted, rtol=1e-4, atol=1e-5 * np.abs(wanted).max(), err_msg=key)
    pad_row = got["embed_tokens"]["weight"][checkpoint.config.pad_token_id]
    # A tied pad row still learns as a row of the output head.
    assert bool(jnp.any(pad_row != 0)) == checkpoint.config.tie_word_embeddings


# -------------------------------------------------------------------------------------------------- LongRoPE's border


@pytest.mark.parametrize("name", ["longrope", "partial_tied"])
@pytest.mark.parametrize(("length", "used"), [(16, "short_factor"), (17, "long_factor")])
def test_one_set_of_factors_serves_all_tokens(name, length, used):
    config = golden(name).config
    factors = getattr(config.long_rope, used)
    only = dataclasses.replace(config.long_rope, short_factor=factors, long_factor=factors)
    tokens = random_tokens(name, 1, length)
    got = run(dataclasses.replace(config, long_rope=only), golden(name).params, tokens)
    np.testing.assert_allclose(logits(name, tokens), got, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["su", "yarn", "longrope"])
def test_every_name_of_longrope_reads_alike(tmp_path, kind):
    shutil.copytree(GOLDENS / "longrope", tmp_path / "copy")
    path = tmp_path / "copy" / "config.json"
    text = path.read_text(encoding="utf-8")
    assert text.count('"su"') == 1
    path.write_text(text.replace('"su"', f'"{kind}"'), encoding="utf-8")
    assert phi3_jax.load(tmp_path / "copy").config == golden("longrope").config


def test_rotating_cached_keys_again_would_be_wrong():
    """Why crossing the border computes everything anew: hidden states change too, not only the keys' angles."""
    config, params = golden("longrope").config, golden("longrope").params
    tokens = random_tokens("longrope", 1, 17)
    right = logits("longrope", tokens)[0, -1]

    _, cache = run(config, params, tokens[:, :16], cache=phi3_jax.KVCache.create(config, batch=1, capacity=17))
    short, long = inverse_frequencies(config)
    angles = np.arange(17, dtype=np.float32)[None, :, None] * (long - short)
    keys = [rotate(k.swapaxes(1, 2), jnp.cos(angles), jnp.sin(angles)).swapaxes(1, 2) for k in cache.k]
    turned = dataclasses.replace(cache, k=jnp.stack(keys))
    for wrong_cache in (cache, turned):
        wrong, _ = run(config, params, tokens[:, 16:], cache=wrong_cache)
        assert np.abs(wrong[0, -1] - right).max() > 1e-2


# ------------------------------------------------------------------------------------- rows, padding, packed sequences


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["window", "longrope"])
def test_a_row_does_not_depend_on_padding_or_neighbours(name, side):
    rows = [random_tokens(name, length) for length in (8, 3, 20)]  # 20 is beyond LongRoPE's border, 8 and 3 are not
    tokens, positions = padded(rows, 23, side)
    together = logits(name, tokens, positions=positions)
    for i, row in enumerate(rows):
        alone = logits(name, row[None])[0]
        padded_alone = logits(name, tokens[i : i + 1], positions=positions[i : i + 1])[0]
        real = positions[i] >= 0
        np.testing.assert_allclose(together[i, real], alone, rtol=0, atol=1e-4)
        np.testing.assert_allclose(padded_alone[real], alone, rtol=0, atol=1e-4)


def test_packed_sequences_equal_separate_runs():
    """5 + 7 tokens with LongRoPE's border at 6: the first is short, the second long, in one row."""
    config, params = golden("longrope").config, golden("longrope").params
    config = dataclasses.replace(
        config, long_rope=dataclasses.replace(config.long_rope, original_max_position_embeddings=6)
    )
    tokens = random_tokens("longrope", 2, 12)
    positions = np.array([[*range(5), *range(7)], [*range(7), *range(5)]], np.int32)
    segments = np.array([[0] * 5 + [1] * 7, [3] * 7 + [9] * 5], np.int32)
    packed = run(config, params, tokens, positions=positions, segments=segments)
    for row, seam in ((0, 5), (1, 7)):
        for part in (slice(0, seam), slice(seam, 12)):
            alone = run(config, params, tokens[row : row + 1, part])[0]
            np.testing.assert_allclose(packed[row, part], alone, rtol=0, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------- the cache


@pytest.mark.parametrize("name", ["window", "longrope", "gqa", "partial_tied"])
def test_decoding_with_a_cache_equals_the_run_without(name):
    """Prefill of ragged rows, then one token at a time; the whole answer counts for LongRoPE from the start."""
    lengths, steps = [9, 2, 5], 11
    rows = [random_tokens(name, length + steps) for length in lengths]
    final = np.array([[len(row)] for row in rows], np.int32)  # 20, 13 and 16: long, short, just short
    config, params = golden(name).config, golden(name).params
    cache = phi3_jax.KVCache.create(config, batch=3, capacity=23)
    prompts = [row[:length] for row, length in zip(rows, lengths, strict=True)]
    tokens, positions = padded(prompts, 10, "left")
    prefill, cache = run(config, params, tokens, positions=positions, cache=cache, rope_lengths=final)
    seen = [[*out[at >= 0]] for out, at in zip(np.asarray(prefill), positions, strict=True)]
    for step in range(steps):
        newest = np.array([[row[length + step]] for row, length in zip(rows, lengths, strict=True)])
        out, cache = run(config, params, newest, cache=cache, rope_lengths=final)
        for row, new in zip(seen, np.asarray(out), strict=True):
            row.append(new[0])
    for row, got in zip(rows, seen, strict=True):
        np.testing.assert_allclose(np.stack(got), logits(name, row[None])[0], rtol=0, atol=1e-4)


# ------------------------------------------------------------------------------------------- transformations and types


@pytest.mark.parametrize("name", ["longrope", "gqa"])
def test_jit_vmap_and_eval_shape(name):
    config, params = golden(name).config, golden(name).params
    tokens = jnp.asarray(random_tokens(name, 3, 17))

    def plain(params: Any, tokens: jax.Array) -> Any:
        return phi3_jax.Phi3(config).apply({"params": params}, tokens)

    eager = plain(params, tokens)
    shape = jax.eval_shape(plain, params, tokens)
    assert (shape.shape, shape.dtype) == (eager.shape, eager.dtype) == ((3, 17, config.vocab_size), jnp.float32)
    np.testing.assert_allclose(jax.jit(plain)(params, tokens), eager, rtol=0, atol=1e-5)
    mapped = jax.vmap(plain, in_axes=(None, 0))(params, tokens[:, None])
    np.testing.assert_allclose(mapped[:, 0], eager, rtol=0, atol=1e-5)


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_gradients_are_the_slopes_of_the_loss(remat):
    config, params = golden("longrope").config, golden("longrope").params
    tokens = jnp.asarray(random_tokens("longrope", 2, 13))

    @jax.jit
    def loss(params: Any) -> jax.Array:
        return cross_entropy(phi3_jax.Phi3(config, remat=remat).apply({"params": params}, tokens), tokens)

    gradient = jax.grad(loss)(params)
    norm = jnp.sqrt(sum(jnp.vdot(leaf, leaf) for leaf in jax.tree.leaves(gradient)))
    step = 1e-3 / norm
    # A central difference along the gradient, whose slope is the gradient's norm.
    ahead, behind = (loss(jax.tree.map(lambda p, g, s=s: p + s * step * g, params, gradient)) for s in (1, -1))
    assert (ahead - behind) / (2e-3) == pytest.approx(float(norm), rel=2e-2)


@pytest.mark.parametrize("name", ["window", "longrope", "partial_tied"])
def test_angles_far_out_are_cast_last(name):
    config = golden(name).config
    positions, lengths = jnp.array([[99_999, 100_000, 100_003]]), jnp.array([[100_004]])
    exact = cos_sin(config, positions, lengths, jnp.float32)
    rounded = cos_sin(config, positions, lengths, jnp.bfloat16)
    angles = np.asarray(positions, np.float32)[..., None] * inverse_frequencies(config)[1]
    for value, low, wanted in zip(exact, rounded, (np.cos(angles), np.sin(angles)), strict=True):
        assert low.dtype == jnp.bfloat16
        np.testing.assert_allclose(value, wanted * attention_factor(config), rtol=0, atol=1e-6)
        np.testing.assert_array_equal(low, value.astype(jnp.bfloat16))


def test_a_bfloat16_model_is_as_good_far_out_as_at_the_start():
    """RoPE is relative: an offset of 100000 changes nothing, unless positions or angles are rounded to bfloat16."""
    checkpoint = golden("theta")
    low = phi3_jax.load(GOLDENS / "theta", dtype="bfloat16", layout="rows")
    tokens = random_tokens("theta", 2, 23)

    def error(offset: int) -> float:
        positions = np.broadcast_to(np.arange(23, dtype=np.int32) + offset, (2, 23))
        exact = run(checkpoint.config, checkpoint.params, tokens, positions=positions)
        rounded = run(low.config, low.params, tokens, positions=positions)
        assert rounded.dtype == jnp.float32
        return float(np.abs(rounded - exact).max())

    assert 0 < error(100_000) < 1.5 * error(0)

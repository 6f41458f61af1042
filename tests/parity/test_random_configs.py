"""Random members of the family, written by transformers, read by phi3_jax: the same logits in every way of running."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import phi3_jax

pytest.importorskip("torch", reason="the reference needs torch and transformers: make parity")

COUNT = 40
HEADS = [(1, 1), (2, 1), (2, 2), (3, 1), (3, 3), (4, 2), (5, 1), (6, 2), (6, 3)]  # query heads, key-value heads
ROTARY = [(4, 1.0), (6, 1.0), (8, 0.75), (8, 0.5), (10, 1.0), (10, 0.45), (12, 0.5), (16, 0.75)]  # head_dim, share


@dataclasses.dataclass(frozen=True)
class Draw:
    """One random checkpoint: arguments of transformers' Phi3Config, how it is stored, and the rows to run."""

    sizes: dict[str, Any]
    layout: str
    dtype: str
    max_shard_size: str
    lengths: tuple[int, ...]


def draw(seed: int) -> Draw:
    rng = np.random.default_rng(seed)

    def pick(*options: Any) -> Any:
        return options[rng.integers(len(options))]

    (heads, kv_heads), (head_dim, share) = pick(*HEADS), pick(*ROTARY)
    longrope = seed % 2 == 1
    if not longrope and pick(True, False, False):
        head_dim, share = pick((6, 0.5), (4, 0.75), (10, 0.7))  # 3, 3 and 7 rotated dimensions, rounded up to pairs
    explicit = pick(True, False)
    extra = int(rng.integers(1, heads)) if heads > 1 else 0
    # A derived head_dim is rounded down, and LongRoPE's lists are checked against that even where head_dim is given.
    hidden = heads * head_dim + (int(rng.integers(1, 17)) if explicit and not longrope else extra)
    original = int(rng.integers(5, 13))
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": pick(1e4, 250000.0, 500000.0, 777.5)}
    rope["partial_rotary_factor"] = share
    if longrope:
        count = int(head_dim * share) // 2
        rope |= {"rope_type": "longrope"}
        rope |= {"short_factor": rng.uniform(1, 3, count).tolist(), "long_factor": rng.uniform(2, 20, count).tolist()}
        rope |= pick({}, {"factor": 1.0}, {"factor": 2.0}, {"factor": 32.0})
        rope |= pick({}, {}, {"attention_factor": 0.9}, {"attention_factor": 1.3})
    sizes = {
        "vocab_size": int(rng.integers(67, 132)),
        "hidden_size": hidden,
        "intermediate_size": int(rng.integers(11, 54)),
        "num_hidden_layers": pick(1, 2, 3),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": original * pick(1, 4, 8) if longrope else 64,
        "original_max_position_embeddings": original,
        "rms_norm_eps": pick(1e-5, 1e-6, 1e-3),
        "rope_parameters": rope,
        "sliding_window": pick(None, None, 1, 3, 7, 262144),
        "tie_word_embeddings": pick(True, False),
        "initializer_range": 0.2,
        "bos_token_id": pick(None, 1),
        "eos_token_id": pick(2, [2, 5]),
        "pad_token_id": pick(None, 3),
    }
    sizes |= {"head_dim": head_dim} if explicit else {}
    return Draw(
        sizes=sizes,
        layout=pick("v5", pick("longrope", "su", "yarn") if longrope else "v4"),
        dtype=pick("float32", "bfloat16"),
        max_shard_size=pick("5GB", "5KB"),
        lengths=(original, original + 1, int(rng.integers(3, 24))),
    )


def test_the_draws_cover_the_family():
    draws = [draw(seed) for seed in range(COUNT)]
    ropes = [d.sizes["rope_parameters"] for d in draws]
    longropes = [rope for rope in ropes if rope["rope_type"] == "longrope"]
    assert {d.layout for d in draws} == {"v5", "v4", "longrope", "su", "yarn"}
    for values in (
        [d.dtype for d in draws],
        [d.max_shard_size for d in draws],
        [d.sizes["sliding_window"] is None for d in draws],
        [d.sizes["tie_word_embeddings"] for d in draws],
        ["head_dim" in d.sizes for d in draws],
        [d.sizes["num_attention_heads"] > d.sizes["num_key_value_heads"] for d in draws],
        [rope["partial_rotary_factor"] < 1 for rope in ropes],
        ["factor" in rope for rope in longropes],
        ["attention_factor" in rope for rope in longropes],
    ):
        assert all(values.count(value) >= 4 for value in values)
        assert len(set(values)) == 2


@dataclasses.dataclass(frozen=True)
class Sample:
    """A drawn checkpoint on disk, with ragged rows and the reference's float32 logits of each row alone."""

    folder: Path
    draw: Draw
    rows: list[np.ndarray]
    expected: list[np.ndarray]


@pytest.fixture(scope="module", params=range(COUNT))
def sample(request, reference, tmp_path_factory) -> Sample:
    one = draw(request.param)
    folder = tmp_path_factory.mktemp("sample") / "checkpoint"
    reference.create(one.sizes, folder, request.param, one.dtype, one.max_shard_size)
    if one.layout != "v5":
        reference.rewrite_as_version_4(folder, one.layout)
    rng = np.random.default_rng(request.param)
    rows = [rng.integers(0, one.sizes["vocab_size"], length) for length in one.lengths]
    model = reference.load(folder)
    return Sample(folder, one, rows, [reference.logits(model, row[None])[0] for row in rows])


def padded(rows: list[np.ndarray], side: str) -> tuple[np.ndarray, np.ndarray]:
    """Rows of ids -> (tokens, positions), both [B, T], with two columns of padding for the longest."""
    length = max(map(len, rows)) + 2
    tokens, positions = np.zeros((len(rows), length), np.int32), np.full((len(rows), length), -1, np.int32)
    for i, row in enumerate(rows):
        where = slice(length - len(row), length) if side == "left" else slice(0, len(row))
        tokens[i, where], positions[i, where] = row, np.arange(len(row))
    return tokens, positions


@functools.partial(jax.jit, static_argnames="config")
def run(config: phi3_jax.Phi3Config, params: Any, tokens: Any, **kwargs: Any) -> Any:
    return phi3_jax.Phi3(config).apply({"params": params}, tokens, **kwargs)


def rows_of(batch: Any, positions: np.ndarray) -> list[np.ndarray]:
    return [np.asarray(out)[at >= 0] for out, at in zip(batch, positions, strict=True)]


def assert_same(got: list[np.ndarray], expected: list[np.ndarray]) -> None:
    for mine, theirs in zip(got, expected, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-4)
        np.testing.assert_array_equal(mine.argmax(-1), theirs.argmax(-1))


def test_a_ragged_batch(sample, reference):
    checkpoint = phi3_jax.load(sample.folder)
    for side in ("left", "right"):
        tokens, positions = padded(sample.rows, side)
        got = rows_of(run(checkpoint.config, checkpoint.params, tokens, positions=positions), positions)
        assert_same(got, sample.expected)
    if checkpoint.config.long_rope is None:  # else the reference lets the longest row decide for the others
        assert_same(got, rows_of(reference.logits(reference.load(sample.folder), tokens, positions), positions))


def test_decoding_with_a_cache(sample):
    """Prefill of all but the last three tokens of each row, then one token at a time."""
    checkpoint = phi3_jax.load(sample.folder)
    config, params = checkpoint.config, checkpoint.params
    lengths = np.array([[len(row)] for row in sample.rows], np.int32)
    tokens, positions = padded([row[:-3] for row in sample.rows], "left")
    cache = phi3_jax.KVCache.create(config, batch=3, capacity=int(lengths.max()))
    out, cache = run(config, params, tokens, positions=positions, cache=cache, rope_lengths=lengths)
    got = rows_of(out, positions)
    for step in (-3, -2, -1):
        newest = np.array([[row[step]] for row in sample.rows])
        out, cache = run(config, params, newest, cache=cache, rope_lengths=lengths)
        got = [np.concatenate([old, new]) for old, new in zip(got, np.asarray(out), strict=True)]
    assert_same(got, sample.expected)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_rounds_no_more_than_the_reference_does(sample, reference, dtype):
    low = phi3_jax.load(sample.folder, dtype, layout="rows")
    assert low.params["embed_tokens"]["weight"].dtype == dtype
    tokens, positions = padded(sample.rows, "right")
    got = rows_of(run(low.config, low.params, tokens, positions=positions), positions)
    model = reference.load(sample.folder, dtype)
    theirs = [reference.logits(model, row[None])[0] for row in sample.rows]
    exact = np.concatenate(sample.expected)
    for measure in (np.max, np.mean):
        mine, bound = (measure(np.abs(np.concatenate(each) - exact)) for each in (got, theirs))
        assert 0 < mine <= 2 * bound

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from phi3_jax import inspection
from phi3_jax.inspection import forks, heads
from phi3_jax.kernels.attention.masks import attention_mask
from phi3_jax.model import Phi3

# A sequence twice, behind a first token; in the second row behind padding, in the third with padding after it. The
# window of the tiny model is 19: not every first token and not every earlier occurrence is seen.
PERIOD = 13
RANDOM = np.random.default_rng(5).permuted(np.tile(np.arange(4, 97), (3, 1)), axis=1)[:, :PERIOD]
TOKENS = np.concatenate([np.full((3, 3), 3), RANDOM, RANDOM], axis=1)
STEPS = np.arange(29)
POSITIONS = np.stack([STEPS, STEPS - 2, np.where(STEPS < 23, STEPS, -1)]).clip(-1)
TOKENS[2, 14] = TOKENS[2, 13]  # "a a", which must not count as its own successor


def slow_scores(config, pattern, tokens, positions):
    """NumPy, one query after another."""
    B, T = tokens.shape
    kinds = {name: [] for name in ("previous", "first", "self", "induction", "entropy")}
    for b in range(B):
        for t in range(T):
            q = positions[b, t]
            if q < 1:
                continue
            seen = [s for s in range(T) if 0 <= positions[b, s] <= q and positions[b, s] > q - config.sliding_window]
            before = [s for s in seen if positions[b, s] >= 1 and s < t and tokens[b, s - 1] == tokens[b, t]]
            wanted = {
                "previous": [s for s in seen if positions[b, s] == q - 1],
                "first": [s for s in seen if positions[b, s] == 0],
                "self": [t],
                "induction": before,
            }
            for name, keys in wanted.items():
                if keys:
                    kinds[name].append(pattern[:, b, :, t, keys].sum(axis=0))
            weights = pattern[:, b, :, t, :]
            kinds["entropy"].append(-(weights * np.log(np.where(weights > 0, weights, 1))).sum(axis=-1))
    return {name: np.mean(each, axis=0) for name, each in kinds.items()}


def test_scores_of_patterns(tiny):
    """Patterns of chance, hidden where the model hides."""
    seen = attention_mask(jnp.asarray(POSITIONS), jnp.asarray(POSITIONS), 19)
    pattern = np.random.default_rng(0).random((2, 3, 5, 29, 29), np.float32) * np.asarray(seen)[None, :, None]
    pattern /= np.maximum(pattern.sum(axis=-1, keepdims=True), 1e-9)
    found = inspection.pattern_scores(tiny.config, jnp.asarray(pattern), jnp.asarray(TOKENS), jnp.asarray(POSITIONS))
    for name, scores in slow_scores(tiny.config, pattern, TOKENS, POSITIONS).items():
        assert scores.shape == (2, 5)
        np.testing.assert_allclose(getattr(found, name), scores, rtol=1e-5, err_msg=name)


@pytest.mark.slow
def test_scores_and_rollout(tiny, monkeypatch, quick_compilation):
    where = {"token_positions": POSITIONS}
    monkeypatch.setattr(heads, "AT_ONCE", 1)  # one layer at a time
    layers = inspection.by_layer(tiny.config, tiny.params, TOKENS, ["attn.pattern"], **where)
    patterns = [seen["attn.pattern"] for _, seen in layers]
    patterns = np.concatenate(patterns).astype(np.float64)
    hidden = STEPS[None, :] < STEPS[:, None] - 18  # farther back than the window
    assert (patterns[:, 0][..., hidden] == 0).all()

    found = inspection.head_scores(tiny.config, tiny.params, TOKENS, **where)
    expected = slow_scores(tiny.config, patterns, TOKENS, POSITIONS)
    for name, scores in expected.items():
        assert scores.shape == (3, 6)
        np.testing.assert_allclose(getattr(found, name), scores, rtol=1e-5, err_msg=name)

    whole = np.zeros((3, 29, 29))
    for b in range(3):
        whole[b] = np.eye(29)
        for layer in range(3):
            whole[b] = (0.5 * patterns[layer, b].mean(axis=0) + 0.5 * np.eye(29)) @ whole[b]
        whole[b, POSITIONS[b] < 0] = 0
    rolled = inspection.rollout(tiny.config, tiny.params, TOKENS, **where)
    np.testing.assert_allclose(rolled, whole, atol=1e-6)
    np.testing.assert_allclose(rolled.sum(axis=-1), POSITIONS >= 0, atol=1e-5)


@pytest.mark.slow
def test_perfect_heads_score_one(tiny):
    """Heads that do one thing alone, in a model whose window sees everything."""
    config = dataclasses.replace(tiny.config, sliding_window=None)
    tokens = np.concatenate([np.full((1, 1), 3), RANDOM[:1], RANDOM[:1]], axis=1)
    t = np.arange(27)
    looks = {"previous": t - 1, "first": 0 * t, "self": t, "induction": np.where(t > PERIOD, t - PERIOD + 1, 0)}
    pattern = np.zeros((1, 1, 4, 27, 27), np.float32)
    for n, keys in enumerate(looks.values()):
        pattern[0, 0, n, t, np.maximum(keys, 0)] = 1
    found = inspection.pattern_scores(config, jnp.asarray(pattern), jnp.asarray(tokens), jnp.asarray(t)[None])
    for n, name in enumerate(looks):
        assert float(getattr(found, name)[0, n]) == 1, name
        assert int(jnp.argmax(getattr(found, name)[0])) == n
    np.testing.assert_allclose(found.entropy, 0, atol=1e-6)


def likelihood(logits):
    return jax.nn.log_softmax(logits)[:, 7]


@pytest.mark.slow
@pytest.mark.parametrize("mean", [False, True])
def test_heads_are_taken_out(tiny, mean, quick_compilation):
    """Against a model whose output projection does not read the head, and has the mean's output as a constant."""
    config, tokens, positions = tiny.config, TOKENS[:, :9], POSITIONS[:, :9]
    rows, last = np.arange(3), positions.argmax(axis=1)
    options = {"mean": mean, "token_positions": positions, "at_once": 40}
    found = inspection.ablation(config, tiny.params, tokens, likelihood, **options)
    assert found.shape == (3, 6, 3)
    part = inspection.ablation(config, tiny.params, tokens, likelihood, layers=[-1], **options)
    np.testing.assert_allclose(part, found[-1:], atol=1e-6)

    @jax.jit
    def measured(params):
        return likelihood(Phi3(config).apply({"params": params}, tokens, positions)[rows, last])

    if mean:
        z = inspection.run(config, tiny.params, tokens, ["attn.z"], token_positions=positions)["attn.z"]
        z = np.asarray(z)[:, positions >= 0].mean(axis=1)  # [L, N, H]
        for layer, head in ((0, 1), (2, 5)):
            edit = inspection.replace(config, "attn.z", z[layer, head], layers=[layer], heads=[head])
            logits = inspection.run(config, tiny.params, tokens, edits=[edit], token_positions=positions)["logits"]
            expected = likelihood(logits[rows, last]) - measured(tiny.params)
            np.testing.assert_allclose(found[layer, head], expected, atol=1e-5)
        return
    for layer in range(3):
        for head in range(6):
            o_proj = tiny.params["layers"]["self_attn"]["o_proj"]["weight"]
            attn = tiny.params["layers"]["self_attn"] | {
                "o_proj": {"weight": o_proj.at[layer, :, head * 8 : head * 8 + 8].set(0)}
            }
            params = tiny.params | {"layers": tiny.params["layers"] | {"self_attn": attn}}
            np.testing.assert_allclose(found[layer, head], measured(params) - measured(tiny.params), atol=1e-5)


@pytest.mark.slow
def test_a_program_for_all_heads_and_other_texts(tiny, quick_compilation):
    options = {"at_once": 40, "token_positions": POSITIONS[:, :9]}
    inspection.ablation(tiny.config, tiny.params, TOKENS[:, :9], likelihood, **options)
    count = forks.measured._cache_size()
    inspection.ablation(tiny.config, tiny.params, TOKENS[:, 9:18], likelihood, **options)
    assert forks.measured._cache_size() == count
    for right in (5, 7):
        prefers = inspection.logit_difference(right, 96)
        found = inspection.ablation(tiny.config, tiny.params, TOKENS[:, :9], prefers, **options)
        assert found.shape == (3, 6)
        assert np.abs(found).min() > 0
    assert forks.measured._cache_size() == count + 1


@pytest.mark.slow
def test_heads_of_the_demo_that_copy(demo):
    rng = np.random.default_rng(0)
    random = rng.integers(1000, 40000, (4, 24))
    tokens = np.concatenate([np.zeros((4, 1), int), random, random], axis=1)
    scores = inspection.head_scores(demo.config, demo.params, tokens)
    best = [place for place, _ in inspection.biggest(scores.induction, 4)]
    assert sorted(best) == [(17, 3), (17, 4), (17, 5), (18, 6)]
    assert scores.induction[18, 6] > 0.8
    assert scores.previous[16, 0] > 0.8
    assert scores.first[18, 8] > 0.99

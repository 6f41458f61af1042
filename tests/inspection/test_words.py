import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import phi3_jax
from phi3_jax import adapters, inspection
from phi3_jax.inspection import words
from phi3_jax.kernels.linear.xla import dense


def slow_nearest(table, vector, top, exclude=()):
    cosines = [-2.0 if i in exclude else row @ vector / np.linalg.norm(row) / np.linalg.norm(vector)
               for i, row in enumerate(np.asarray(table, np.float64))]  # fmt: skip
    order = np.argsort(-np.asarray(cosines))[:top]
    return order, np.asarray(cosines)[order]


@pytest.mark.parametrize("table", ["input", "output"])
def test_nearest_tokens(tiny, table, monkeypatch, quick_compilation):
    monkeypatch.setattr(words, "_AT_ONCE", 20)  # 97 tokens take five steps, the last one with some that are not there
    weight = tiny.params["embed_tokens" if table == "input" else "lm_head"]["weight"]
    rows = words.token_rows(tiny.params, [[96, 5]], table)
    np.testing.assert_array_equal(rows, np.asarray(weight)[[[96, 5]]])
    ids, cosines = inspection.nearest(tiny.config, tiny.params, rows, top=6, table=table, exclude=(7, 96))
    for i, token in enumerate([96, 5]):
        expected = slow_nearest(weight, np.asarray(weight[token]), 6, (7, 96))
        np.testing.assert_array_equal(ids[0, i], expected[0])
        np.testing.assert_allclose(cosines[0, i], expected[1], atol=1e-6)
    assert ids[0, 1, 0] == 5


def test_a_row_of_zeros_is_near_to_nothing(tiny, quick_compilation):
    params = tiny.params | {"embed_tokens": {"weight": tiny.params["embed_tokens"]["weight"].at[90:].set(0)}}
    ids, cosines = inspection.nearest(tiny.config, params, words.token_rows(params, 5), top=97)
    assert np.isfinite(cosines).all()
    np.testing.assert_array_equal(np.asarray(cosines)[np.asarray(ids) >= 90], 0)


def test_sums_of_words(tiny, quick_compilation):
    table = np.asarray(tiny.params["embed_tokens"]["weight"], np.float64)
    unit = table / np.linalg.norm(table, axis=1, keepdims=True)
    expected = slow_nearest(table, unit[11] + unit[13] - unit[17], 5, (11, 13, 17))
    ids, cosines = inspection.analogy(tiny.config, tiny.params, [11, 13], [17], top=5)
    np.testing.assert_array_equal(ids, expected[0])
    np.testing.assert_allclose(cosines, expected[1], atol=1e-6)


def test_entropy_and_surprise():
    logits = np.random.default_rng(0).normal(size=(2, 5, 7)) * 3
    logits[0, 0, 2] = -np.inf
    tokens = np.random.default_rng(1).integers(0, 7, (2, 5))
    positions = np.array([[-1, 0, 1, 2, 3], [0, 1, 2, -1, -1]])
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    expected = [[-sum(x * np.log(x) for x in place if x) for place in row] for row in p]
    np.testing.assert_allclose(inspection.entropy(logits), expected, rtol=1e-5)
    told = inspection.surprise(logits, tokens, positions)
    for row, places in enumerate(([2, 3, 4], [1, 2])):
        for t in range(5):
            own = -np.log(p[row, t - 1, tokens[row, t]]) if t in places else np.nan
            np.testing.assert_allclose(told[row, t], own, rtol=1e-5)
    assert np.isnan(inspection.surprise(logits, tokens)).sum() == 2


def test_what_is_not_there_is_refused(tiny):
    with pytest.raises(ValueError, match="the last axis must be 24"):
        inspection.nearest(tiny.config, tiny.params, np.ones(23))
    with pytest.raises(ValueError, match="there are 95 tokens"):
        inspection.nearest(tiny.config, tiny.params, np.ones(24), top=96, exclude=(3, 4))
    with pytest.raises(ValueError, match="name input or output"):
        words.token_rows(tiny.params, 1, "middle")


@pytest.mark.slow
@pytest.mark.parametrize(("quantize", "layout", "tied"), [("int4", "rows", False), ("int8", "packed", True)])
def test_rows_of_integers(tiny, tmp_path, quantize, layout, tied, quick_compilation):
    config = dataclasses.replace(tiny.config, tie_word_embeddings=tied)
    model = phi3_jax.Checkpoint(config, phi3_jax.random_params(config), None, phi3_jax.GenerationSettings())
    phi3_jax.save(model, tmp_path / "model")
    params = phi3_jax.load(tmp_path / "model", quantize=quantize, layout=layout).params
    assert ("lm_head" in params) is not tied
    for table, name in (("input", "embed_tokens"), ("output", "embed_tokens" if tied else "lm_head")):
        whole = np.asarray(dense(params[name]["weight"], None, jnp.float32))
        np.testing.assert_allclose(words.token_rows(params, [5, 96], table), whole[[5, 96]], atol=1e-6)
        ids, _ = inspection.nearest(config, params, whole[[5, 96]], top=4, table=table)
        np.testing.assert_array_equal(ids, [slow_nearest(whole, whole[i], 4)[0] for i in (5, 96)])


@pytest.mark.slow
@pytest.mark.parametrize(("targets", "dora"), [(("embed_tokens",), False), (("lm_head",), True)])
def test_rows_with_an_adapter(tiny, targets, dora, quick_compilation):
    lora = adapters.LoraConfig(rank=3, alpha=5.0, targets=targets, dora=dora)
    adapter = adapters.init_adapter(tiny.config, lora, jax.random.key(1), tiny.params)
    (part,) = adapter.values()
    part["b"] = part["b"] + 0.3
    params, merged = adapters.attach(tiny.params, adapter, lora), adapters.merge(tiny.params, adapter, lora)
    for table in ("input", "output"):
        expected = words.token_rows(merged, [5, 96], table)
        np.testing.assert_allclose(words.token_rows(params, [5, 96], table), expected, atol=1e-6)


@pytest.mark.slow
def test_king_and_queen(demo):
    def word(text):
        (token,) = demo.tokenizer.encode(text)
        return token

    king, queen, man, woman = map(word, (" king", " queen", " man", " woman"))
    near, cosines = inspection.nearest(demo.config, demo.params, words.token_rows(demo.params, king), exclude=(king,))
    assert queen in near
    assert cosines[0] < 0.95
    assert inspection.analogy(demo.config, demo.params, [king, woman], [man], top=1)[0][0] == queen

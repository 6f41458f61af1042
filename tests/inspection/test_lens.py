import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import phi3_jax
from phi3_jax import inspection
from phi3_jax.inspection import lens
from phi3_jax.model import Phi3

TOKENS = np.random.default_rng(5).integers(4, 97, (3, 29))
POSITIONS = np.stack([np.arange(29), np.arange(29) - 4, np.where(np.arange(29) < 23, np.arange(29), -1)]).clip(-1)


def slow_lens(config, params, residual):
    """NumPy, in float64: residual [..., D] -> the probabilities [..., V] of the next token."""
    x = np.asarray(residual, np.float64)
    normed = x / np.sqrt((x * x).mean(-1, keepdims=True) + config.rms_norm_eps) * np.asarray(params["norm"]["weight"])
    logits = normed @ np.asarray(params["lm_head"]["weight"], np.float64).T
    exps = np.exp(logits - logits.max(-1, keepdims=True))
    return exps / exps.sum(-1, keepdims=True)


def test_guesses_at_a_stream(tiny, monkeypatch, quick_compilation):
    monkeypatch.setattr(lens, "ROWS", 7)  # 2 x 1 x 5 tokens take two steps, the second one with some that are not there
    params = tiny.params | {"norm": {"weight": jnp.linspace(0.5, 1.5, 24)}}
    residual = np.random.default_rng(0).normal(size=(2, 1, 5, 24)).astype(np.float32) * 3
    target = np.array([[96, 4, 5, 6, 0]])
    found = lens.guesses(tiny.config, params, jnp.asarray(residual), 4, jnp.asarray(target))
    check(found, slow_lens(tiny.config, params, residual), target)


def check(guesses, expected, target):
    order = np.argsort(-expected, axis=-1)[..., :4]
    np.testing.assert_array_equal(guesses.ids, order)
    np.testing.assert_allclose(guesses.probabilities, np.take_along_axis(expected, order, -1), rtol=2e-4, atol=1e-6)
    own = np.take_along_axis(expected, np.broadcast_to(target, expected.shape[:-1])[..., None], -1)
    np.testing.assert_allclose(guesses.target_probability, own[..., 0], rtol=2e-4, atol=1e-6)
    np.testing.assert_array_equal(guesses.target_rank, (expected > own).sum(-1))


@pytest.mark.slow
def test_each_layer_says_what_the_final_norm_and_the_head_make_of_its_stream(tiny, quick_compilation):
    params = tiny.params | {"norm": {"weight": jnp.linspace(0.5, 1.5, 24)}}
    where = {"token_positions": POSITIONS}
    target = TOKENS[:, ::-1]
    found = inspection.logit_lens(tiny.config, params, TOKENS, top=4, target=target, **where)
    seen = inspection.run(tiny.config, params, TOKENS, ("resid_mid", "resid_post"), **where)
    for name, guesses in found.items():
        check(guesses, slow_lens(tiny.config, params, seen[name]), target)
    assert inspection.logit_lens(tiny.config, params, TOKENS, top=4, **where)["resid_mid"].target_rank is None
    last = found["resid_post"]
    logits = Phi3(tiny.config).apply({"params": params}, TOKENS, jnp.asarray(POSITIONS))
    real = POSITIONS >= 0
    own = np.take_along_axis(np.asarray(jax.nn.softmax(logits)), last.ids[-1], -1)
    np.testing.assert_allclose(last.probabilities[-1][real], own[real], rtol=1e-4, atol=1e-6)


def test_points_without_a_next_token_are_refused(tiny):
    with pytest.raises(ValueError, match=r"resid_post, not at attn\.z"):
        inspection.logit_lens(tiny.config, tiny.params, TOKENS, ["resid_mid", "attn.z"])
    with pytest.raises(ValueError, match="1 to 97 next tokens"):
        inspection.logit_lens(tiny.config, tiny.params, TOKENS, top=98)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bfloat16 tied", "packed"])
def test_the_last_layer_says_what_the_model_says(tiny, tmp_path, kind, quick_compilation):
    config = dataclasses.replace(tiny.config, tie_word_embeddings="tied" in kind)
    model = phi3_jax.Checkpoint(config, phi3_jax.random_params(config), None, phi3_jax.GenerationSettings())
    phi3_jax.save(model, tmp_path / "model")
    options = {"bfloat16 tied": {"dtype": "bfloat16"}, "packed": {"quantize": "int4-mixed", "layout": "packed"}}
    model = phi3_jax.load(tmp_path / "model", **options[kind])
    found = inspection.logit_lens(model.config, model.params, TOKENS, ["resid_post"], top=97, positions=[3, -1])
    logits = inspection.run(model.config, model.params, TOKENS, positions=[3, -1])["logits"]
    own = np.take_along_axis(np.asarray(jax.nn.softmax(logits)), found["resid_post"].ids[-1], -1)
    np.testing.assert_allclose(found["resid_post"].probabilities[-1], own, rtol=1e-3, atol=1e-6)


@pytest.mark.slow
def test_when_the_demo_says_paris(demo):
    tokens = np.array([demo.tokenizer.encode("The capital of France is")])
    (paris,) = demo.tokenizer.encode(" Paris")
    found = inspection.logit_lens(demo.config, demo.params, tokens, top=3, target=paris, positions=[-1])
    logits = inspection.run(demo.config, demo.params, tokens, positions=[-1])["logits"]
    np.testing.assert_allclose(
        found["resid_post"].target_probability[-1], jax.nn.softmax(logits)[..., paris], rtol=1e-4
    )
    ranks = np.asarray(found["resid_post"].target_rank)[:, 0, 0]
    assert ranks[29] == 0
    assert (ranks[:29] > 0).all()
    assert (ranks[:20] > 1000).all()

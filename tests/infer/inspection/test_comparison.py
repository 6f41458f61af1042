import dataclasses
import json

import jax
import numpy as np
import pytest

import phi3_jax
from phi3_jax.adapters import LoraConfig, attach, init_adapter
from phi3_jax.infer.inspection import compare, comparison
from phi3_jax.inspection import lens

pytestmark = pytest.mark.usefixtures("quick_compilation")
IDS = np.random.default_rng(3).integers(4, 97, 23).tolist()  # past the window and LongRoPE's border; an odd block


def numpy_pass(config, params):
    """Residual streams [L, T, D] after each layer and the lens' logits [L, T, V], by NumPy."""
    hidden = phi3_jax.inspection.run(config, params, np.asarray([IDS]), ("resid_pre", "resid_post", "logits"))
    streams = np.asarray(hidden["resid_post"], np.float64)[:, 0]
    weight = np.asarray(params["norm"]["weight"], np.float64)
    head = np.asarray(params["embed_tokens" if config.tie_word_embeddings else "lm_head"]["weight"], np.float64)
    normed = streams / np.sqrt((streams**2).mean(-1, keepdims=True) + config.rms_norm_eps) * weight
    logits = normed @ head.T
    np.testing.assert_allclose(logits[-1], np.asarray(hidden["logits"])[0], atol=1e-3)
    return streams, logits


def log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def kl(own, other):
    own, other = log_softmax(own), log_softmax(other)
    return (np.exp(own) * (own - other)).sum(-1)


@pytest.fixture(scope="module")
def changed(tiny):
    """Another model: the last two layers' MLPs differ, and the last norm."""
    params = jax.tree.map(lambda x: x, tiny.params)
    weight = params["layers"]["mlp"]["down_proj"]["weight"]
    noise = jax.random.normal(jax.random.key(1), weight.shape) * 0.1
    params["layers"]["mlp"]["down_proj"]["weight"] = weight + noise.at[0].set(0.0)
    params["norm"]["weight"] = params["norm"]["weight"] * 1.3
    return dataclasses.replace(tiny, params=params)


def test_a_comparison_is_that_of_numpy(tiny, changed, monkeypatch):
    monkeypatch.setattr(lens, "ROWS", 16)
    found = json.loads(json.dumps(compare(tiny, changed, IDS, "changed")))
    (mine, own), (theirs, other) = (numpy_pass(x.config, x.params) for x in (tiny, changed))
    cosine = (mine * theirs).sum(-1) / np.linalg.norm(mine, axis=-1) / np.linalg.norm(theirs, axis=-1)
    np.testing.assert_allclose([layer["cosine"] for layer in found["layers"]], cosine, atol=1e-4)
    np.testing.assert_allclose([layer["kl"] for layer in found["layers"]], kl(own, other), atol=2e-4, rtol=1e-3)
    np.testing.assert_allclose(found["kl"], kl(own[-1], other[-1]), atol=2e-4, rtol=1e-3)
    p = np.exp(log_softmax(other[-1, -1]))
    assert [i for i, _ in found["top"]] == np.argsort(-p)[:5].tolist()
    np.testing.assert_allclose([x for _, x in found["top"]], np.sort(-p)[:5] * -1, rtol=1e-3)
    assert (found["name"], found["note"]) == ("changed", None)
    assert found["parted"] == np.flatnonzero(cosine.mean(1) < 0.99)[0] == 1
    same = compare(tiny, tiny, IDS)
    assert same["parted"] is None
    assert np.all([same["kl"], *(layer["kl"] for layer in same["layers"])] == np.zeros(1))
    np.testing.assert_allclose([layer["cosine"] for layer in same["layers"]], 1.0, atol=1e-6)


@pytest.mark.slow
def test_quantisations_and_adapters(tiny, int4_folder):
    """What an adapter does is what its merged weights do; fewer bits are farther away; packed is as in rows."""
    lora = LoraConfig(rank=2, alpha=8.0)
    adapter = jax.tree.map(lambda x: x + 0.1, init_adapter(tiny.config, lora, jax.random.key(1)))
    attached = dataclasses.replace(tiny, params=attach(tiny.params, adapter, lora))
    merged = dataclasses.replace(tiny, params=phi3_jax.adapters.merge(tiny.params, adapter, lora))
    a, b = compare(tiny, attached, IDS), compare(tiny, merged, IDS)
    np.testing.assert_allclose(a["kl"], b["kl"], atol=2e-3, rtol=1e-2)
    assert np.mean(a["kl"]) > 0.01
    int4, packed = (phi3_jax.load(int4_folder, layout=layout) for layout in ("rows", "packed"))
    int8 = phi3_jax.load(int4_folder.parent / "floats", quantize="int8")
    far, as_packed, near = (compare(tiny, other, IDS) for other in (int4, packed, int8))
    # The kernels round what they multiply: 5% of the mean here.
    assert np.abs(np.subtract(far["kl"], as_packed["kl"])).mean() < 0.08 * np.mean(far["kl"])
    assert np.mean(near["kl"]) < 0.05 * np.mean(far["kl"])


@pytest.mark.slow
def test_models_of_other_sizes_are_compared_by_what_they_say(tiny):
    config = dataclasses.replace(tiny.config, num_hidden_layers=1, hidden_size=16, tie_word_embeddings=True)
    other = dataclasses.replace(tiny, config=config, params=phi3_jax.random_params(config))
    found = compare(tiny, other, IDS)
    (_, own), (_, its) = (numpy_pass(x.config, x.params) for x in (tiny, other))
    np.testing.assert_allclose(found["kl"], kl(own[-1], its[-1]), atol=2e-4, rtol=1e-3)
    assert (found["layers"], found["parted"]) == ([], None)
    assert (
        found["note"] == "the other model has 1 layers of width 16, this one 3 of 24: only their outputs are compared"
    )


def test_what_cannot_be_compared_is_refused(tiny):
    fewer = dataclasses.replace(tiny, config=dataclasses.replace(tiny.config, vocab_size=96))
    with pytest.raises(ValueError, match="97 and 96 tokens"):
        compare(tiny, fewer, IDS)
    with pytest.raises(ValueError, match="is empty"):
        compare(tiny, tiny, [])
    damaged = dataclasses.replace(tiny, params=tiny.params | {"norm": {"weight": np.full(24, np.nan, np.float32)}})
    with pytest.raises(ValueError, match="of one of the two models are not finite"):
        compare(tiny, damaged, IDS)


class Vocabulary:
    """Pieces "0", "1", ...; of some ids other ones."""

    def __init__(self, size, other):
        self.vocab_size, self.other = size, other

    def piece(self, token):
        assert token < self.vocab_size
        return self.other.get(token, str(token))


def test_vocabularies_are_the_same_where_both_have_a_token(tiny):
    """Rows of the embedding that nothing comes to have no piece, or are beyond all of them, or have a made-up name."""

    def model(size, other):
        return dataclasses.replace(tiny, tokenizer=Vocabulary(size, other))

    for one, two in ((model(97, {}), model(90, {})), (model(97, {50: None}), model(97, {50: "<unused>"}))):
        comparison._check_vocabulary(one, two)
        comparison._check_vocabulary(two, one)
    with pytest.raises(ValueError, match="token 7 is '7' in one model and 'seven' in the other"):
        comparison._check_vocabulary(model(97, {}), model(90, {7: "seven"}))

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import phi3_jax
from phi3_jax import adapters, inspection
from phi3_jax.inspection import attribution as own
from phi3_jax.kernels import split_layers

TOKENS = np.random.default_rng(5).integers(4, 97, (3, 29))
POSITIONS = np.stack([np.arange(29), np.arange(29) - 4, np.where(np.arange(29) < 23, np.arange(29), -1)]).clip(-1)
PLACES = np.array([[28, 3], [28, 9], [22, 20]])
WHERE = {"positions": PLACES, "token_positions": POSITIONS}


def slow(config, params, seen, row, column, ids):
    """NumPy, one vector after another: the parts of one place's logit, the norm being what it was in the run."""
    at = lambda name, *index: np.asarray(seen[name][index], np.float64)  # noqa: E731
    norm = np.asarray(params["norm"]["weight"], np.float64) / float(seen["ln_final.scale"][row, column])
    table = np.asarray(params["lm_head"]["weight"], np.float64)
    head = table[ids[0]] - (0 if len(ids) == 1 else table[ids[1]])

    def part(vector):
        return sum(v * s * h for v, s, h in zip(vector, norm, head, strict=True))

    L, N, H = config.num_hidden_layers, config.num_attention_heads, config.head_dim
    layers, heads, mlps, neurons = params["layers"], np.zeros((L, N)), np.zeros(L), np.zeros((L, 40))
    for layer in range(L):
        out = np.asarray(layers["self_attn"]["o_proj"]["weight"][layer], np.float64)
        for n in range(N):
            heads[layer, n] = part(out[:, n * H : (n + 1) * H] @ at("attn.z", layer, row, column, n))
        down = np.asarray(layers["mlp"]["down_proj"]["weight"][layer], np.float64)
        features = at("mlp.post", layer, row, column)
        neurons[layer] = [part(down[:, f] * features[f]) for f in range(40)]
        mlps[layer] = part(down @ features)
    return part(at("embed", row, column)), heads, mlps, neurons


@pytest.mark.parametrize("differs", [pytest.param(False, marks=pytest.mark.slow), True])
def test_parts_of_a_logit(tiny, differs, quick_compilation):
    params = tiny.params | {"norm": {"weight": jnp.linspace(0.5, 1.5, 24)}}
    against = 61 if differs else None
    target = np.array([[96, 5], [4, 50], [70, 71]])
    found = inspection.logit_attribution(tiny.config, params, TOKENS, target, against, neurons=True, **WHERE)
    seen = inspection.run(tiny.config, params, TOKENS, (*own._READS, "mlp.post", "ln_final.scale"), **WHERE)
    logits = np.asarray(seen["logits"])
    for row in range(3):
        for column in range(2):
            ids = [target[row, column], *([61] if differs else [])]
            embed, heads, mlps, neurons = slow(tiny.config, params, seen, row, column, ids)
            logit = logits[row, column, ids[0]] - (logits[row, column, 61] if differs else 0)
            np.testing.assert_allclose(found.logit[row, column], logit, rtol=1e-5)
            np.testing.assert_allclose(found.embed[row, column], embed, atol=2e-5)
            np.testing.assert_allclose(found.heads[:, row, column], heads, atol=2e-5)
            np.testing.assert_allclose(found.mlps[:, row, column], mlps, atol=2e-5)
            np.testing.assert_allclose(found.neurons[:, row, column], neurons, atol=2e-5)
            np.testing.assert_allclose(embed + heads.sum() + mlps.sum(), logit, atol=1e-3)
    np.testing.assert_allclose(found.rest, 0, atol=1e-3)
    np.testing.assert_array_equal(found.ids, target)


def test_the_biggest():
    values = np.array([[1.0, -5.0, 0.0], [2.0, 4.0, -2.5]])
    assert own.biggest(values, 3) == [((0, 1), -5.0), ((1, 1), 4.0), ((1, 2), -2.5)]
    assert own.biggest(values[1], 1) == [((1,), 4.0)]


def total(found):
    return found.embed + found.heads.sum(axis=(0, 3)) + found.mlps.sum(axis=0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bfloat16 tied", "int8", "packed", "adapter in buffers", "dora"])
def test_parts_are_the_logit_with_weights_of_every_kind(tiny, tmp_path, kind, quick_compilation):
    config = dataclasses.replace(tiny.config, tie_word_embeddings="tied" in kind)
    model = phi3_jax.Checkpoint(config, phi3_jax.random_params(config), None, phi3_jax.GenerationSettings())
    phi3_jax.save(model, tmp_path / "model")
    options = {
        "bfloat16 tied": {"dtype": "bfloat16"},
        "int8": {"quantize": "int8", "layout": "rows"},
        "packed": {"quantize": "int4-mixed", "layout": "packed"},
    }.get(kind, {})
    params = phi3_jax.load(tmp_path / "model", **options).params
    params = split_layers(params) if "buffers" in kind else params
    if "adapter" in kind or kind == "dora":
        targets = ("o_proj", "down_proj", "lm_head", *(() if kind == "dora" else ("embed_tokens",)))
        lora = adapters.LoraConfig(rank=3, alpha=5.0, targets=targets, dora=kind == "dora")
        adapter = adapters.init_adapter(config, lora, jax.random.key(1), params)
        adapter = jax.tree.map(lambda leaf: leaf + 0.1, adapter)
        params = adapters.attach(params, adapter, lora)
    found = inspection.logit_attribution(config, params, TOKENS, neurons=True, **WHERE)
    logits = inspection.run(config, params, TOKENS, **WHERE)["logits"]
    np.testing.assert_array_equal(found.ids, np.argmax(logits, axis=-1))
    np.testing.assert_allclose(found.logit, np.max(logits, axis=-1), rtol=1e-4)
    np.testing.assert_allclose(total(found) + found.rest, found.logit, atol=1e-3)
    rounding = 0.05 if "bfloat16" in kind or kind == "packed" else 1e-3  # packed models have a bfloat16 stream
    np.testing.assert_allclose(found.rest, 0, atol=rounding)
    np.testing.assert_allclose(found.neurons.sum(axis=-1), found.mlps, atol=rounding)


@pytest.mark.slow
def test_what_is_added_to_the_stream_is_the_rest(tiny, quick_compilation):
    vector = np.linspace(-1, 1, 24)
    edit = inspection.add(tiny.config, "resid_post", vector, layers=[1])
    found = inspection.logit_attribution(tiny.config, tiny.params, TOKENS, 50, edits=[edit], **WHERE)
    seen = inspection.run(tiny.config, tiny.params, TOKENS, ["ln_final.scale"], edits=[edit], **WHERE)
    expected = np.asarray(tiny.params["lm_head"]["weight"])[50] @ vector / seen["ln_final.scale"]
    np.testing.assert_allclose(found.rest, expected, atol=1e-3)


@pytest.mark.slow
def test_what_speaks_for_paris(demo):
    tokens = np.array([demo.tokenizer.encode("The capital of France is")])
    found = inspection.logit_attribution(demo.config, demo.params, tokens, neurons=True)
    assert demo.tokenizer.decode([int(found.ids[0, 0])]) == " Paris"
    assert abs(float(total(found)[0, 0] - found.logit[0, 0])) < 1e-3
    assert own.biggest(found.heads[:, 0, 0], 1)[0][0] == (23, 4)
    assert own.biggest(found.mlps[:, 0, 0], 1)[0][0] == (29,)
    np.testing.assert_allclose(found.neurons.sum(axis=-1), found.mlps, atol=1e-3)

"""Adapters of embeddings and heads, of tied models too, against PEFT's numbers and multiplied-out weights."""

import dataclasses
import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from adapters import (
    BASE,
    RECORDED,
    TIED,
    dense,
    loss_and_gradient,
    one_layer,
    random_adapter,
    recorded,
    run,
    scalings,
    tokens_for,
)

import phi3_jax
from phi3_jax.adapters import LoraConfig, adapter_shapes, attach, init_adapter, merge
from phi3_jax.checkpoint import load_adapter, save_adapter
from phi3_jax.infer.generate import generate
from phi3_jax.kernels import QuantizedTensor
from phi3_jax.kernels.linear import rows
from phi3_jax.quantization import parse_format, quantize, quantize_params

pytestmark = pytest.mark.usefixtures("quick_compilation")

EMBEDDINGS = {"embeddings": BASE, "embedding_alone": TIED, "embedding_tied": TIED}


@pytest.mark.parametrize("kind", EMBEDDINGS)
def test_the_embedding_and_the_head_are_adapted_as_by_peft(kind):
    """Logits and gradients; alone in a tied model, one of the two leaves the other as it is."""
    model, expected = phi3_jax.load(EMBEDDINGS[kind], layout="rows"), recorded(kind)
    lora, adapter = load_adapter(RECORDED / kind, model.config, model.params)
    assert lora.tied == (kind == "embedding_tied")
    attached = attach(model.params, adapter, lora)
    np.testing.assert_allclose(run(model.config, attached, expected["tokens"]), expected["logits"], atol=1e-4)
    _, gradient = loss_and_gradient(model.config, model.params, adapter, lora, expected["tokens"])
    theirs = {name.split("base_model.model.")[-1].removeprefix("model."): each for name, each in expected.items()}
    compared = {"embed_tokens": ("embed_tokens.lora_embedding_B", "embed_tokens.lora_embedding_A"),
                "lm_head": ("lm_head.lora_A.weight", "lm_head.lora_B.weight")}  # fmt: skip
    for target in compared.keys() & gradient.keys():
        wanted = [theirs[name].T if target == "embed_tokens" else theirs[name] for name in compared[target]]
        if lora.tied:  # in PEFT two parameters, with a gradient each, share their memory
            wanted = [one + theirs[name] for one, name in zip(wanted, compared["lm_head"], strict=True)]
        for part, each in zip("ab", wanted, strict=True):
            np.testing.assert_allclose(gradient[target][part], each, atol=2e-5, rtol=1e-4, err_msg=f"{target} {part}")


@pytest.mark.parametrize("kind", EMBEDDINGS)
def test_adapters_of_embeddings_are_written_as_by_peft(kind, tmp_path):
    model = phi3_jax.load(EMBEDDINGS[kind], layout="rows")
    lora, adapter = load_adapter(RECORDED / kind, model.config, model.params)
    save_adapter(tmp_path / "ours", adapter, lora, model.config, str(EMBEDDINGS[kind]))
    ours, theirs = (safetensors.numpy.load_file(folder / "adapter_model.safetensors")
                    for folder in (tmp_path / "ours", RECORDED / kind))  # fmt: skip
    below = {name for name in theirs if "base_layer" in name}
    assert below
    assert ours.keys() == theirs.keys() - below
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)
    again_lora, again = load_adapter(tmp_path / "ours", model.config)
    assert again_lora == lora
    jax.tree.map(np.testing.assert_array_equal, again, adapter)


@pytest.mark.parametrize(
    "own", [{"ranks": (("embed_tokens", 5),)}, {"alphas": (("o_proj", 1.0), ("embed_tokens", 2.5))}]
)
def test_a_tied_adapter_of_a_rank_or_alpha_of_its_own_is_read_again(own, tiny, tmp_path):
    """PEFT gives the head numbers by its own name, not by the embedding's."""
    config, lora = (
        dataclasses.replace(tiny.config, tie_word_embeddings=True),
        LoraConfig(2, 7, ("o_proj", "embed_tokens"), tied=True, **own),
    )
    adapter = random_adapter(config, lora)
    save_adapter(tmp_path / "x", adapter, lora, config, "some")
    again_lora, again = load_adapter(tmp_path / "x", config)
    assert again_lora == lora
    jax.tree.map(np.testing.assert_array_equal, again, adapter)
    settings = json.loads((tmp_path / "x" / "adapter_config.json").read_text())
    for pattern in (settings["rank_pattern"], settings["alpha_pattern"]):
        assert pattern.get("lm_head") == pattern.get("embed_tokens")


def test_one_update_of_a_tied_model_is_merged_and_one_of_its_halves_is_not():
    for kind in ("embedding_tied", "embedding_alone"):
        model = phi3_jax.load(TIED, layout="rows")
        lora, adapter = load_adapter(RECORDED / kind, model.config, model.params)
        if kind == "embedding_tied":
            merged = merge(model.params, adapter, lora)
            assert "lm_head" not in merged
            logits = run(model.config, merged, recorded(kind)["tokens"])
            np.testing.assert_allclose(logits, recorded(kind)["logits"], atol=1e-4)
        else:
            with pytest.raises(ValueError, match=r"the adapter unties the embedding and the head: load the checkpoint"):
                merge(model.params, adapter, lora)
        with pytest.raises(ValueError, match="an adapter is attached to the weights"):
            phi3_jax.save(dataclasses.replace(model, params=attach(model.params, adapter, lora)), "nowhere")


@pytest.mark.parametrize("kind", [pytest.param("int8", marks=pytest.mark.slow), "bfloat16"])
def test_rows_of_an_adapted_embedding(kind):
    """Over a rounded base the update is added to its rows; nothing is dropped; the padding's row gets no gradient."""
    rng = np.random.default_rng(2)
    table, ids = jnp.asarray(rng.normal(size=(29, 37)), jnp.float32), jnp.asarray([[3, 28, 0], [7, 7, 29]])
    base = table.astype(kind) if kind == "bfloat16" else quantize(table, parse_format(kind))
    tensor, dropping = one_layer(base), one_layer(base, keys=jax.random.key(0), dropout=0.9)
    found = rows(tensor, ids)
    assert found.dtype == (jnp.bfloat16 if kind == "bfloat16" else jnp.float32)
    own = np.asarray(rows(base, ids[:, :2]), np.float64)
    a, b = (np.asarray(each, np.float64) for each in (tensor.a, tensor.b))
    tolerance = 0.05 if kind == "bfloat16" else 1e-4
    np.testing.assert_allclose(np.asarray(found, np.float64)[:, :2], own + 0.7 * (b[ids[:, :2]] @ a), atol=tolerance)
    assert np.isnan(np.asarray(found, np.float32)[1, 2]).all()  # an id out of range
    np.testing.assert_array_equal(found[:, :2], rows(dropping, ids)[:, :2])

    def total(b, a, fixed):
        changed = dataclasses.replace(tensor, a=a, b=b)
        return (rows(changed, ids[:, :2], fixed).astype(jnp.float32) * jnp.arange(37)).sum()

    is_pad = (ids[:, :2] == 7)[..., None]
    (d_b, d_a), (all_b, all_a) = (jax.grad(total, (0, 1))(tensor.b, tensor.a, fixed) for fixed in (is_pad, False))
    assert not d_b[7].any()
    assert all_b[7].any()
    np.testing.assert_array_equal(np.delete(d_b, 7, 0), np.delete(all_b, 7, 0))
    np.testing.assert_array_equal(d_a, all_a)


@pytest.mark.slow
def test_a_tied_model_of_integers_learns_at_its_embedding_and_head(tiny):
    """Each has its own update, of its own rank; the loss and the gradient are those of the floats, multiplied out."""
    config = dataclasses.replace(tiny.config, tie_word_embeddings=True)
    params = {name: leaf for name, leaf in quantize_params(tiny.params, "int8").items() if name != "lm_head"}
    lora = LoraConfig(3, 7, ("embed_tokens", "lm_head", "o_proj"), ranks=(("lm_head", 2), ("embed_tokens", 5)))
    adapter, tokens = random_adapter(config, lora), tokens_for(config, 2, 13)
    floats = jax.tree.map(
        lambda w: w.dequantize() if isinstance(w, QuantizedTensor) else w,
        params | {"lm_head": params["embed_tokens"]},
        is_leaf=lambda w: isinstance(w, QuantizedTensor),
    )
    ours = loss_and_gradient(config, params, adapter, lora, tokens)

    def mean_loss(adapter):
        logits = run(tiny.config, dense(floats, adapter, lora, scalings(lora)), tokens, "slice")[:, :-1]
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], -1).mean()

    theirs = jax.jit(jax.value_and_grad(mean_loss))(adapter)
    assert all(np.abs(leaf).max() > 1e-3 for leaf in jax.tree.leaves(theirs))
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-4, rtol=1e-3), ours, theirs)


@pytest.mark.slow
def test_a_model_with_an_adapted_embedding_generates():
    model = phi3_jax.load(TIED, layout="rows")
    lora, adapter = load_adapter(RECORDED / "embedding_alone", model.config, model.params)
    attached = dataclasses.replace(model, params=attach(model.params, adapter, lora))
    with pytest.warns(UserWarning, match="which were tied: they are not any more"):
        merged = phi3_jax.load(TIED, adapter=RECORDED / "embedding_alone")
    ours, theirs = (generate(each, [[7, 8, 9]], 6)[0].token_ids for each in (attached, merged))
    assert ours == theirs


def test_a_new_adapter_of_an_embedding_is_drawn_as_peft_draws_it():
    """Normal, but where it is the head's, too, like other matrices; the other half is zero, and so is the update."""
    model = phi3_jax.load(TIED, layout="rows")
    for tied in (False, True):
        lora = LoraConfig(64, 8, ("embed_tokens",) if tied else ("embed_tokens", "lm_head"), tied=tied)
        adapter = init_adapter(model.config, lora, jax.random.key(0))
        drawn = {target: np.asarray(parts["a"]) for target, parts in adapter.items()}
        bound = 1 / math.sqrt(24)
        for target, a in drawn.items():
            assert a.shape == (64, 24)
            assert a.std() == pytest.approx(1 if (target, tied) == ("embed_tokens", False) else bound / 3**0.5, rel=0.1)
            assert not adapter[target]["b"].any()
        assert drawn.keys() == set(lora.targets)


def test_a_tied_adapter_is_for_a_tied_model(tiny):
    with pytest.raises(ValueError, match="this model's head is not tied to its embedding: name lm_head as a target"):
        adapter_shapes(tiny.config, LoraConfig(2, 4, ("embed_tokens",), tied=True))

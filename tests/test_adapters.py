"""Adapters against numbers recorded from PEFT (goldens_training/README.md) and against multiplied-out weights."""

import functools
import math
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapters import (
    RECORDED,
    base,
    loss_and_gradient,
    one_layer,
    random_adapter,
    recorded,
    run,
    tokens_for,
)

import phi3_jax
from phi3_jax.adapters import TARGETS, LoraConfig, LoraTensor, adapter_shapes, attach, init_adapter, merge
from phi3_jax.checkpoint import load_adapter
from phi3_jax.kernels import QuantizedTensor, why_unavailable
from phi3_jax.kernels.linear import linear
from phi3_jax.kernels.linear.packed import pack
from phi3_jax.quantization import parse_format, quantize

pytestmark = pytest.mark.usefixtures("quick_compilation")

KINDS = ["lora", "rslora", "dora"]
CONFIGS = {
    "lora": LoraConfig(3, 7),
    "rslora": LoraConfig(4, 3, ("o_proj", "gate_up_proj"), rslora=True),
    "dora": LoraConfig(2, 5, dora=True),
}


# ---------------------------------------------------------------------------------------------- the recorded numbers


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_peft(kind):
    """In both walks, and merged, which is within 1e-5 of the largest logit."""
    lora, adapter = load_adapter(RECORDED / kind, base().config)
    expected = recorded(kind)
    attached = attach(base().params, adapter, lora)
    by_slice, by_index = (run(base().config, attached, expected["tokens"], walk=walk) for walk in ("slice", "index"))
    merged = run(base().config, merge(base().params, adapter, lora), expected["tokens"])
    for logits in (by_slice, by_index, merged):
        np.testing.assert_allclose(logits, expected["logits"], atol=1e-4)
    np.testing.assert_allclose(merged, by_slice, atol=1e-5 * np.abs(merged).max())
    without = run(base().config, base().params, expected["tokens"])
    assert np.abs(without - expected["logits"]).max() > 1


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_gradients_are_those_of_peft(kind):
    lora, adapter = load_adapter(RECORDED / kind, base().config)
    _, gradient = loss_and_gradient(base().config, base().params, adapter, lora, recorded(kind)["tokens"])
    names = {"a": "lora_A.weight", "b": "lora_B.weight", "magnitude": "lora_magnitude_vector"}
    compared = 0
    for path, leaf in flax.traverse_util.flatten_dict(gradient).items():
        for i, layer in enumerate(leaf):
            name = ".".join(("base_model.model.model.layers", str(i), *path[1:-1], names[path[-1]]))
            np.testing.assert_allclose(layer, recorded(kind)[f"gradient/{name}"], atol=2e-5, rtol=1e-4, err_msg=name)
            compared += 1
    assert compared == sum(name.startswith("gradient/") for name in recorded(kind))


# --------------------------------------------------------------------------------------- against multiplied-out weights


def integers_and_their_meaning(params: Any) -> tuple[Any, Any]:
    """Matrices of random integers in the shapes of these parameters' layers, and the floats that they stand for."""
    rng, floats, integers = np.random.default_rng(4), {}, {}
    for path, leaf in flax.traverse_util.flatten_dict(params).items():
        floats[path] = integers[path] = leaf
        if leaf.ndim == 3:
            groups = -(-leaf.shape[2] // 32)
            values = jnp.asarray(rng.integers(0, 256, (*leaf.shape[:2], 16 * groups), dtype=np.uint8))
            scales = jnp.asarray(rng.uniform(0.05, 0.1, (*leaf.shape[:2], groups)), jnp.float16)
            integers[path] = QuantizedTensor(values, scales, None, bits=4, columns=leaf.shape[2])
            floats[path] = integers[path].dequantize()
    return flax.traverse_util.unflatten_dict(integers), flax.traverse_util.unflatten_dict(floats)


@pytest.mark.parametrize(("kind", "over"), [("dora", "floats"), ("rslora", "integers")])
def test_losses_and_gradients_are_those_of_multiplied_out_weights(tiny, kind, over):
    lora = CONFIGS[kind]
    adapter, tokens = random_adapter(tiny.config, lora), tokens_for(tiny.config, 2, 13)
    integers, floats = integers_and_their_meaning(tiny.params)
    ours = loss_and_gradient(tiny.config, floats if over == "floats" else integers, adapter, lora, tokens)
    theirs = loss_and_gradient(tiny.config, floats, adapter, lora, tokens, multiplied_out=True)
    assert all(np.abs(leaf).max() > 1e-3 for leaf in jax.tree.leaves(theirs))
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=2e-5, rtol=1e-3), ours, theirs)


def test_integers_are_not_merged_with(tiny):
    lora = CONFIGS["lora"]
    with pytest.raises(ValueError, match="is a QuantizedTensor already: load the model as floats"):
        merge(integers_and_their_meaning(tiny.params)[0], random_adapter(tiny.config, lora), lora)


def test_generation_reads_the_adapter_with_a_cache():
    lora, adapter = load_adapter(RECORDED / "dora", base().config)
    params, tokens = attach(base().params, adapter, lora), recorded("dora")["tokens"]
    cache = phi3_jax.KVCache.create(base().config, 2, 16, jnp.float32)
    logits = []
    for start, end in ((0, 9), (9, 10), (10, 11)):
        each, cache = run(base().config, params, tokens[:, start:end], cache=cache)
        logits.append(each)
    np.testing.assert_allclose(jnp.concatenate(logits, 1), recorded("dora")["logits"], atol=1e-4)


def test_a_new_adapter_changes_nothing():
    config, params, tokens = base().config, base().params, recorded("lora")["tokens"]
    lora, dora = LoraConfig(3, 7), CONFIGS["dora"]
    attached = attach(params, init_adapter(config, lora, jax.random.key(1)), lora)
    np.testing.assert_array_equal(run(config, attached, tokens, walk="slice"), run(config, params, tokens))
    adapter = init_adapter(config, dora, jax.random.key(1), params)
    norms = np.linalg.norm(np.asarray(params["layers"]["mlp"]["down_proj"]["weight"], np.float64), axis=-1)
    np.testing.assert_allclose(adapter["layers"]["mlp"]["down_proj"]["magnitude"], norms, rtol=1e-6)
    gains = attach(params, adapter, dora)["layers"]["mlp"]["down_proj"]["weight"].gain
    np.testing.assert_allclose(gains, 1, atol=1e-6)


def test_a_new_adapter_is_drawn_as_peft_draws_it():
    config = phi3_jax.Phi3Config(**{**base().config.__dict__, "hidden_size": 600, "num_hidden_layers": 3})
    lora = LoraConfig(40, 8, ("qkv_proj", "down_proj"))
    adapter = init_adapter(config, lora, jax.random.key(0))
    flat = flax.traverse_util.flatten_dict(adapter, sep="/")
    assert {path: leaf.shape for path, leaf in flat.items()} == adapter_shapes(config, lora)
    assert set(adapter["layers"]) == {"self_attn", "mlp"}
    layers = [*flat["layers/self_attn/qkv_proj/a"], *flat["layers/mlp/down_proj/a"]]
    for a in map(np.asarray, layers):
        bound = 1 / math.sqrt(a.shape[1])
        assert 0.9 * bound < np.abs(a).max() <= bound
        assert abs(a.mean()) < 5 * bound / math.sqrt(3 * a.size)
        assert a.std() == pytest.approx(bound / math.sqrt(3), rel=0.1)
    width = min(a.shape[1] for a in layers)
    for i, one in enumerate(layers):
        assert all(
            np.abs(np.corrcoef(one[:, :width].ravel(), two[:, :width].ravel())[0, 1]) < 0.2 for two in layers[:i]
        )
    assert all(not leaf.any() for path, leaf in flat.items() if path.endswith("/b"))


# ------------------------------------------------------------------------------------------------------- other bases


@pytest.mark.parametrize("kind", ["int8", "int4", "packed"])
def test_an_adapter_adds_the_same_to_a_rounded_base(kind):
    rng = np.random.default_rng(2)
    weight, x = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((29, 37), (2, 5, 37)))
    if kind == "packed":
        if why_unavailable():
            pytest.skip("there are no kernels here")
        rounded = pack({"layer": weight})["layer"]
    else:
        rounded = quantize(weight, parse_format(kind))
    added = linear(x, one_layer(rounded)) - linear(x, rounded)
    tensor = one_layer(weight)
    expected = 0.7 * np.einsum("bti,ri,or->bto", *(np.asarray(each, np.float64) for each in (x, tensor.a, tensor.b)))
    np.testing.assert_allclose(added, expected, atol=1e-4)
    np.testing.assert_allclose(linear(x, tensor) - linear(x, weight), expected, atol=1e-4)


def test_a_float32_adapter_is_computed_in_float32_over_bfloat16():
    rng = np.random.default_rng(2)
    weight, x = (jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in ((29, 37), (50, 37)))
    tensor = one_layer(weight * 0)
    out = linear(x, tensor)
    assert out.dtype == jnp.bfloat16
    exact = 0.7 * np.einsum("ti,ri,or->to", *(np.asarray(each, np.float64) for each in (x, tensor.a, tensor.b)))
    # Rounded once, at the end: half a unit in bfloat16's last place. Rounded inside, some would be off by more.
    assert (np.abs(np.asarray(out, np.float64) - exact) <= np.abs(exact) * 2**-8 + 1e-5).all()
    in_bfloat16 = np.asarray(linear(x, one_layer(weight * 0, dtype=jnp.bfloat16)), np.float64)
    assert (np.abs(in_bfloat16 - exact) > np.abs(exact) * 2**-8 + 1e-5).any()


# ------------------------------------------------------------------------------------------------------------ dropout


def masks(tiny: phi3_jax.Checkpoint, key: int, x: jax.Array) -> dict[str, np.ndarray]:
    """What each matrix and layer drops of x [B, T, D]: an identity as the adapter shows it."""
    lora = LoraConfig(24, 24, ("qkv_proj", "gate_up_proj"), dropout=0.25)
    adapter = random_adapter(tiny.config, lora)
    params = attach(jax.tree.map(jnp.zeros_like, tiny.params), adapter, lora, jax.random.key(key))
    seen = {}
    for path, leaf in (
        ("qkv", params["layers"]["self_attn"]["qkv_proj"]),
        ("up", params["layers"]["mlp"]["gate_up_proj"]),
    ):
        tensor = leaf["weight"]
        outputs = tensor.base.shape[1]
        eye = LoraTensor(
            tensor.base,
            jnp.broadcast_to(jnp.eye(24), (3, 24, 24)),
            jnp.broadcast_to(jnp.eye(outputs, 24), (3, outputs, 24)),
            None,
            tensor.keys,
            1.0,
            tensor.dropout,
        )
        for i in range(3):
            seen[f"{path}{i}"] = np.asarray(linear(x, eye, jnp.int32(i)))[..., :24]
    return seen


def test_each_matrix_and_layer_drops_its_own_inputs(tiny):
    x = jnp.ones((20, 20, 24))
    seen = masks(tiny, 0, x)
    n, agreement = x.size, 0.75**2 + 0.25**2
    for name, values in seen.items():
        kept = values != 0
        np.testing.assert_allclose(values[kept], 4 / 3, rtol=1e-6)
        assert abs(kept.mean() - 0.75) < 5 * math.sqrt(0.75 * 0.25 / n), name
        for one, other in ((kept[1:], kept[:-1]), (kept[:, 1:], kept[:, :-1])):  # rows, and tokens
            assert abs((one == other).mean() - agreement) < 5 * math.sqrt(0.25 / one.size), name
    everything = [*seen.items(), *((f"another key's {name}", each) for name, each in masks(tiny, 1, x).items())]
    for i, (name, one) in enumerate(everything):
        for other, two in everything[:i]:
            assert abs(((one != 0) == (two != 0)).mean() - agreement) < 5 * math.sqrt(0.25 / n), (name, other)
    jax.tree.map(np.testing.assert_array_equal, seen, masks(tiny, 0, x))


def test_dropout_in_the_model(tiny):
    """The same in both walks, and in gradients through remat; another key's is another; without a key there is none."""
    lora = LoraConfig(3, 7, dropout=0.4)
    adapter, tokens = random_adapter(tiny.config, lora), tokens_for(tiny.config, 2, 9)
    step = functools.partial(loss_and_gradient, tiny.config, tiny.params, adapter, lora, tokens)
    loss, gradient = step(jax.random.key(4))
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, atol=1e-4, rtol=1e-2),
        (loss, gradient),
        step(jax.random.key(4), walk="index"),
    )
    assert abs(step(jax.random.key(5))[0] - loss) > 1e-2
    undropped = attach(tiny.params, adapter, lora)["layers"]["mlp"]["down_proj"]["weight"]
    assert undropped.keys is None


def test_dropout_keeps_the_expectation():
    x, weight = jnp.asarray(np.random.default_rng(1).normal(size=(4, 37)), jnp.float32), jnp.zeros((29, 37))
    each = jax.vmap(lambda key: linear(x, one_layer(weight, keys=key, dropout=0.3)))
    many = np.asarray(each(jax.random.split(jax.random.key(0), 4000)))
    error = many.std(0) / math.sqrt(len(many))
    assert (np.abs(many.mean(0) - linear(x, one_layer(weight))) < 5 * error).all()


def test_dropout_of_dora_is_that_of_peft():
    """Base W and update see the dropped input but for W at gain 1, which sees all of it; multiplied out, float64."""
    rng = np.random.default_rng(2)
    weight, x = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((29, 37), (5, 37)))
    gain = jnp.asarray(rng.uniform(0.5, 2, 29), jnp.float32)
    options = {"keys": jax.random.key(3), "dropout": 0.3}
    tensor = one_layer(weight, gain=gain, **options)
    eye = LoraTensor(jnp.zeros((37, 37)), jnp.eye(37), jnp.eye(37), None, options["keys"], 1.0, 0.3)
    dropped = np.asarray(linear(x, eye), np.float64)
    assert (dropped == 0).any()
    W, A, B, g = (np.asarray(each, np.float64) for each in (weight, tensor.a, tensor.b, gain))
    expected = np.asarray(x, np.float64) @ W.T + (g - 1) * (dropped @ W.T) + g * 0.7 * (dropped @ A.T @ B.T)
    np.testing.assert_allclose(linear(x, tensor), expected, atol=1e-4)


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rank": 0}, "the rank of an adapter must be a whole number from 1 on, not 0"),
        ({"rank": 2.0}, "whole number"),
        ({"alpha": -1}, "alpha must be a number from 0 to below inf that float32 holds, not -1"),
        ({"alpha": float("nan")}, "alpha"),
        ({"dropout": 1.0}, "dropout must be a number from 0 to below 1 that float32 holds, not 1.0"),
        ({"targets": ()}, rf"must be some of {', '.join(TARGETS)}, embed_tokens, lm_head, not \[\]"),
        ({"ranks": (("o_proj", 0),)}, "the rank of an adapter must be a whole number from 1 on, not 0"),
        (
            {"ranks": (("lm_head", 3),)},
            "an adapter's rank of lm_head: each must be for one of its targets, and only one",
        ),
        ({"alphas": (("o_proj", 3), ("o_proj", 4))}, "an adapter's alpha of o_proj: each must be for one"),
        ({"targets": ("embed_tokens",), "dora": True}, "DoRA of the embedding is not trained here: leave embed_tokens"),
        ({"targets": ("embed_tokens", "lm_head"), "tied": True}, "a tied adapter is that of the embedding, for both"),
        ({"targets": ("q_proj", "o_proj")}, r"not \['q_proj', 'o_proj'\]"),
    ],
)
def test_configurations_that_no_adapter_can_have(fields, message):
    with pytest.raises(ValueError, match=message):
        LoraConfig(**({"rank": 2, "alpha": 4} | fields))


def test_scaling():
    assert LoraConfig(4, 10).scaling == 2.5
    assert LoraConfig(4, 10, rslora=True).scaling == 5
    lora = LoraConfig(4, 10, rslora=True, ranks=(("o_proj", 25),), alphas=(("down_proj", 3),))
    assert [lora.scaling_of(target) for target in TARGETS] == [5, 2, 5, 1.5]


def test_dora_needs_the_weights_to_begin_with(tiny):
    with pytest.raises(ValueError, match="give params"):
        init_adapter(tiny.config, CONFIGS["dora"], jax.random.key(0))

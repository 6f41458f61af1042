"""A buffer for each layer (`kernels.PerLayer`): the same numbers, files and answers as from stacks."""

import dataclasses
import filecmp

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints.adapters import random_adapter

import phi3_jax
from phi3_jax.adapters import LoraConfig, attach, merge
from phi3_jax.checkpoint import as_floats, kind_of_weights
from phi3_jax.infer import Options
from phi3_jax.infer.engine.prompt_cache import fingerprint
from phi3_jax.kernels import LoraTensor, PerLayer, QuantizedTensor, has_per_layer, split_layers, stack_layers
from phi3_jax.model import KVCache
from phi3_jax.model.points import Hooks
from phi3_jax.quantization import quantize_params
from phi3_jax.train.evaluation.score import Request, score
from phi3_jax.train.settings import Settings
from phi3_jax.train.step import start

pytestmark = pytest.mark.usefixtures("quick_compilation")

LORA, DORA = (LoraConfig(rank=2, alpha=3, dora=dora) for dora in (False, True))
KINDS = [{"dtype": "bfloat16"}, {"quantize": "int8"}]
SLOW_KINDS = [{}, {"quantize": "int4-g64-asymmetric"}]


@pytest.fixture(scope="module")
def model(tiny):
    """`tiny` with other norms in each layer, so that a norm of the wrong layer shows."""
    layers = dict(tiny.params["layers"])
    for number, name in enumerate(("input_layernorm", "post_attention_layernorm")):
        noise = np.random.default_rng(number).uniform(0.5, 2, layers[name]["weight"].shape)
        layers[name] = {"weight": jnp.asarray(noise, jnp.float32)}
    return dataclasses.replace(tiny, params=tiny.params | {"layers": layers})


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    phi3_jax.save(model, path := tmp_path_factory.mktemp("layers") / "model")
    return path


def split(model):
    return dataclasses.replace(model, params=split_layers(model.params))


def run(model, params, rows, walk=None):
    """(logits, keys, what is read) of `rows` ragged rows that are written into a cache."""
    tokens = jnp.asarray(np.random.default_rng(rows).integers(0, 97, (rows, 5)), jnp.int32)
    positions = jnp.where(np.arange(rows)[:, None] % 3 == 1, jnp.arange(5) - 2, jnp.arange(5))
    cache = KVCache.create(model.config, rows, 23)

    @jax.jit
    def apply(params, cache):
        how = {"positions": jnp.maximum(positions, -1), "cache": cache}
        return phi3_jax.Phi3(model.config, walk).apply(
            {"params": params}, tokens, hooks=Hooks(("resid_post", "attn.pattern")), **how
        )

    logits, cache, seen = apply(params, cache)
    return jax.tree.map(np.asarray, (logits, cache.k, seen))


@pytest.mark.parametrize(
    ("rows", "form"),
    [(1, "floats"), *(pytest.param(rows, "adapted integers", marks=pytest.mark.slow) for rows in (3, 64))],
)
def test_numbers_are_those_of_the_stack(model, rows, form):
    params, apart = model.params, split_layers(model.params)
    if form != "floats":
        integers, adapter = quantize_params(params, "int8"), random_adapter(model.config, LORA)
        params, apart = (attach(each, adapter, LORA) for each in (integers, split_layers(integers)))
    assert has_per_layer(apart)
    assert not has_per_layer(params)
    theirs, ours = run(model, params, rows, "index"), run(model, apart, rows)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max()), ours, theirs)
    jax.tree.map(np.testing.assert_array_equal, stack_layers(apart), params)
    if rows == 1:  # stacks can be unrolled, too
        jax.tree.map(np.testing.assert_array_equal, run(model, params, rows, "unroll"), ours)


@pytest.mark.slow
def test_adapters_go_onto_each_layer(model):
    """Attached to, and merged into, what is apart: as with stacks."""
    adapter = random_adapter(model.config, DORA)
    stack, apart = attach(model.params, adapter, DORA), attach(split_layers(model.params), adapter, DORA)
    leaf = apart["layers"]["mlp"]["down_proj"]["weight"]
    assert isinstance(leaf, PerLayer)
    assert isinstance(leaf[2], LoraTensor)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), stack_layers(apart), stack)
    close = {"rtol": 1e-5, "atol": 1e-6}
    merged = merge(split_layers(model.params), adapter, DORA)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, **close),
        stack_layers(merged),
        merge(model.params, adapter, DORA),
    )
    floats = as_floats(apart, "float32")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **close), floats, stack_layers(merged))
    assert kind_of_weights(split_layers(quantize_params(model.params, "int4"))) == "int4"


@pytest.mark.parametrize("how", [*KINDS, *(pytest.param(how, marks=pytest.mark.slow) for how in SLOW_KINDS)])
def test_files_are_those_of_the_stack(folder, tmp_path, how):
    stack, apart = (phi3_jax.load(folder, **how, layout=layout) for layout in ("rows", "layers"))
    wanted = QuantizedTensor if "quantize" in how else jax.Array
    for path, leaf in flax.traverse_util.flatten_dict(apart.params, sep="/").items():
        assert isinstance(leaf, PerLayer) == path.startswith("layers/")
        assert not path.endswith("proj/weight") or isinstance(leaf[0], wanted)
    jax.tree.map(np.testing.assert_array_equal, stack_layers(apart.params), stack.params)
    for name, each in (("stack", stack), ("apart", apart)):
        phi3_jax.save(each, tmp_path / name)
    files = [path.name for path in (tmp_path / "stack").iterdir()]
    assert filecmp.cmpfiles(tmp_path / "stack", tmp_path / "apart", files, shallow=False)[0] == files
    again = phi3_jax.load(tmp_path / "apart", how.get("dtype", "auto"), layout="layers").params
    jax.tree.map(np.testing.assert_array_equal, again, apart.params)


def test_an_adapter_is_loaded_onto_the_integers_of_each_layer(model, folder, tmp_path):
    phi3_jax.checkpoint.save_adapter(tmp_path / "a", random_adapter(model.config, LORA), LORA, model.config, "base")
    how = {"quantize": "int8", "adapter": tmp_path / "a"}
    stack, apart = (phi3_jax.load(folder, **how, layout=layout).params for layout in ("rows", "layers"))
    leaf = apart["layers"]["self_attn"]["o_proj"]["weight"][1]
    assert isinstance(leaf.base, QuantizedTensor)
    assert leaf.a.shape == (2, 48)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), stack_layers(apart), stack)


@pytest.mark.slow
def test_text_is_that_of_the_stack(model):
    """Greedily, and scored."""
    apart, prompts = split(model), [[5, 1, 7], [20, 33, 2, 9, 11]]
    options = Options(cache_dtype="float32")
    texts = [
        [each.token_ids for each in phi3_jax.infer.generate(m, prompts, 6, options=options)] for m in (model, apart)
    ]
    assert texts[0] == texts[1]
    requests = [Request(prompt, 1) for prompt in prompts]
    for ours, theirs in zip(score(apart, requests), score(model, requests), strict=True):
        np.testing.assert_allclose(ours.logprobs, theirs.logprobs, atol=1e-5)
    # The keys are the same, but for rounding; a prompt cache is for one layout, as with packed weights.
    assert fingerprint(apart) == fingerprint(split(model)) != fingerprint(model)


def test_what_needs_stacks_says_so(model):
    apart, tokens = split(model), jnp.asarray([[5, 1, 7]])
    jax.eval_shape(phi3_jax.Phi3(model.config, "slice").apply, {"params": apart.params}, tokens)  # is about stacks
    with pytest.raises(ValueError, match=r"remat='full' is for training, .* load with layout='rows'"):
        phi3_jax.Phi3(model.config, remat="full").apply({"params": apart.params}, tokens)
    with pytest.raises(
        ValueError, match=r"training reads stacks of layers, .*: load the checkpoint with layout='rows'"
    ):
        start(Settings(), model.config, apart.params)
    with pytest.raises(
        ValueError, match=r"layers/\S+ is a PerLayer already: load the model as floats, with layout='rows'"
    ):
        quantize_params(apart.params, "int8")
    with pytest.raises(TypeError, match="indexed by a number, not by a computed value"):
        jax.jit(lambda i: apart.params["layers"]["mlp"]["down_proj"]["weight"][i])(1)

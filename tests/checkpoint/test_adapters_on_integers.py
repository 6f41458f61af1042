"""Adapters on weights that are integers: attached, as where they were trained; against dequantised weights plus b a."""

import dataclasses
import functools
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver
from adapters import BASE, RECORDED, dense, multiplied_out, peft_tensors, random_adapter, scalings, separate, write_peft

import phi3_jax
from phi3_jax.adapters import LoraConfig
from phi3_jax.checkpoint import as_floats, load_adapter, named_tensors, save_adapter
from phi3_jax.checkpoint.gguf.writer import save_gguf
from phi3_jax.infer import DraftModel, Options, generate
from phi3_jax.infer.engine import PromptCache
from phi3_jax.infer.engine.prompt_cache import fingerprint
from phi3_jax.infer.programs import flags as program_flags
from phi3_jax.kernels import LoraTensor, PackedTensor, QuantizedTensor, why_unavailable

pytestmark = pytest.mark.usefixtures("quick_compilation")

TOKENS = np.random.default_rng(5).integers(6, 90, (3, 13), dtype=np.int32)
EMBEDDING = "base_model.model.model.embed_tokens"


@functools.partial(jax.jit, static_argnames=("config", "walk"))
def run(config: Any, params: Any, tokens: Any, walk: Any = None, cache: Any = None) -> Any:
    return phi3_jax.Phi3(config, walk).apply({"params": params}, tokens, cache=cache)


def meaning(params: Any) -> dict[str, Any]:
    """The floats that integers stand for, of whole stacks at a time."""
    leaves = flax.traverse_util.flatten_dict(params, sep="/")
    return flax.traverse_util.unflatten_dict(
        {path: leaf.dequantize() if isinstance(leaf, QuantizedTensor) else leaf for path, leaf in leaves.items()},
        sep="/",
    )


def kinds(params: Any) -> dict[str, str]:
    """What each weight of the layers, the embedding and the head is."""
    leaves = flax.traverse_util.flatten_dict(params, sep="/")
    bases = {path.split("/")[-2]: getattr(leaf, "base", leaf) for path, leaf in leaves.items()}
    attached = {path.split("/")[-2] for path, leaf in leaves.items() if isinstance(leaf, LoraTensor)}
    names = {QuantizedTensor: "integers", PackedTensor: "packed"}
    return {
        name: names.get(type(leaf), "floats") + (" + ba" if name in attached else "") for name, leaf in bases.items()
    }


def check(params: Any, config: Any, expected: Any, walks: Any = ("index",)) -> None:
    """Logits."""
    theirs = run(config, expected, TOKENS, walk="index")
    for walk in walks:
        np.testing.assert_allclose(
            run(config, params, TOKENS, walk=walk), theirs, atol=1e-5 * max(1, np.abs(theirs).max())
        )


def random_integers(checkpoint: phi3_jax.Checkpoint, bits: int, seed: int = 0) -> phi3_jax.Checkpoint:
    """The model with random integers, which takes no rounding; the embedding's have 8 bits."""
    rng, leaves = np.random.default_rng(seed), flax.traverse_util.flatten_dict(checkpoint.params, sep="/")
    for path, leaf in leaves.items():
        if "norm" in path:
            continue
        own = 8 if path.startswith("embed") else bits
        groups = -(-leaf.shape[-1] // 32)
        values = rng.integers(1, 256, (*leaf.shape[:-1], groups * 4 * own), dtype=np.uint8)
        scales = rng.uniform(0.5, 1, (*leaf.shape[:-1], groups)) * 0.3 / (1 << own - 1)
        leaves[path] = QuantizedTensor(jnp.asarray(values), jnp.asarray(scales, jnp.float16), None, own, leaf.shape[-1])
    return dataclasses.replace(checkpoint, params=flax.traverse_util.unflatten_dict(leaves, sep="/"))


@pytest.fixture(scope="module")
def integers(tiny, tmp_path_factory) -> dict[int, Path]:
    """Folders of the tiny model, of 8 and of 4 bits."""
    place = tmp_path_factory.mktemp("integers")
    for bits in (8, 4):
        phi3_jax.save(random_integers(tiny, bits), place / str(bits))
    return {bits: place / str(bits) for bits in (8, 4)}


@pytest.fixture(scope="module")
def adapter_of(tiny, tmp_path_factory):
    """A folder with a random adapter, of the tiny model or another one."""

    def write(lora: LoraConfig, seed: int = 0, config: Any = tiny.config) -> Path:
        folder = tmp_path_factory.mktemp("adapter") / "adapter"
        save_adapter(folder, random_adapter(config, lora, seed), lora, config, "some")
        return folder

    return write


@pytest.fixture(scope="module")
def gguf(tmp_path_factory) -> Path:
    """A file of 8 bits, but for down_proj, whose rows of 80 are no whole number of blocks."""
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    config = phi3_jax.Phi3Config(
        vocab_size=97, hidden_size=64, intermediate_size=80, max_position_embeddings=64, rope_theta=1e4, **sizes
    )
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    model = phi3_jax.Checkpoint(config, phi3_jax.random_params(config), None, phi3_jax.GenerationSettings())
    save_gguf(model, path, "q8_0")
    return path


# ---------------------------------------------------------------------------------------------- the numbers of training


@pytest.mark.parametrize(
    ("bits", "lora"),
    [
        (4, LoraConfig(3, 7)),
        (
            8,
            LoraConfig(
                2, 5, ("qkv_proj", "down_proj"), rslora=True, ranks=(("down_proj", 3),), alphas=(("qkv_proj", 2),)
            ),
        ),
        (4, LoraConfig(2, 5, dora=True)),
        pytest.param(8, LoraConfig(4, 3, ("o_proj",), dropout=0.5), marks=pytest.mark.slow),
    ],
)
def test_logits_are_those_of_dequantised_weights_plus_the_update(bits, lora, tiny, integers, adapter_of):
    base, folder = phi3_jax.load(integers[bits], layout="rows"), adapter_of(lora)
    expected = dense(meaning(base.params), load_adapter(folder, tiny.config)[1], lora, scalings(lora))
    loaded = phi3_jax.load(integers[bits], layout="rows", adapter=folder)
    check(loaded.params, loaded.config, expected, ("slice", "index") if lora.dora else ("index",))


def test_weights_that_are_rounded_while_they_are_read(tiny_folder, adapter_of, tiny):
    """And what load did before: much of the update is lost in rounding."""
    lora = LoraConfig(3, 7)
    folder = adapter_of(lora)
    base, ours, sums = (
        phi3_jax.load(tiny_folder, quantize="int4", layout="rows", **options)
        for options in ({}, {"adapter": folder}, {"adapter": folder, "merge_adapter": True})
    )
    expected = dense(meaning(base.params), load_adapter(folder, tiny.config)[1], lora, lora.scaling)
    check(ours.params, ours.config, expected)
    theirs = run(tiny.config, expected, TOKENS, walk="index")
    assert np.abs(run(tiny.config, sums.params, TOKENS, walk="index") - theirs).max() > 0.05 * np.abs(theirs).max()


@pytest.mark.skipif(why_unavailable() is not None, reason=f"no kernels: {why_unavailable()}")
@pytest.mark.parametrize(
    ("bits", "dora", "cache_dtypes"),
    [(4, False, ["int8"]), pytest.param(8, True, ["float32", "bfloat16"], marks=pytest.mark.slow)],
)
def test_packed_weights_and_all_caches(bits, dora, cache_dtypes, tiny, integers, tmp_path, adapter_of):
    """Prefill and decoding of several rows by the kernels; from integers in rows, and in the kernels' order."""
    folder = adapter_of(LoraConfig(3, 7, dora=dora))
    rows, packed = (phi3_jax.load(integers[bits], layout=layout, adapter=folder) for layout in ("rows", "packed"))
    assert set(kinds(packed.params).values()) == {"floats", "packed", "packed + ba"}
    floats = as_floats(rows.params, "float32")
    jax.tree.map(np.testing.assert_array_equal, as_floats(packed.params, "float32"), floats)
    expected = run(tiny.config, floats, TOKENS, walk="index")
    for cache_dtype in cache_dtypes:
        cache = phi3_jax.KVCache.create(tiny.config, 3, 16, cache_dtype)
        logits = []
        for start, end in ((0, 11), (11, 12), (12, 13)):
            each, cache = run(tiny.config, packed.params, TOKENS[:, start:end], cache=cache)
            logits.append(each)
        # Kernels round activations to 8 bits.
        error = np.concatenate(logits, 1) - expected
        assert np.sqrt((error**2).mean() / (expected**2).mean()) < 0.05
    phi3_jax.save(phi3_jax.load(integers[bits], layout="packed"), tmp_path / "packed")
    again = phi3_jax.load(tmp_path / "packed", adapter=folder)
    jax.tree.map(np.testing.assert_array_equal, again.params, packed.params)


@pytest.mark.slow
def test_answers_with_an_adapter_beside_integers(integers, adapter_of):
    """Of a batch, and with the same model guessing."""
    folder = adapter_of(LoraConfig(3, 7))
    model, base = phi3_jax.load(integers[8], adapter=folder), phi3_jax.load(integers[8])
    answers, plain = (generate(each, TOKENS.tolist(), 7) for each in (model, base))
    assert [each.token_ids for each in answers] != [each.token_ids for each in plain]
    guessed = generate(model, TOKENS.tolist(), 7, options=Options(speculation=DraftModel(model, 2)))
    assert [each.token_ids for each in guessed] == [each.token_ids for each in answers]


@pytest.mark.parametrize("lora", [LoraConfig(3, 7), LoraConfig(2, 5, dora=True)])
def test_the_integers_of_a_gguf_file(lora, gguf, adapter_of):
    """And its floats, which a policy may leave."""
    base = phi3_jax.load(gguf, quantize="stored", layout="rows")
    folder = adapter_of(lora, config=base.config)
    loaded = phi3_jax.load(gguf, quantize="stored", layout="rows", adapter=folder)
    adapter = load_adapter(folder, base.config)[1]
    check(loaded.params, loaded.config, dense(meaning(base.params), adapter, lora, lora.scaling))
    assert (kinds(loaded.params)["qkv_proj"], kinds(loaded.params)["down_proj"]) == ("integers + ba", "floats + ba")


# ------------------------------------------------------------------------------------ parts that cannot be beside them


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """Folders of integers of a model of two layers: "apart", and with its head "tied" to its embedding."""
    place, base = tmp_path_factory.mktemp("models"), phi3_jax.load(BASE)
    phi3_jax.save(random_integers(base, 4), place / "apart")
    params = {name: leaf for name, leaf in base.params.items() if name != "lm_head"}
    config = dataclasses.replace(base.config, tie_word_embeddings=True)
    phi3_jax.save(random_integers(dataclasses.replace(base, params=params, config=config), 4), place / "tied")
    return {name: place / name for name in ("apart", "tied")}


def rounded(model: Path, unfused: bool = False) -> dict[str, np.ndarray]:
    """The weights by name that the integers stand for."""
    loaded = phi3_jax.load(model, layout="rows")
    found = dict(named_tensors(meaning(loaded.params)))
    return separate(found, loaded.config) if unfused else found


def check_weights(model: Path, folder: Path, expected: dict[str, np.ndarray], unfused: bool = False) -> Any:
    loaded = phi3_jax.load(model, layout="rows", adapter=folder)
    found = dict(named_tensors(as_floats(loaded.params, "float32")))
    found = separate(found, loaded.config) if unfused else found
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        np.testing.assert_allclose(found[name], weight, atol=2e-5, rtol=1e-5, err_msg=name)
    return loaded


def test_modules_in_full_are_taken_as_they_are(models, tmp_path):
    """A head, a norm and a matrix of modules_to_save, beside an update of others."""
    weights, rng = rounded(models["apart"]), np.random.default_rng(1)
    tensors = peft_tensors(weights, {f"model.layers.{i}.self_attn.o_proj": 3 for i in (0, 1)})
    saved = ["lm_head", "model.norm", "model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"]
    whole = {name: rng.normal(size=weights[f"{name}.weight"].shape).astype(np.float32) for name in saved}
    expected = multiplied_out(weights, tensors, 8 / 3) | {f"{name}.weight": each for name, each in whole.items()}
    tensors |= {f"base_model.model.{name}.weight": each for name, each in whole.items()}
    options = {"target_modules": ["o_proj"], "r": 3, "modules_to_save": ["lm_head", "model.norm", "down_proj"]}
    loaded = check_weights(models["apart"], write_peft(tmp_path / "x", tensors, **options), expected)
    assert kinds(loaded.params) == {
        "embed_tokens": "integers", "lm_head": "floats", "down_proj": "floats", "o_proj": "integers + ba",
        "qkv_proj": "integers", "gate_up_proj": "integers", "norm": "floats", "input_layernorm": "floats",
        "post_attention_layernorm": "floats",
    }  # fmt: skip


def test_updates_of_embedding_and_head_and_rows_of_tokens(models, tmp_path):
    weights, rng = rounded(models["apart"]), np.random.default_rng(2)
    tensors = peft_tensors(weights, {"model.embed_tokens": 2, "lm_head": 2, "model.layers.1.mlp.gate_up_proj": 2})
    expected = multiplied_out(weights, tensors, 4.0)
    folder = write_peft(
        tmp_path / "x", tensors, r=2, target_modules=["embed_tokens", "lm_head", "layers.1.mlp.gate_up_proj"]
    )
    check_weights(models["apart"], folder, expected)
    rows = rng.normal(size=(2, weights["model.embed_tokens.weight"].shape[1])).astype(np.float32)
    tensors = peft_tensors(weights, {f"model.layers.{i}.mlp.down_proj": 2 for i in (0, 1)})
    expected = multiplied_out(weights, tensors, 4.0)
    expected["model.embed_tokens.weight"][[7, 3]] = rows
    tensors[f"{EMBEDDING}.token_adapter.trainable_tokens_delta"] = rows
    options = {"target_modules": ["down_proj"], "trainable_token_indices": [7, 3]}
    check_weights(models["apart"], write_peft(tmp_path / "y", tensors, r=2, **options), expected)


@pytest.mark.parametrize("names", [("q_proj", "v_proj"), ("k_proj", "o_proj", "down_proj")])
def test_dora_of_some_rows_only_becomes_floats(names, models, tmp_path):
    weights = rounded(models["apart"], unfused=True)
    place = {"down_proj": "mlp"}
    ranks = {f"model.layers.{i}.{place.get(name, 'self_attn')}.{name}": 3 for i in (0, 1) for name in names}
    tensors = peft_tensors(weights, ranks, dora=True)
    folder = write_peft(tmp_path / "x", tensors, r=3, lora_alpha=6, target_modules=list(names), use_dora=True)
    loaded = check_weights(models["apart"], folder, multiplied_out(weights, tensors, 2.0), unfused=True)
    assert kinds(loaded.params)["qkv_proj"] == "floats"
    assert kinds(loaded.params)["o_proj"] == ("integers + ba" if "o_proj" in names else "integers")


@pytest.mark.parametrize("name", ["lm_head", "model.embed_tokens"])
def test_a_tied_matrix_of_integers_is_untied(name, models, tmp_path):
    weights = rounded(models["tied"])
    table = weights["model.embed_tokens.weight"]
    both = weights | {"lm_head.weight": table}
    tensors = peft_tensors(both, {name: 2, "model.layers.0.self_attn.o_proj": 2})
    folder = write_peft(tmp_path / "x", tensors, r=2, target_modules=[name, "layers.0.self_attn.o_proj"])
    with pytest.warns(UserWarning, match=f"changes {name}, which were tied: they are not any more"):
        loaded = check_weights(models["tied"], folder, multiplied_out(both, tensors, 4.0))
    assert not loaded.config.tie_word_embeddings
    assert sorted((kinds(loaded.params)["lm_head"], kinds(loaded.params)["embed_tokens"])) == ["floats", "integers"]


# --------------------------------------------------------------------------------------------- what users do with them


def test_another_adapter_of_the_same_rank_is_not_compiled_again(integers, adapter_of):
    """Also with another alpha, dropout and rule of scaling."""
    ours = [LoraConfig(3, 7), LoraConfig(3, 2, dropout=0.1), LoraConfig(3, 5, rslora=True)]
    loaded = [
        phi3_jax.load(integers[8], layout="rows", adapter=adapter_of(lora, seed)) for seed, lora in enumerate(ours)
    ]
    before = run._cache_size()
    logits = [run(each.config, each.params, TOKENS, walk="index") for each in loaded]
    assert run._cache_size() == before + 1
    assert all(np.abs(logits[0] - each).max() > 1e-2 for each in logits[1:])


def test_a_prompt_cache_is_of_one_adapter(tiny, integers, adapter_of, tmp_path):
    load = functools.partial(phi3_jax.load, integers[8], layout="rows")
    models = [load(), *(load(adapter=adapter_of(LoraConfig(3, 7), seed)) for seed in (0, 1))]
    models.append(load(adapter=adapter_of(LoraConfig(3, 6), 0)))  # only alpha differs
    assert len({fingerprint(model) for model in models}) == 4
    assert fingerprint(models[1]) == fingerprint(load(adapter=adapter_of(LoraConfig(3, 7), 0)))

    def scaled(leaf: Any) -> Any:
        return dataclasses.replace(leaf, scaling=2.0) if isinstance(leaf, LoraTensor) else leaf

    other = jax.tree.map(scaled, models[1].params, is_leaf=lambda leaf: isinstance(leaf, LoraTensor))
    assert fingerprint(dataclasses.replace(models[1], params=other)) != fingerprint(models[1])
    cache = phi3_jax.KVCache.create(tiny.config, 1, 16, "float32")
    _, cache = run(tiny.config, models[1].params, TOKENS[:1, :5], cache=cache)
    PromptCache.take(cache, 0, TOKENS[0, :5].tolist(), False, fingerprint(models[1])).save(tmp_path / "prompt")
    PromptCache.load(tmp_path / "prompt", models[1])
    for model in (models[0], *models[2:]):
        with pytest.raises(ValueError, match="was made with another model"):
            PromptCache.load(tmp_path / "prompt", model)


def test_arrays_of_the_adapter_are_put_where_they_are_told(integers, adapter_of):
    seen: list[str] = []

    def place(path: str, shape: tuple[int, ...]) -> jax.Device:
        seen.append(path)
        return jax.devices()[0]

    phi3_jax.load(integers[8], layout="rows", adapter=adapter_of(LoraConfig(3, 7)), device=place)
    assert {"layers/mlp/down_proj/a", "layers/mlp/down_proj/b", "layers/mlp/down_proj/weight"} <= set(seen)


def test_speculation_gives_the_adapter_to_the_same_model_only(monkeypatch, tiny, tiny_folder, integers, tmp_path):
    config = dataclasses.replace(tiny.config, num_hidden_layers=1)
    small = dataclasses.replace(tiny, config=config, params=phi3_jax.random_params(config))
    phi3_jax.save(small, tmp_path / "small")
    asked = []
    monkeypatch.setattr(phi3_jax, "load", lambda path, dtype, **options: asked.append((str(path), dtype, options)))
    with flagsaver.flagsaver():
        flags.FLAGS(["phi3-generate", "--checkpoint", "base", "--adapter", "mine", "--quantize", "int4"])
        program_flags.load_checkpoint()
        for path in (tiny_folder, integers[8], tmp_path / "small"):
            program_flags.load_draft(str(path), tiny)
    assert [(Path(path).name, each["quantize"], each["adapter"]) for path, _, each in asked] == [
        ("base", "int4", "mine"), ("tiny", "int4", "mine"), ("8", None, "mine"), ("small", "int4", None)
    ]  # fmt: skip


def test_what_is_attached_is_not_saved_but_as_floats(integers, adapter_of, tmp_path):
    loaded = phi3_jax.load(integers[4], layout="rows", adapter=adapter_of(LoraConfig(3, 7)))
    with pytest.raises(ValueError, match=r"an adapter is attached .*floats of integers .*phi3-export does"):
        phi3_jax.save(loaded, tmp_path / "x")
    phi3_jax.save(dataclasses.replace(loaded, params=as_floats(loaded.params, "float32")), tmp_path / "x")
    check(phi3_jax.load(tmp_path / "x").params, loaded.config, loaded.params)
    huge = jax.tree.map(lambda leaf: leaf * 1e5 if leaf.dtype == jnp.float32 else leaf, loaded.params)
    with pytest.raises(ValueError, match=r"layers/.*: there are values beyond float16's largest"):
        as_floats(huge, "float16")


def test_adapters_are_not_merged_into_integers(gguf, integers, tmp_path):
    with pytest.raises(ValueError, match="quantize='stored' keeps a file's integers, into which no adapter is merged"):
        phi3_jax.load(gguf, quantize="stored", adapter=RECORDED / "lora", merge_adapter=True)
    there = phi3_jax.load(gguf, quantize="stored", layout="rows", merge_adapter=True)  # as training loads it
    assert kinds(there.params)["qkv_proj"] == "integers"
    with pytest.raises(ValueError, match="an adapter is not merged into integers: load the checkpoint they were made"):
        phi3_jax.load(integers[8], adapter=RECORDED / "lora", merge_adapter=True)
    with pytest.raises(FileNotFoundError, match=re.escape(f"{tmp_path}/nowhere")):
        phi3_jax.load(integers[8], adapter=tmp_path / "nowhere")


@pytest.mark.slow
def test_the_program_exports_integers_with_their_adapter(gguf, adapter_of, tmp_path):
    base = phi3_jax.load(gguf, quantize="stored", layout="rows")
    phi3_jax.save(base, tmp_path / "integers")
    folder = adapter_of(LoraConfig(3, 7), config=base.config)
    command = [sys.executable, "-m", "phi3_jax.infer.programs.export_main", "--type", "f32"]

    def export(output: str, *more: str) -> str:
        done = subprocess.run([*command, "--output", output, *more], capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return done.stderr

    expected = as_floats(phi3_jax.load(tmp_path / "integers", layout="rows", adapter=folder).params, "float32")
    file, adapter = ["--format", "safetensors", "--checkpoint", str(gguf)], ["--adapter", str(folder)]
    told = export("a", *file, *adapter, "--quantize", "stored")
    assert told == "a: the stored weights as floats, with the adapter merged\n"
    jax.tree.map(np.testing.assert_array_equal, phi3_jax.load(tmp_path / "a").params, expected)
    told = export("b.gguf", "--format", "gguf", "--notokenizer", "--checkpoint", "integers", *adapter)
    assert told.startswith("b.gguf: the stored weights as floats, with the adapter merged\n")
    jax.tree.map(np.testing.assert_array_equal, phi3_jax.load(tmp_path / "b.gguf").params, expected)
    assert export("c", *file, *adapter) == "c: the float weights with the adapter merged\n"

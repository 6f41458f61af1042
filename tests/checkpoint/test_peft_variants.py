"""Adapters as others publish them, against weights that are multiplied out in float64, module by module."""

import dataclasses
import re
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from adapters import (
    BASE,
    base,
    check_both,
    check_merged,
    modules,
    multiplied_out,
    peft_tensors,
    scalings,
    weights,
    write_peft,
)

import phi3_jax
from phi3_jax.checkpoint import load_adapter, save, save_adapter
from phi3_jax.checkpoint.gguf.writer import save_gguf
from phi3_jax.kernels import QuantizedTensor

pytestmark = pytest.mark.usefixtures("quick_compilation")

ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
FUSED = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
EMBEDDING = "base_model.model.model.embed_tokens"


@pytest.fixture(scope="module")
def tied_folder(tmp_path_factory) -> Path:
    """The base with its head tied to its embedding."""
    folder = tmp_path_factory.mktemp("tied") / "model"
    params = {name: leaf for name, leaf in base().params.items() if name != "lm_head"}
    config = dataclasses.replace(base().config, tie_word_embeddings=True)
    save(dataclasses.replace(base(), params=params, config=config), folder)
    return folder


# ------------------------------------------------------------------------------------------------------ separate names


@pytest.mark.parametrize(
    ("names", "layers", "dora", "rank"),
    [
        (("q_proj", "v_proj"), (0, 1), False, 6),
        ((*ATTENTION, *MLP), (0, 1), False, 9),
        ((*ATTENTION, *MLP), (0, 1), True, 9),
        (("k_proj", "up_proj", "down_proj"), (1,), False, 3),
    ],
)
def test_separate_matrices_become_blocks_of_the_fused_ones(names, layers, dora, rank, tmp_path):
    tensors = peft_tensors(weights(True), modules(names, layers), dora)
    options = {"layers_to_transform": list(layers), "use_dora": dora}
    folder = write_peft(tmp_path / "x", tensors, target_modules=list(names), r=3, lora_alpha=6, **options)
    lora = check_both(folder, multiplied_out(weights(True), tensors, 2.0))
    assert (max(map(lora.rank_of, lora.targets)), set(scalings(lora).values()), lora.dora) == (rank, {2}, dora)


@pytest.mark.parametrize(("names", "options"), [(("q_proj", "v_proj"), {}), (MLP, {"alpha_pattern": {"up_proj": 2}})])
def test_separate_matrices_are_written_as_fused_ones(names, options, tmp_path):
    tensors = peft_tensors(weights(True), modules(names))
    folder = write_peft(tmp_path / "x", tensors, target_modules=list(names), r=3, **options)
    lora, adapter = load_adapter(folder, base().config)
    save_adapter(tmp_path / "ours", adapter, lora, base().config, "")
    factors = {name: options.get("alpha_pattern", {}).get(name.split(".")[-1], 8) / 3 for name in modules(names)}
    expected = multiplied_out(weights(True), tensors, factors)
    check_merged(tmp_path / "ours", expected)
    written = safetensors.numpy.load_file(tmp_path / "ours" / "adapter_model.safetensors")
    assert {name.split(".")[-3] for name in written} <= set(FUSED)


def test_separate_matrices_over_a_gguf_file(tmp_path):
    """Which has its own order of the rows of q and k."""
    names = (*ATTENTION, *MLP)
    save_gguf(base(), tmp_path / "base.gguf", "f32")
    tensors = peft_tensors(weights(True), modules(names) | {"lm_head": 3}, dora=True)
    settings = {"target_modules": [*names, "lm_head"], "r": 3, "use_dora": True}
    folder = write_peft(tmp_path / "x", tensors, **settings)
    check_merged(folder, multiplied_out(weights(True), tensors, 8 / 3), tmp_path / "base.gguf")


@pytest.mark.parametrize(("names", "layers"), [(("q_proj", "v_proj"), (0, 1)), (("o_proj",), (1,))])
def test_dora_of_some_rows_or_layers_is_merged_but_not_attached(names, layers, tmp_path):
    tensors = peft_tensors(weights(True), modules(names, layers), dora=True)
    options = {"target_modules": list(names), "layers_to_transform": list(layers), "use_dora": True}
    folder = write_peft(tmp_path / "x", tensors, r=3, lora_alpha=6, **options)
    if names == ("o_proj",):
        check_merged(folder, multiplied_out(weights(False), tensors, 2.0))
    else:
        check_merged(folder, multiplied_out(weights(True), tensors, 2.0))
    with pytest.raises(ValueError, match=r"DoRA of some layers or rows only cannot be attached; load the model with"):
        load_adapter(folder, base().config)


def test_names_of_both_spellings_in_one_file(tmp_path):
    tensors = peft_tensors(weights(True), modules(("q_proj",))) | peft_tensors(
        weights(False), modules(("gate_up_proj",))
    )
    folder = write_peft(tmp_path / "x", tensors, target_modules=["q_proj", "gate_up_proj"], r=3)
    with pytest.raises(ValueError, match="some tensors are for q_proj or gate_proj, others for qkv_proj"):
        load_adapter(folder, base().config)


# -------------------------------------------------------------------------------------------------------- what is meant


@pytest.mark.parametrize(
    ("settings", "names", "layers"),
    [
        ({"target_modules": r".*\.(q_proj|down_proj)"}, ("q_proj", "down_proj"), (0, 1)),
        ({"target_modules": r"model\.layers\.\d*1\..*?[qv]_proj"}, ("q_proj", "v_proj"), (1,)),
        ({"target_modules": r"(?!.*mlp)(?:.*?_proj)$"}, ATTENTION, (0, 1)),
        ({"target_modules": "All-Linear"}, ATTENTION + MLP, (0, 1)),
        ({"target_modules": "all-linear", "exclude_modules": r".*mlp.*|.*\.[kv]_proj"}, ("q_proj", "o_proj"), (0, 1)),
        ({"target_modules": [*ATTENTION, "x"], "exclude_modules": ["o_proj", "1.self_attn.k_proj", "v_proj",
          "model.layers.1.self_attn.q_proj"]}, ("q_proj", "k_proj"), (0,)),
        ({"target_modules": ["model.layers.1.self_attn.q_proj", "layers.1.mlp.up_proj"]}, ("q_proj", "up_proj"), (1,)),
        ({"target_modules": ["q_proj", "up_proj"], "layers_to_transform": 1, "layers_pattern": "layers"},
         ("q_proj", "up_proj"), (1,)),
        ({"target_modules": ["q_proj"], "layers_to_transform": [0, 7], "layers_pattern": ["h", "model.layers"]},
         ("q_proj",), (0,)),
        ({"target_modules": ["q_proj", "model.layers.1.self_attn.v_proj"], "layers_to_transform": [1]},
         ("q_proj", "v_proj"), (1,)),
    ],
)  # fmt: skip
def test_targets(settings, names, layers, tmp_path):
    """Those modules are loaded; one more or one less in the second file contradicts the first, and both are named."""
    tensors = peft_tensors(weights(True), modules(names, layers))
    lora, _ = load_adapter(write_peft(tmp_path / "x", tensors, r=3, **settings), base().config)
    assert lora.rank >= 3
    last = list(tensors)[-1]
    fewer = write_peft(tmp_path / "fewer", {k: v for k, v in tensors.items() if k != last}, r=3, **settings)
    with pytest.raises(ValueError, match=rf"not as adapter_config.json says; missing tensors: {re.escape(last)}"):
        load_adapter(fewer, base().config)
    others = modules((*ATTENTION, *MLP)).keys() - modules(names, layers).keys()
    if others:
        more = tensors | peft_tensors(weights(True), {sorted(others)[0]: 3})
        with pytest.raises(ValueError, match=rf"says; unknown tensors: base_model.model.{sorted(others)[0]}"):
            load_adapter(write_peft(tmp_path / "more", more, r=3, **settings), base().config)


@pytest.mark.parametrize(
    ("ranks", "alphas", "expected"),
    [
        ({"o_proj": 5}, {}, {"o_proj": (5, 8)}),
        ({}, {"down_proj": 1.5, "1.self_attn.qkv_proj": 16}, {"down_proj": (3, 1.5), "1.self_attn.qkv_proj": (3, 16)}),
        (
            {r"^model\.layers\.[1-9]\..*(qkv|o)_proj": 2, "o_proj": 7},
            {r"0.*": 4},
            {"1.self_attn.o_proj": (2, 8), "1.self_attn.qkv_proj": (2, 8), "0.self_attn.o_proj": (7, 4), "0.": (3, 4)},
        ),
    ],
)  # fmt: skip
@pytest.mark.parametrize("options", [{}, {"use_rslora": True, "use_dora": True}])
def test_ranks_and_alphas_of_their_own(ranks, alphas, expected, options, tmp_path):
    """`expected`: (rank, alpha) by a part of the name, the first that fits."""
    each = {name: next((value for part, value in expected.items() if part in name), (3, 8)) for name in modules(FUSED)}
    tensors = peft_tensors(weights(False), {name: rank for name, (rank, _) in each.items()}, bool(options))
    settings = {"rank_pattern": ranks, "alpha_pattern": alphas, "r": 3, "lora_alpha": 8, **options}
    folder = write_peft(tmp_path / "x", tensors, target_modules=list(FUSED), **settings)
    factors = {name: alpha / (rank**0.5 if options else rank) for name, (rank, alpha) in each.items()}
    lora = check_both(folder, multiplied_out(weights(False), tensors, factors))
    assert (lora.rank, lora.alpha) == (3, 8)
    for target in FUSED:  # no rank of a target is larger than it has to be
        assert lora.rank_of(target) == max(rank for name, (rank, _) in each.items() if name.endswith(target))


# ----------------------------------------------------------------------------- whole modules, embeddings, heads, tokens


@pytest.mark.parametrize(
    ("saved", "names", "unfused"),
    [
        (["lm_head", "embed_tokens"], ["lm_head", "model.embed_tokens"], False),
        (["norm"], ["model.norm", "model.layers.0.input_layernorm", "model.layers.1.input_layernorm",
                    "model.layers.0.post_attention_layernorm", "model.layers.1.post_attention_layernorm"], True),
        (["1.mlp", "v_proj"], [*(f"model.layers.1.mlp.{name}" for name in MLP),
                               *(f"model.layers.{i}.self_attn.v_proj" for i in (0, 1))], True),
        (None, ["model.embed_tokens", "lm_head"], False),  # save_embedding_layers=True
    ],
)  # fmt: skip
def test_modules_that_are_stored_whole(saved, names, unfused, tmp_path):
    target = "q_proj" if unfused else "qkv_proj"
    tensors = peft_tensors(weights(unfused), modules([target]))
    expected = multiplied_out(weights(unfused), tensors, 8 / 3)
    rng = np.random.default_rng(0)
    for name in names:
        expected[f"{name}.weight"] = rng.normal(size=expected[f"{name}.weight"].shape).astype(np.float32)
        tensors[f"base_model.model.{name}.weight"] = expected[f"{name}.weight"]
    folder = write_peft(tmp_path / "x", tensors, r=3, target_modules=[target], modules_to_save=saved)
    check_merged(folder, expected)
    with pytest.raises(ValueError, match=f"changes .*{names[0]}.*, which cannot be attached; load the model with it"):
        load_adapter(folder, base().config)
    if saved:
        del tensors[f"base_model.model.{names[0]}.weight"]
        missing = write_peft(tmp_path / "missing", tensors, r=3, target_modules=[target], modules_to_save=saved)
        with pytest.raises(ValueError, match=f"missing tensors: base_model.model.{names[0]}.weight"):
            phi3_jax.load(BASE, adapter=missing)


@pytest.mark.parametrize("names", [["embed_tokens"], ["lm_head"], ["lm_head", "embed_tokens"]])
@pytest.mark.parametrize("dora", [False, True])
def test_updates_of_the_embedding_and_the_head(names, dora, tmp_path):
    full = {"embed_tokens": "model.embed_tokens", "lm_head": "lm_head"}
    tensors = peft_tensors(weights(False), {full[name]: 2 for name in names}, dora)
    settings = {"target_modules": names, "r": 2, "lora_alpha": 3, "use_dora": dora}
    expected = multiplied_out(weights(False), tensors, 1.5)
    folder = write_peft(tmp_path / "x", tensors, **settings)
    if dora and "embed_tokens" in names:  # whose columns have norms
        check_merged(folder, expected)
        with pytest.raises(ValueError, match=r"changes model.embed_tokens, which cannot be attached; load the model"):
            load_adapter(folder, base().config)
    else:
        assert set(check_both(folder, expected).targets) == set(names)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_the_weights_below_updates_have_to_be_the_models(dtype, tmp_path):
    """PEFT stores them where an embedding or a head is adapted."""
    tensors = peft_tensors(weights(False), {"lm_head": 2, "model.embed_tokens": 2})
    names = {
        f"base_model.model.{name}.base_layer.weight": f"{name}.weight" for name in ("lm_head", "model.embed_tokens")
    }
    below = {name: weights(False)[own].astype(dtype) for name, own in names.items()}
    settings: dict[str, Any] = {"target_modules": ["embed_tokens", "lm_head"], "r": 2}
    folder = write_peft(tmp_path / "x", tensors | below, **settings)
    expected, params = load_adapter(write_peft(tmp_path / "y", tensors, **settings), base().config), base().params
    jax.tree.map(np.testing.assert_array_equal, load_adapter(folder, base().config, params), expected)
    with pytest.raises(ValueError, match=r"stores the weights of lm_head, model.embed_tokens, too: give load_adapter"):
        load_adapter(folder, base().config)
    values, scales = jnp.zeros((103, 64), jnp.uint8), jnp.zeros((103, 2), jnp.float16)
    integers = {"weight": QuantizedTensor(values, scales, None, bits=8, columns=36)}
    with pytest.raises(ValueError, match=r"lm_head is a QuantizedTensor, and the adapter stores"):
        load_adapter(folder, base().config, params | {"lm_head": integers})
    below["base_model.model.lm_head.base_layer.weight"] = below["base_model.model.lm_head.base_layer.weight"] + dtype(1)
    with pytest.raises(ValueError, match=r"changes lm_head, which cannot be attached; load the model with it merged"):
        load_adapter(write_peft(tmp_path / "z", tensors | below, **settings), base().config, params)


@pytest.mark.parametrize("name", ["embed_tokens", "lm_head"])
@pytest.mark.parametrize("how", ["update", "whole"])
def test_a_tied_head_is_untied_where_an_adapter_changes_one_of_the_two(name, how, tied_folder, tmp_path):
    table = weights(False)["model.embed_tokens.weight"]
    before = weights(False) | {"lm_head.weight": table}
    module = "lm_head" if name == "lm_head" else "model.embed_tokens"
    if how == "update":
        tensors = peft_tensors(before, {module: 2})
        settings: dict[str, Any] = {"target_modules": [name]}
        expected = multiplied_out(before, tensors, 4)
    else:
        tensors = peft_tensors(before, modules(["o_proj"], rank=2))
        settings = {"target_modules": ["o_proj"], "modules_to_save": [name]}
        expected = multiplied_out(before, tensors, 4) | {f"{module}.weight": table + 1}
        tensors[f"base_model.model.{module}.weight"] = table + 1
    folder = write_peft(tmp_path / "x", tensors, r=2, **settings)
    with pytest.warns(UserWarning, match=f"changes {module}, which were tied: they are not any more"):
        loaded = check_merged(folder, expected, tied_folder)
    assert not loaded.config.tie_word_embeddings


def test_a_tied_head_stays_tied_where_both_change(tied_folder, tmp_path):
    """`ensure_weight_tying` stores both; an embedding that is not in modules_to_save is put into the shared weight."""
    table = weights(False)["model.embed_tokens.weight"]
    tensors = peft_tensors(weights(False), modules(["o_proj"], rank=2))
    expected = multiplied_out(weights(False), tensors, 4) | {"model.embed_tokens.weight": table + 1}
    del expected["lm_head.weight"]
    shared = tensors | {f"{EMBEDDING}.weight": table + 1}
    folder = write_peft(tmp_path / "shared", shared, r=2, target_modules=["o_proj"])
    assert check_merged(folder, expected, tied_folder).config.tie_word_embeddings
    folder = write_peft(
        tmp_path / "head", tensors | {"base_model.model.lm_head.weight": table + 1}, r=2, target_modules=["o_proj"]
    )
    assert check_merged(folder, expected, tied_folder).config.tie_word_embeddings
    both = shared | {"base_model.model.lm_head.weight": table + 1}
    settings = {"modules_to_save": ["model.embed_tokens"], "ensure_weight_tying": True}
    folder = write_peft(tmp_path / "both", both, r=2, target_modules=["o_proj"], **settings)
    check_merged(folder, expected | {"lm_head.weight": table + 1}, tied_folder)


@pytest.mark.parametrize("dora", [False, True])
def test_updates_of_a_tied_embedding_and_its_head(dora, tied_folder, tmp_path):
    """`ensure_weight_tying` names the embedding, and stores the head's update, too: the same one, turned."""
    before = weights(False) | {"lm_head.weight": weights(False)["model.embed_tokens.weight"]}
    tensors = peft_tensors(before, {"model.embed_tokens": 2, "lm_head": 2}, dora)
    for one, two in ("AB", "BA"):
        tensors[f"base_model.model.lm_head.lora_{one}.weight"] = tensors[f"{EMBEDDING}.lora_embedding_{two}"].T.copy()
    settings = {"target_modules": ["model.embed_tokens"], "ensure_weight_tying": True, "use_dora": dora}
    folder = write_peft(tmp_path / "x", tensors, r=2, **settings)
    check_merged(folder, multiplied_out(before, tensors, 4), tied_folder)


@pytest.mark.parametrize("chosen", [[3, 99], {"embed_tokens": [5], "lm_head": [7, 0]}])
def test_rows_of_single_tokens(chosen, tied_folder, tmp_path):
    tensors = peft_tensors(weights(False), modules(["o_proj"], rank=2))
    expected = multiplied_out(weights(False), tensors, 4)
    rows = chosen if isinstance(chosen, dict) else {"embed_tokens": chosen}
    for name, ids in rows.items():
        module = "lm_head" if name == "lm_head" else "model.embed_tokens"
        delta = np.random.default_rng(1).normal(size=(len(ids), 36)).astype(np.float32)
        tensors[f"base_model.model.{module}.token_adapter.trainable_tokens_delta"] = delta
        expected[f"{module}.weight"] = expected[f"{module}.weight"].copy()
        expected[f"{module}.weight"][ids] = delta
    settings = {"r": 2, "target_modules": ["o_proj"], "trainable_token_indices": chosen}
    check_merged(write_peft(tmp_path / "x", tensors, **settings), expected)
    if isinstance(chosen, list):  # a tied head changes with it
        del expected["lm_head.weight"]
        assert check_merged(tmp_path / "x", expected, tied_folder).config.tie_word_embeddings
    else:
        with pytest.raises(ValueError, match=r"trainable_token_indices=.* is not computed here; merge"):
            phi3_jax.load(tied_folder, adapter=tmp_path / "x")
    write_peft(tmp_path / "y", tensors, **settings | {"trainable_token_indices": [3, 103]})
    with pytest.raises(ValueError, match="trainable_token_indices must be below the model's 103"):
        phi3_jax.load(BASE, adapter=tmp_path / "y")


def test_a_checkpoint_without_the_tensor_is_named(tmp_path):
    shutil.copytree(BASE, tmp_path / "base")
    for path in (tmp_path / "base").glob("model-*"):
        tensors = safetensors.numpy.load_file(path)
        if tensors.pop("lm_head.weight", None) is not None:
            safetensors.numpy.save_file(tensors, path)
    tensors = peft_tensors(weights(False), {"lm_head": 2})
    folder = write_peft(tmp_path / "x", tensors, target_modules=["lm_head"], r=2)
    with pytest.raises(ValueError, match=r"changes lm_head.weight, which is missing in the checkpoint"):
        phi3_jax.load(tmp_path / "base", adapter=folder)


@pytest.mark.parametrize("part", ["weight", "lora_embedding_A"])
def test_a_vocabulary_of_another_size_is_named(part, tmp_path):
    tensors = peft_tensors(weights(False), {"model.embed_tokens": 2})
    tensors[f"{EMBEDDING}.{part}"] = np.zeros((105, 36) if part == "weight" else (2, 105), np.float32)
    settings = {"target_modules": ["embed_tokens"], "r": 2}
    if part == "weight":
        settings = {"target_modules": ["o_proj"], "modules_to_save": ["embed_tokens"]}
    folder = write_peft(tmp_path / "x", tensors, **settings)
    told = (
        rf"{part} is for a vocabulary of 105, and the model's has 103: resize it with .*resize_token_embeddings\(105\)"
    )
    with pytest.raises(ValueError, match=told):
        phi3_jax.load(BASE, adapter=folder)


# -------------------------------------------------------------------------------------------------- names and dtypes


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: re.sub("(lora_[AB]|_vector)(.weight)?", r"\1.default.weight", name),
        lambda name: name.removeprefix("base_model.model."),
        lambda name: name.replace("magnitude_vector", "magnitude_vector.weight"),
        lambda name: name.replace("lora_A", "lora_A.my-own").replace("magnitude_vector", "magnitude_vector.my-own"),
    ],
)  # fmt: skip
def test_names_of_other_versions(rename, tmp_path):
    tensors = peft_tensors(weights(True), modules(("q_proj", "k_proj", "v_proj")), dora=True)
    settings = {"target_modules": ["q_proj", "k_proj", "v_proj"], "r": 3, "use_dora": True}
    folder = write_peft(tmp_path / "x", {rename(name): tensor for name, tensor in tensors.items()}, **settings)
    check_both(folder, multiplied_out(weights(True), tensors, 8 / 3))


def test_modules_to_save_of_a_whole_state_dict(tmp_path):
    tensors = peft_tensors(weights(False), modules(["o_proj"]))
    head = weights(False)["lm_head.weight"] + 1
    expected = multiplied_out(weights(False), tensors, 8 / 3) | {"lm_head.weight": head}
    stored = {"base_model.model.lm_head.modules_to_save.default.weight": head}
    stored |= {"base_model.model.lm_head.original_module.weight": head - 1}
    settings = {"target_modules": ["o_proj"], "modules_to_save": ["lm_head"], "r": 3}
    check_merged(write_peft(tmp_path / "x", tensors | stored, **settings), expected)


def test_two_adapters_in_one_file(tmp_path):
    tensors = peft_tensors(weights(False), modules(["o_proj"]))
    more = {name.replace(".weight", ".other.weight"): tensor for name, tensor in tensors.items()}
    with pytest.raises(ValueError, match=r"lora_\w.*\.weight and .*lora_\w.*\.weight are the same thing: take one"):
        load_adapter(write_peft(tmp_path / "x", tensors | more, target_modules=["o_proj"], r=3), base().config)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_other_dtypes(dtype, tmp_path):
    tensors = {name: t.astype(dtype) for name, t in peft_tensors(weights(True), modules(("up_proj", "o_proj"))).items()}
    settings = {"target_modules": ["up_proj", "o_proj"], "r": 3, "rank_pattern": None, "alpha_pattern": {"o_proj": 5}}
    factors = {name: (5 if "o_proj" in name else 8) / 3 for name in modules(("up_proj", "o_proj"))}
    check_both(write_peft(tmp_path / "x", tensors, **settings), multiplied_out(weights(True), tensors, factors))

"""Training that goes on from an adapter: whose settings count, what is told, what is refused, and whole runs."""

import dataclasses
import json
import shutil
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapters import peft_tensors, random_adapter, write_peft
from training_batches import PARTS, stack
from training_runs import tensors, write_run

import phi3_jax
from phi3_jax.adapters import LoraConfig
from phi3_jax.checkpoint import load_adapter, save_adapter
from phi3_jax.train.adapters import notes, reference_adapter, with_init_adapter
from phi3_jax.train.run import loop
from phi3_jax.train.run.loop import train
from phi3_jax.train.run.observer import Observer
from phi3_jax.train.run.records.metrics import read
from phi3_jax.train.settings import Settings, adapter_config, change
from phi3_jax.train.step import make_train_step, start

pytestmark = pytest.mark.usefixtures("quick_compilation")

MINE = LoraConfig(3, 7, ("o_proj", "gate_up_proj", "lm_head"), rslora=True, ranks=(("o_proj", 1),))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dpo_reference": "base"}, "dpo_reference=base: only method=dpo compares with a reference"),
        ({"dpo_reference": ""}, "dpo_reference: must not be empty"),
        ({"dpo_reference": "x/y", "method": "dpo", "pack": False, "train": "all"}, "dpo_reference=x/y: with train=all"),
        (
            {"rank_pattern": ("o_proj",)},
            "rank_pattern=o_proj: give target:number, once for each target and with a whole",
        ),
        ({"rank_pattern": ("o_proj:0",)}, "rank_pattern=o_proj:0: give target:number"),
        ({"rank_pattern": ("o_proj:2", "o_proj:3")}, "rank_pattern=o_proj:3: give target:number, once for each"),
        (
            {"rank_pattern": ("layers.3.mlp.down_proj:4",)},
            "layers share one number for each target; give target:number",
        ),
        ({"alpha_pattern": ("lm_head:4",)}, "^alpha_pattern=lm_head:4.0: lm_head is none of lora_targets=qkv_proj,"),
        ({"lora_targets": ("q_proj",)}, "there is no 'q_proj', only qkv_proj, .*, embed_tokens, lm_head"),
        ({"lora_targets": ("embed_tokens",), "dora": True}, "DoRA of the embedding is not trained here: leave"),
        (
            {"lora_tied": True},
            "^lora_tied=true: needs embed_tokens in lora_targets, whose update the head gets, and not lm_head",
        ),
    ],
)
def test_settings_that_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Settings(**changes)


# ------------------------------------------------------------------------------------------------ the adapter's own


def written(folder: Path, config: phi3_jax.Phi3Config, lora: LoraConfig, base: str = "") -> Path:
    save_adapter(folder, random_adapter(config, lora), lora, config, base)
    return folder


@pytest.mark.parametrize(
    "lora",
    [
        LoraConfig(3, 7, ("o_proj", "down_proj"), ranks=(("down_proj", 1),), alphas=(("o_proj", 2.5),), dropout=0.25),
        LoraConfig(2, 0.5, ("embed_tokens", "lm_head"), rslora=True),
        LoraConfig(2, 4, dora=True),
    ],
)
def test_settings_are_the_adapters(tiny, lora, tmp_path):
    """What is at its default comes from the file; what is not has to agree. Dropout is the run's own."""
    s = Settings(init_adapter=str(written(tmp_path / "x", tiny.config, lora)))
    found, adapter = with_init_adapter(s, tiny)
    assert dataclasses.replace(adapter_config(found), dropout=lora.dropout) == lora
    assert found.lora_dropout == 0
    assert dataclasses.replace(found, **{name: getattr(s, name) for name in changed(found, s)}) == s
    jax.tree.map(np.testing.assert_array_equal, adapter, load_adapter(tmp_path / "x", tiny.config)[1])
    same = change(s, [f"{name}={','.join(map(str, reversed(value)))}" if isinstance(value, tuple) else f"{name}={value}"
                      for name, value in changed(found, s).items()])  # fmt: skip
    assert with_init_adapter(dataclasses.replace(same, lora_dropout=0.5), tiny)[0].lora_dropout == 0.5
    with pytest.raises(
        ValueError, match=rf"lora_rank=5: init_adapter={tmp_path}/x has {lora.rank}; leave lora_rank out"
    ):
        with_init_adapter(dataclasses.replace(s, lora_rank=5), tiny)
    with pytest.raises(
        ValueError, match=r"lora_targets=qkv_proj: init_adapter=.* has .*; leave lora_targets out, or train"
    ):
        with_init_adapter(dataclasses.replace(s, lora_targets=("qkv_proj",)), tiny)


def test_what_cannot_be_attached_is_refused_by_the_settings_name(tiny, tmp_path):
    head = "base_model.model.lm_head"
    shape = {"lm_head.weight": np.zeros((97, 24))}
    tensors = peft_tensors(shape, {"lm_head": 2}) | {f"{head}.base_layer.weight": np.zeros((97, 24), np.float32)}
    folder = str(write_peft(tmp_path / "x", tensors, target_modules=["lm_head"], r=2))
    with pytest.raises(ValueError, match=r"init_adapter: .* changes lm_head, which cannot be attached; load the model"):
        with_init_adapter(Settings(init_adapter=folder), tiny)
    s = Settings(method="dpo", pack=False, dpo_reference=folder)
    with pytest.raises(ValueError, match=r"dpo_reference: .* changes lm_head, which cannot be attached"):
        reference_adapter(s, tiny)


def test_a_run_tells_what_it_goes_on_from_and_that_it_unties(tiny, tmp_path):
    tied = dataclasses.replace(tiny.config, tie_word_embeddings=True)
    for targets, told in [
        (("embed_tokens",), "embed_tokens of"),
        (("lm_head", "embed_tokens"), "embed_tokens and lm_head"),
    ]:
        (note,) = notes(Settings(lora_targets=targets), tied)
        assert note.startswith(told)
        assert not list(notes(Settings(lora_targets=targets), tiny.config))
    for nothing in (Settings(lora_targets=("embed_tokens",), lora_tied=True), Settings()):
        assert not list(notes(nothing, tied))
    folder = written(tmp_path / "x", tiny.config, MINE)
    settings, _ = with_init_adapter(Settings(init_adapter=str(folder)), tiny)
    told = (
        "lora_rank=3, lora_alpha=7.0, lora_targets=o_proj,gate_up_proj,lm_head, lora_rslora=true, rank_pattern=o_proj:1"
    )
    assert list(notes(settings, tiny.config)) == [f"goes on from {folder}: {told}"]


def changed(settings, before):
    """The fields that differ."""
    fields = dataclasses.asdict(settings)
    return {name: value for name, value in fields.items() if value != getattr(before, name)}


@pytest.mark.parametrize(
    ("ranks", "options", "pads"),
    [
        ({"q_proj": 2, "v_proj": 2}, {}, "qkv_proj"),
        ({"o_proj": 2}, {"alpha_pattern": {"layers.0.*": 3}}, "o_proj"),
        pytest.param(
            {"o_proj": 2},
            {"rank_pattern": {"layers.1.*": 4}, "alpha_pattern": {"layers.1.*": 16}},
            "",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_what_learns_otherwise_than_in_peft_is_told(tiny, ranks, options, pads, tmp_path):
    config, own = tiny.config, options.get("rank_pattern", {}).get("layers.1.*")
    shapes = {"q_proj": (48, 24), "v_proj": (16, 24), "o_proj": (24, 48)}
    names = {f"model.layers.{i}.self_attn.{name}": shape for name, shape in shapes.items() for i in range(3)}
    modules = {f"model.layers.{i}.self_attn.{name}": own or rank if i == 1 else rank for name, rank in ranks.items()
               for i in range(3)}  # fmt: skip
    zeros = {f"{name}.weight": np.zeros(shape) for name, shape in names.items()}
    folder = write_peft(tmp_path / "x", peft_tensors(zeros, modules), target_modules=list(ranks), r=2, **options)
    s = Settings(init_adapter=str(folder), batch_size=2)
    if pads:
        with pytest.warns(UserWarning, match=f"have become one of {pads} each, which learns more freely"):
            with_init_adapter(s, tiny)
        return
    s, adapter = with_init_adapter(s, tiny)  # a layer's smaller rank is zeros that stay zeros
    state, frozen = start(s, config, tiny.params, adapter)
    before = jax.tree.map(jnp.copy, state.trainable)
    state, _ = make_train_step(s, config)(state, frozen, stack(PARTS[1]))
    ours, old = (tree["layers"]["self_attn"]["o_proj"] for tree in (state.trainable, before))
    assert ours["a"].shape == (3, 4, 48)
    assert not np.asarray(ours["a"][0, 2:]).any()
    assert not np.asarray(ours["b"][2, :, 2:]).any()
    assert all(np.abs(ours[part] - old[part]).max() > 1e-6 for part in "ab")


@pytest.mark.slow
# ----------------------------------------------------------------------------------------------------------------- runs


def test_a_run_goes_on_from_an_adapter(tmp_path):
    """With its loss, and as an ordinary adapter at the end; the adapter may not change until then."""
    s = write_run(tmp_path, steps=2, eval_every=2, lora_targets=("embed_tokens", "o_proj"), rank_pattern=("o_proj:1",))
    train(s)
    first = tmp_path / "run" / "adapter"
    begun = read(tmp_path / "run" / "metrics.jsonl")
    defaults = Settings()
    untold = {name: getattr(defaults, name) for name in ("lora_rank", "lora_alpha", "lora_targets", "rank_pattern")}
    on = dataclasses.replace(s, init_adapter=str(first), output=str(tmp_path / "on"), **untold)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(on)
    gone_on = read(tmp_path / "on" / "metrics.jsonl")
    assert gone_on[0]["eval_loss"] == pytest.approx(begun[-1]["eval_loss"], abs=1e-6)
    assert gone_on[-1]["eval_loss"] < begun[-1]["eval_loss"] < begun[0]["eval_loss"]
    theirs, ours = (
        json.loads((folder / "adapter_config.json").read_text()) for folder in (first, tmp_path / "on/adapter")
    )
    assert {**ours, "target_modules": sorted(ours["target_modules"])} == theirs
    assert ours["rank_pattern"] == {"o_proj": 1}
    assert {name: t.shape for name, t in tensors(first).items()} == {
        name: t.shape for name, t in tensors(tmp_path / "on" / "adapter").items()
    }
    moved = shutil.copytree(first, tmp_path / "moved")
    settings = json.loads((moved / "adapter_config.json").read_text()) | {"base_model_name_or_path": "someone/else"}
    (moved / "adapter_config.json").write_text(json.dumps(settings))
    with (
        pytest.warns(
            UserWarning, match=r"init_adapter=.*moved: was made for someone/else, as its file says, and not for"
        ),
        pytest.raises(ValueError, match=r"lora_rank=7: init_adapter=.*moved has 3"),
    ):
        train(dataclasses.replace(on, init_adapter=str(moved), output=str(tmp_path / "x"), lora_rank=7))
    # What the adapter says itself may be told as well, or not, also of a run that began otherwise.
    for changes in ({"lora_rank": 3, "rank_pattern": ("o_proj:1",)}, {}):
        assert train(dataclasses.replace(on, **changes)).step == 2
    with pytest.raises(ValueError, match=r"not what they were when the run there began are init_adapter:"):
        train(dataclasses.replace(on, init_adapter=""))
    shutil.rmtree(first)
    with pytest.raises(FileNotFoundError, match=r"init_adapter: .*adapter_config.json: the file is missing"):
        train(on)
    shutil.move(moved, first)
    with (
        pytest.warns(UserWarning, match="was made for someone/else"),
        pytest.raises(ValueError, match=r"not what they were when the run there began are init_adapter"),
    ):
        train(on)


@pytest.mark.slow
def test_a_run_that_went_on_resumes_where_its_adapter_has_another_name(tmp_path):
    s = write_run(tmp_path, steps=2, eval_file="", init_adapter=str(tmp_path / "mine"))
    written(tmp_path / "mine", phi3_jax.load(s.checkpoint).config, LoraConfig(3, 32), s.checkpoint)
    train(s, interrupt=lambda: True)
    (tmp_path / "mine").rename(tmp_path / "renamed")
    resumed = dataclasses.replace(s, init_adapter=str(tmp_path / "renamed"))
    assert train(resumed).step == 2
    whole = dataclasses.replace(resumed, output=str(tmp_path / "whole"))
    train(whole)
    ours, theirs = (tensors(Path(each.output) / "adapter") for each in (s, whole))
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)


def test_all_weights_begin_with_the_adapter_merged(tmp_path):
    s = write_run(tmp_path, train="all", init_adapter=str(tmp_path / "mine"))
    written(tmp_path / "mine", phi3_jax.load(s.checkpoint).config, MINE, s.checkpoint)
    loaded = loop._load(s, Observer())
    assert with_init_adapter(s, loaded) == (s, None)
    expected = phi3_jax.load(s.checkpoint, "float32", layout="rows", adapter=tmp_path / "mine").params
    jax.tree.map(np.testing.assert_array_equal, loaded.params, expected)
    without = loop._load(dataclasses.replace(s, init_adapter=""), Observer())
    assert np.abs(loaded.params["lm_head"]["weight"] - without.params["lm_head"]["weight"]).max() > 0.1

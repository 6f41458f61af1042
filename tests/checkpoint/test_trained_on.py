"""Which integers an adapter was trained on: written beside it, and a warning where it is put on other weights."""

import dataclasses
import json
import warnings
from pathlib import Path

import flax.traverse_util
import jax
import jax.numpy as jnp
import pytest
from adapters import random_adapter
from training_runs import write_run

import phi3_jax
from phi3_jax.adapters import LoraConfig
from phi3_jax.checkpoint import kind_of_weights, load_adapter, save_adapter
from phi3_jax.kernels import why_unavailable
from phi3_jax.quantization import quantized_shapes
from phi3_jax.train.adapters import with_init_adapter
from phi3_jax.train.run.loop import train
from phi3_jax.train.settings import Settings

pytestmark = pytest.mark.usefixtures("quick_compilation")

LORA = LoraConfig(2, 3, ("o_proj",))


def warned(path: Path, **options) -> list[str]:
    """What `load` warns of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        phi3_jax.load(path, **options)
    return [str(each.message) for each in caught]


def integers(params, policy: str, without: str = "none"):
    """The parameters with integers by a policy, all zeros, which takes no rounding."""
    leaves = {
        path: leaf
        for path, leaf in flax.traverse_util.flatten_dict(params, sep="/").items()
        if not path.startswith(without)
    }
    like = quantized_shapes(policy, leaves) if policy else leaves
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), like)
    return flax.traverse_util.unflatten_dict(zeros, sep="/")


@pytest.fixture(scope="module")
def folders(tiny, tmp_path_factory) -> Path:
    """The tiny model as "floats", and with integers."""
    place = tmp_path_factory.mktemp("models")
    phi3_jax.save(tiny, place / "floats")
    for policy in ("int4", "int8"):
        phi3_jax.save(dataclasses.replace(tiny, params=integers(tiny.params, policy)), place / policy)
    return place


def adapter(folder: Path, config: phi3_jax.Phi3Config, written: str | None) -> Path:
    save_adapter(folder, random_adapter(config, LORA), LORA, config, "some")
    if written is not None:
        (folder / "trained_on.json").write_text(written)
    return folder


@pytest.mark.parametrize(
    "policy", ["int4", "int8", "int4-mixed", "int4-g64-asymmetric", "int8-g128", "int4-g32-asymmetric", ""]
)
@pytest.mark.parametrize("without", ["none", "lm_head"])
def test_weights_are_known_by_their_policy(policy, without, tiny):
    params = integers(tiny.params, policy, without)
    assert kind_of_weights(params) == policy
    if policy:
        mixture = params | {"layers": params["layers"] | {"mlp": tiny.params["layers"]["mlp"]}}
        assert kind_of_weights(mixture) == "stored"


@pytest.mark.parametrize("theirs", ["int4", "int8-g64", "stored"])
def test_other_weights_are_told_with_the_remedy(theirs, folders, tiny, tmp_path):
    path = adapter(tmp_path / "x", tiny.config, json.dumps({"weights": theirs}))
    for kind, here in {
        "floats": "is merged into floats",
        "int4": "goes onto int4 weights",
        "int8": "goes onto int8 weights",
    }.items():
        found = warned(folders / kind, adapter=path)
        if kind == theirs:
            assert found == []
            continue
        (message,) = found
        assert message.startswith(f"{path}: was trained on {theirs} weights (trained_on.json), but here it {here}")
        assert f"--quantize {theirs} (quantize='{theirs}')" in message
    with pytest.warns(UserWarning, match=f"was trained on {theirs} weights"):
        with_init_adapter(Settings(init_adapter=str(path)), tiny)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_adapter(path, tiny.config)  # on nothing yet


@pytest.mark.slow
def test_rounding_the_sum_is_told(folders, tiny, tmp_path):
    """Where the integers are of the adapter's own policy, too."""
    path = adapter(tmp_path / "x", tiny.config, '{"weights": "int4"}')
    options = {"adapter": path, "quantize": "int4", "layout": "rows"}
    assert len(warned(folders / "floats", **options, merge_adapter=True)) == 1
    assert warned(folders / "floats", **options) == []


@pytest.mark.skipif(why_unavailable() is not None, reason=f"no kernels: {why_unavailable()}")
def test_packed_weights(folders, tiny, tmp_path):
    path = adapter(tmp_path / "x", tiny.config, '{"weights": "int4"}')
    assert warned(folders / "int4", adapter=path, layout="packed") == []
    assert len(warned(folders / "int8", adapter=path, layout="packed")) == 1
    assert kind_of_weights(phi3_jax.load(folders / "floats", "bfloat16", layout="packed").params) == ""


@pytest.mark.parametrize(
    "written",
    [None, "", "{", "[]", "3", '{"weights": 4}', '{"weights": ["int4"]}', '{"weights": "\\u001b[2J"}', "{}",
     '{"weights": null}', "[" * 4000, '{"weights": "int4"}' + " " * 5000],
)  # fmt: skip
def test_a_file_that_is_missing_or_damaged_tells_nothing(written, folders, tiny, tmp_path):
    path = adapter(tmp_path / "x", tiny.config, written)
    assert warned(folders / "int8", adapter=path) == []
    (path / "trained_on.json").unlink(missing_ok=True)
    (path / "trained_on.json").mkdir()
    assert warned(folders / "int8", adapter=path) == []


@pytest.mark.slow
@pytest.mark.parametrize("of", ["setting", "folder"])
def test_a_run_writes_it(of, tmp_path):
    """Its adapter goes on on these weights without a warning, and with one on others."""
    settings = write_run(tmp_path, steps=1, eval_file="", accumulation=1)
    base, exported = phi3_jax.load(settings.checkpoint), tmp_path / "run" / "adapter"
    phi3_jax.save(dataclasses.replace(base, params=integers(base.params, "int8")), tmp_path / "int8")
    if of == "setting":
        settings = dataclasses.replace(settings, quantize="int8-g32")
    else:
        settings = dataclasses.replace(settings, checkpoint=str(tmp_path / "int8"))
    train(settings)
    assert json.loads((exported / "trained_on.json").read_text()) == {"weights": "int8"}
    assert warned(tmp_path / "int8", adapter=exported) == []
    assert len(warned(tmp_path / "model", adapter=exported)) == 1
    if of == "folder":
        floats = {"checkpoint": str(tmp_path / "model"), "output": str(tmp_path / "x")}
        train(dataclasses.replace(settings, **floats))
        assert not (tmp_path / "x" / "adapter" / "trained_on.json").exists()

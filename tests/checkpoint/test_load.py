"""The arguments of `load`: dtype, layout, revision, device."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from checkpoints.adapters import random_adapter
from hub import serve

import phi3_jax
from phi3_jax.adapters import LoraConfig
from phi3_jax.checkpoint import auto_dtype, fastest_layout, hub, placement, safetensors_files, save_adapter
from phi3_jax.kernels import PackedTensor, QuantizedTensor
from phi3_jax.kernels.native import build

pytestmark = pytest.mark.usefixtures("quick_compilation")

needs_kernels = pytest.mark.skipif(build.why_unavailable() is not None, reason=f"no kernels: {build.why_unavailable()}")


def down_proj(model):
    return model.params["layers"]["mlp"]["down_proj"]["weight"]


@needs_kernels
def test_the_defaults_are_what_is_right_and_fast_on_the_cpu(tiny, tiny_folder):
    """Floats stay exact, and what the kernels read is packed."""
    floats = down_proj(phi3_jax.load(tiny_folder))
    assert (type(floats), floats.dtype) == (type(jnp.zeros(1)), np.float32)
    np.testing.assert_array_equal(floats, down_proj(tiny))
    for how, kind in (({"dtype": jnp.bfloat16}, "bfloat16"), ({"quantize": "int8"}, "int8")):
        packed, rows = (down_proj(phi3_jax.load(tiny_folder, **how, layout=layout)) for layout in ("auto", "rows"))
        assert isinstance(packed, PackedTensor)
        assert packed.kind == kind
        expected = rows.dequantize() if isinstance(rows, QuantizedTensor) else rows.astype(jnp.float32)
        np.testing.assert_array_equal(packed.dequantize(jnp.int32(2)), expected[2])
    with pytest.raises(ValueError, match="layout='stacks' is not"):
        phi3_jax.load(tiny_folder, layout="stacks")


@pytest.mark.parametrize("stored", ["bfloat16", "float32", "float8_e4m3fn"])
def test_an_accelerator_gets_bfloat16(monkeypatch, tiny_folder, stored):
    dtype = np.dtype(getattr(jnp, stored))
    tensors = safetensors.numpy.load_file(tiny_folder / "model.safetensors")
    stored_as = {name: each.astype(dtype) if each.ndim == 2 else each for name, each in tensors.items()}
    header, data = {}, b""
    kinds = {"bfloat16": "BF16", "float16": "F16", "float32": "F32", "float8_e4m3fn": "F8_E4M3"}
    for name, each in stored_as.items():
        span = [len(data), len(data) + each.nbytes]
        header[name] = {"dtype": kinds[each.dtype.name], "shape": each.shape, "data_offsets": span}
        data += each.tobytes()
    text = json.dumps(header).encode()
    (tiny_folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    assert phi3_jax.load(tiny_folder).params["norm"]["weight"].dtype == np.float32
    monkeypatch.setattr(placement, "platform", lambda device=None: "gpu")
    loaded = phi3_jax.load(tiny_folder)  # the norms are float32 in each file
    assert {leaf.dtype.name for leaf in jax.tree.leaves(loaded.params)} == {"bfloat16"}
    assert (auto_dtype(), fastest_layout()) == ("bfloat16", "layers")  # for a GGUF file, or random weights


def test_a_dtype_that_a_quantised_folder_does_not_have_is_refused(tiny_folder, tmp_path):
    phi3_jax.save(phi3_jax.load(tiny_folder, jnp.bfloat16, quantize="int8", layout="rows"), tmp_path / "q")
    assert phi3_jax.load(tmp_path / "q").params["norm"]["weight"].dtype == jnp.bfloat16
    phi3_jax.load(tmp_path / "q", "bfloat16")
    for dtype in ("float32", np.float16):
        with pytest.raises(ValueError, match=r"q: the weights are bfloat16, int8, and are taken as they are, not conv"):
            phi3_jax.load(tmp_path / "q", dtype)


@needs_kernels
def test_packed_floats_are_saved_and_computed_like_any_others(tiny_folder, tmp_path):
    """What was loaded for speed is still a checkpoint for everybody, and runs without a cache, too."""
    packed, rows = (phi3_jax.load(tiny_folder, "bfloat16", layout=layout) for layout in ("auto", "rows"))
    for name, model in (("packed", packed), ("rows", rows)):
        phi3_jax.save(model, tmp_path / name)
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "packed" / file).read_bytes() == (tmp_path / "rows" / file).read_bytes()
    tokens = jnp.asarray([[5, 1, 7, 20, 33]])
    got, expected = (phi3_jax.Phi3(m.config).apply({"params": m.params}, tokens) for m in (packed, rows))
    assert float(jnp.abs(got - expected).max()) < 0.05 * float(jnp.abs(expected).max())
    with pytest.raises(ValueError, match="packed weights cannot be sliced, as training does: load them with layout="):
        phi3_jax.Phi3(packed.config, walk="slice").apply({"params": packed.params}, tokens)


@pytest.mark.parametrize("device", ["cpu", ["cpu"], 0])
def test_devices_are_devices(tiny_folder, device):
    with pytest.raises(ValueError, match=r"is no jax\.Device, no Sharding, and no function that gives one of these"):
        phi3_jax.load(tiny_folder, device=device)


def test_revisions_are_for_hub_ids(tiny_folder, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with serve("models/some/model", tiny_folder, tmp_path / "home", monkeypatch) as asked_hub:
        for arguments in (
            {"path": "some/model", "revision": "v2"},
            {"path": "some/model@refs/pr/3"},
            {"path": "some/model@v2", "revision": "v2"},
            {"path": "some/model"},
        ):
            phi3_jax.load(**arguments)
        info = [path.rpartition("/some/model/")[2] for path in asked_hub.asked if re.search("/revision/[^/]*$", path)]
        assert info == [f"revision/{name}" for name in ("v2", "refs%2Fpr%2F3", "v2", "main")]
        with pytest.raises(FileNotFoundError, match="no such model, or no revision v7 of it"):
            phi3_jax.load("some/model@v7")
    shutil.copytree(tiny_folder, "some/local")
    for arguments, message in (
        ({"path": tiny_folder, "revision": "v2"}, r"revision='v2' is for hub ids, and .*tiny is none: leave it out"),
        ({"path": "some/local", "revision": "v2"}, "revision='v2' is for hub ids, and some/local is none"),
        ({"path": "demo", "revision": "v2"}, "revision='v2' is for hub ids, and demo is none"),
        ({"path": "some/local@v2"}, "some/local lies on this machine, and revisions are for hub ids: leave @v2 out"),
        ({"path": tiny_folder, "adapter": "some/local@v2"}, "some/local lies on this machine"),
        ({"path": "some/model@v1", "revision": "v2"}, "some/model@v1: revision='v2' is another one"),
    ):
        with pytest.raises(ValueError, match=message):
            phi3_jax.load(**arguments)
    shutil.copytree(tiny_folder, "some/odd@name")  # a folder that is there is meant
    phi3_jax.load("some/odd@name")
    assert not hub.is_hub_id("some/model@")
    assert not hub.is_hub_id("some/model@a@b")


_DEVICES = """
import sys, jax, jax.numpy as jnp, numpy as np, phi3_jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P, SingleDeviceSharding
jax.config.update("jax_disable_most_optimizations", True)
folder, devices = sys.argv[1], jax.devices()
assert len(devices) == 8
mesh = Mesh(np.array(devices), ("x",))

def by_leaf(path, shape):
    axis = next((i for i, size in enumerate(shape) if size % 8 == 0), None)
    return NamedSharding(mesh, P(*[None] * axis, "x") if axis is not None else P())

tokens = jnp.asarray([[5, 1, 7, 20, 33]])
def logits(model):
    run = jax.jit(lambda params: phi3_jax.Phi3(model.config).apply({"params": params}, tokens))
    return np.asarray(run(model.params))

for quantize in (None, "int8"):
    plain = phi3_jax.load(folder, quantize=quantize, layout="rows")
    expected = logits(plain)
    places = (devices[3], SingleDeviceSharding(devices[5]), NamedSharding(mesh, P()), by_leaf)
    for device in places[3 if quantize else 0 :]:
        model = phi3_jax.load(folder, quantize=quantize, layout="rows", device=device)
        for path, leaf in jax.tree_util.tree_leaves_with_path(model.params):
            name = jax.tree_util.keystr(path[:4], simple=True, separator="/")
            wanted = device(name, leaf.shape) if device is by_leaf else device
            assert leaf.sharding.device_set == (wanted.device_set if hasattr(wanted, "device_set") else {wanted})
            if device is by_leaf:
                assert leaf.sharding.is_equivalent_to(wanted, leaf.ndim), (name, leaf.sharding)
        np.testing.assert_allclose(logits(model), expected, rtol=1e-4, atol=1e-4)
bytes_here = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(model.params))
assert bytes_here < 0.3 * sum(leaf.nbytes for leaf in jax.tree.leaves(model.params))
one = phi3_jax.load(folder, device=devices[2])
said = phi3_jax.infer.generate(one, [[5, 1, 7]], 4)[0].token_ids
assert said == phi3_jax.infer.generate(phi3_jax.load(folder), [[5, 1, 7]], 4)[0].token_ids
many = phi3_jax.load(folder, quantize="int8", device=by_leaf)
assert type(many.params["layers"]["mlp"]["down_proj"]["weight"]).__name__ == "QuantizedTensor"
try:
    phi3_jax.load(folder, device=NamedSharding(mesh, P("x")))
except ValueError as error:
    print(str(error).splitlines()[0])
"""


@pytest.mark.slow
def test_parameters_are_put_where_they_are_wanted(tiny, tmp_path):
    config = dataclasses.replace(tiny.config, vocab_size=96, long_rope=None)
    phi3_jax.save(phi3_jax.Checkpoint(config, phi3_jax.random_params(config), None, tiny.generation), tmp_path / "m")
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", _DEVICES, str(tmp_path / "m")]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **flags})
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()[-1]  # jax 0.12 prints a place in the code before it
    assert said.startswith("layers/input_layernorm/weight [3, 24] cannot be put to NamedSharding("), done.stdout


def test_a_device_is_a_place_or_a_function_of_the_parameter(tiny_folder):
    """One of a single CPU is as none; what the function gets are paths and shapes."""
    (device,) = jax.devices("cpu")[:1]
    seen = {}

    def place(path, shape):
        seen[path] = shape
        return jax.sharding.SingleDeviceSharding(device)

    loaded = phi3_jax.load(tiny_folder, device=place)
    assert seen["layers/mlp/down_proj/weight"] == down_proj(loaded).shape
    assert len(seen) == len(jax.tree.leaves(loaded.params))
    assert down_proj(loaded).committed
    assert fastest_layout(device) == fastest_layout()
    assert fastest_layout(place) == "rows"
    assert down_proj(phi3_jax.load(tiny_folder, device=device)).devices() == {device}


@pytest.mark.parametrize("replaced", ["tiny", "adapter"])
def test_a_folder_that_is_replaced_while_it_is_read_is_refused(tiny, tiny_folder, tmp_path, monkeypatch, replaced):
    """A training that goes on writes an adapter in the place of the one that is being loaded."""
    lora = LoraConfig(rank=2, alpha=3)
    for name in ("adapter", "next"):
        save_adapter(tmp_path / name, random_adapter(tiny.config, lora), lora, tiny.config, "base")
    shutil.copytree(tiny_folder, tmp_path / "next_tiny")
    load_file = safetensors_files.read_folder

    def replace(folder):
        new = tmp_path / ("next" if replaced == "adapter" else "next_tiny")
        (tmp_path / replaced).rename(tmp_path / "old")
        new.rename(tmp_path / replaced)
        return load_file(folder)

    phi3_jax.load(tiny_folder, adapter=tmp_path / "adapter")
    monkeypatch.setattr(safetensors_files, "read_folder", replace)
    with pytest.raises(ValueError, match=rf"{replaced}\b.*: replaced while it was read, .*; load it again$"):
        phi3_jax.load(tiny_folder, adapter=tmp_path / "adapter")

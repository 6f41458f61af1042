"""Loading in a process that computes on a GPU: what is loaded, and what the host holds and starts meanwhile."""

import functools
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import phi3_jax
from phi3_jax.checkpoint import assemble, placement, quantized_files
from phi3_jax.infer.benchmark.model import random_checkpoint
from phi3_jax.infer.engine.buckets import own_cache_dtype
from phi3_jax.kernels import PerLayer, report, status
from phi3_jax.kernels.linear.per_layer import stack_layers
from phi3_jax.kernels.native import build

MATRIX = 2 * 1024 * 512  # weights of gate_up_proj in one layer of `large`

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture
def on_gpu(monkeypatch):
    """A GPU's process: where it computes, and nobody may ask for the CPU kernels, which starts a compiler."""

    def never(*arguments):
        raise AssertionError("the compiler of the CPU kernels was asked for")

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    for module in (placement, report, build):
        monkeypatch.setattr(module, "why_unavailable", never)
    monkeypatch.setattr(build, "library", never)


@functools.partial(jax.jit, static_argnums=0)
def hidden(config, params):
    """What goes into the output head."""
    return phi3_jax.Phi3(config).apply({"params": params}, jnp.asarray([[5, 1, 7, 20, 33]]), method="hidden")[0]


@pytest.mark.parametrize("source", ["floats", "integers"])
def test_a_gpu_gets_bfloat16_in_buffers_per_layer(on_gpu, monkeypatch, tiny_folder, int4_folder, tmp_path, source):
    """With integers, too, it computes in bfloat16, which no file knows of."""
    folder = tiny_folder if source == "floats" else int4_folder
    loaded = [phi3_jax.load(folder)]
    loaded += [phi3_jax.load(tiny_folder, quantize="int4")] if source == "integers" else []
    for model in loaded:
        table = model.params["embed_tokens"]["weight"]
        assert table.dtype == jnp.bfloat16
        assert isinstance(model.params["layers"]["mlp"]["down_proj"]["weight"], PerLayer)
        assert own_cache_dtype(model) == jnp.bfloat16
        assert status(model.params).keys() == {"linear", "attention"}
        assert hidden.eval_shape(model.config, model.params).dtype == jnp.bfloat16
    if source == "integers":
        wide = phi3_jax.load(tiny_folder, "float32", quantize="int4")
        assert wide.params["embed_tokens"]["weight"].dtype == jnp.float32
        phi3_jax.save(loaded[0], tmp_path / "again")
        for name in ("config.json", quantized_files.FILE):
            assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()
    monkeypatch.undo()
    there = phi3_jax.load(folder, layout="rows")
    close = [np.asarray(hidden(each.config, each.params), np.float32) for each in (loaded[0], there)]
    assert there.params["embed_tokens"]["weight"].dtype == jnp.float32
    np.testing.assert_allclose(*close, atol=0.1 * np.abs(close[1]).max())
    if source == "integers":  # the same integers
        ours = jax.tree.leaves(stack_layers(loaded[0].params))
        jax.tree.map(np.testing.assert_array_equal, ours, jax.tree.leaves(there.params))


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A folder of a model of 17.8 million weights, those of gate_up_proj in stacks of 7 times a million, twice."""
    config = phi3_jax.Phi3Config(
        vocab_size=1000,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=7,
        num_attention_heads=8,
        num_key_value_heads=8,
        head_dim=64,
        max_position_embeddings=64,
        rope_theta=1e4,
    )
    folder = tmp_path_factory.mktemp("large")
    for name, policy in (("floats", None), ("int8", "int8")):
        phi3_jax.save(random_checkpoint(config, "bfloat16", policy), folder / name)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "layer"),  # and the bytes of a layer of gate_up_proj
    [
        ({"dtype": "bfloat16"}, 2 * MATRIX),
        ({"dtype": "float32"}, 4 * MATRIX),
        ({"dtype": "bfloat16", "quantize": "int8"}, 17 * MATRIX // 16),
        ({"path": "int8"}, 0),  # mapped
    ],
)
def test_the_host_holds_one_tensor_at_a_time(large, monkeypatch, how, layer):
    """What NumPy allocates at most, where what is put somewhere leaves the host: one stack, or two layers of one."""
    put: list[int] = []

    def put_function(device, path):
        if not put:  # what was read of the settings does not count
            tracemalloc.reset_peak()

        def away(array):
            put.append(array.nbytes)
            return jax.ShapeDtypeStruct(array.shape, array.dtype)

        return away

    monkeypatch.setattr(assemble, "put_function", put_function)
    monkeypatch.setattr(quantized_files, "put_function", put_function)
    how = dict(how)
    path = large / how.pop("path", "floats")
    for layout, count in (("layers", 2), ("rows", 7)):
        phi3_jax.load(path, layout=layout, **how)  # what compiling takes does not count
        put.clear()
        tracemalloc.start()
        try:
            phi3_jax.load(path, layout=layout, **how)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert count * layer * 0.5 <= peak < count * layer + 1e6
        assert sum(put) > 8 * layer

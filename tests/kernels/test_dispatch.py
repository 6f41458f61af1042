"""Which kernel is traced, and that no process looks for the kernels of a platform that it does not compute on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import phi3_jax
from phi3_jax import kernels
from phi3_jax.checkpoint import fastest_layout, placement
from phi3_jax.kernels import QuantizedTensor, attention, linear, report, split_layers, status
from phi3_jax.kernels.cuda import build as cuda
from phi3_jax.kernels.dispatch import by_platform
from phi3_jax.kernels.native import build, compiler
from phi3_jax.model import KVCache, Phi3
from phi3_jax.quantization import quantize_params

X = jnp.arange(3.0)


def double(x):
    return 2 * x


def fails(*args, **kwargs):
    raise AssertionError("this must not be called")


@pytest.fixture(params=["gpu", "tpu"])
def elsewhere(request, monkeypatch):
    """A process that seems to compute on an accelerator; whoever looks for the CPU kernels fails."""
    monkeypatch.setattr(jax, "default_backend", lambda: request.param)
    for module in (linear, attention, build, placement, kernels, report):
        monkeypatch.setattr(module, "why_unavailable", fails)
    for name in ("library", "_load_once", "_build"):
        monkeypatch.setattr(build, name, fails)
    monkeypatch.setattr(report.cuda, "_load_once", lambda: "this is a test")
    for name in ("find", "compile_library", "compiler_key"):
        monkeypatch.setattr(compiler, name, fails)
    return request.param


def test_the_kernel_of_this_platform_is_taken_and_no_other_is_traced():
    np.testing.assert_array_equal(jax.jit(by_platform(lambda x: 3 * x, cpu=double, cuda=fails, tpu=fails))(X), 2 * X)


def test_a_kernel_of_another_platform_is_not_traced(elsewhere):
    known = {"cpu": fails, "cuda": fails, "tpu": fails}
    del known[{"gpu": "cuda", "tpu": "tpu"}[elsewhere]]
    assert by_platform(double, **known) is double
    np.testing.assert_array_equal(jax.jit(by_platform(double, **known))(X), 2 * X)


def test_a_kernel_is_only_in_programs_for_its_platform(elsewhere):
    """The programs here are compiled for the CPU, whatever `default_backend` says: they get the reference."""
    traced = []

    def kernel(x):
        traced.append(x)
        return 3 * x

    call = jax.jit(by_platform(double, cpu=fails, **{{"gpu": "cuda", "tpu": "tpu"}[elsewhere]: kernel}))
    np.testing.assert_array_equal(call(X), 2 * X)
    assert len(traced) == 1


def test_derivatives_are_those_of_the_reference():
    def square(x):
        return x**2

    call = by_platform(square, cpu=lambda x: x**2 + 0.25)
    np.testing.assert_array_equal(call(X), X**2 + 0.25)
    np.testing.assert_array_equal(jax.grad(lambda x: call(x).sum())(X), 2 * X)
    np.testing.assert_array_equal(jax.jvp(call, (X,), (X,))[1], 2 * X * X)


def test_the_cpu_kernels_are_not_looked_for_where_they_are_not_used(elsewhere, tiny_folder):
    assert fastest_layout() == {"gpu": "layers", "tpu": "columns"}[elsewhere]
    assert fastest_layout(jax.devices("cpu")[0]) == "rows"
    model = phi3_jax.load(tiny_folder)
    cache, tokens = KVCache.create(model.config, 1, 8), jnp.ones((1, 3), jnp.int32)
    jax.eval_shape(lambda p, t, c: Phi3(model.config).apply({"params": p}, t, cache=c), model.params, tokens, cache)
    assert "cpu kernels" not in "".join(status(model.params).values())


def test_on_a_gpu_status_says_how_weights_should_lie(monkeypatch, tiny):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(cuda, "why_unavailable", lambda: None)
    integers = quantize_params(tiny.params, "int8")
    columns = jax.tree.map(
        QuantizedTensor.by_columns, integers["layers"]["mlp"], is_leaf=lambda leaf: hasattr(leaf, "bits")
    )
    said = {
        "stack": status(tiny.params),
        "layers": status(split_layers(tiny.params)),
        "integers": status(split_layers(integers)),
        "columns": status({"down_proj": columns}),
    }
    assert {name: each["linear"] for name, each in said.items()} == {
        "stack": "xla, which copies each layer of a stack of floats first: load them with layout='layers'",
        "layers": "xla, which reads floats where they lie",
        "integers": "cuda kernels",
        "columns": "xla, because weights lie as other hardware reads them: load them with layout='layers'",
    }

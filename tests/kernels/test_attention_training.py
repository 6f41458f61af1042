"""Attention for training against the reference, whose derivative is XLA's own."""

import functools
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import phi3_jax
from phi3_jax.kernels.attention import blockwise, cudnn, splash, training, xla
from phi3_jax.kernels.attention.arguments import KeysValues, Visibility
from phi3_jax.train.forward import how_attention_is_computed
from phi3_jax.train.settings import Settings

pytestmark = pytest.mark.usefixtures("quick_compilation")
SLOW = pytest.mark.slow

B, T, N, K, H = 3, 29, 6, 2, 12


def case(dtype, in_order=False, window=11):
    """A whole row, one with padding on the left (`in_order`: right), and one of three segments and padding after."""
    rng = np.random.default_rng(1)
    positions, segments = np.full((B, T), -1, np.int32), np.zeros((B, T), np.int32)
    positions[0], positions[1, slice(0, -8) if in_order else slice(8, None)] = np.arange(T), np.arange(T - 8)
    for number, where in enumerate((slice(0, 7), slice(7, 8), slice(8, 25))):
        positions[2, where], segments[2, where] = np.arange(where.stop - where.start), number
    segments[2, 25:] = 3
    visible = Visibility(*map(jnp.asarray, (positions, positions, segments, segments)), window, in_order)
    q, k, v = (2 * rng.normal(size=shape) for shape in ((B, T, N, H), (B, K, T, H), (B, K, T, H)))
    return [jnp.asarray(each, dtype) for each in (q, k, v)], visible


def value_and_gradients(function, arguments, visible, of=lambda visible: visible.q_positions >= 0):
    """The output where `of` says, and the gradients of it."""
    q = arguments[0]
    strange = jnp.cos(jnp.arange(q.size)).reshape(q.shape) * of(visible)[:, :, None, None]

    def loss(q, k, v):
        out = function(q, KeysValues(k, v), visible) * strange
        return out.astype(jnp.float32).sum(), out.astype(q.dtype)

    return jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(*arguments)


def reference(q, kv, visible):
    return xla.attention(q, kv, visible)


def close(got, expected, tolerance):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        a, b = (np.asarray(each, np.float32) for each in (a, b))
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max())


@pytest.fixture
def small_blocks(monkeypatch):
    """Of 4 queries and 4 keys: 8 of each in a row of 29 tokens, of which the last overlaps the one before."""
    monkeypatch.setattr(blockwise, "_SIDES", (4, 4))
    return functools.partial(blockwise.attention, scores=1)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2e-6), pytest.param("bfloat16", 2e-2, marks=SLOW)])
def test_values_and_gradients_equal_those_of_the_reference(dtype, tolerance, small_blocks):
    """As one block and as many."""
    expected = value_and_gradients(reference, *case(dtype))
    close(value_and_gradients(training.attention, *case(dtype)), expected, tolerance)
    close(value_and_gradients(small_blocks, *case(dtype)), expected, tolerance)


@pytest.mark.parametrize("window", [7, *(pytest.param(window, marks=SLOW) for window in (None, 4, 6))])
def test_blocks_in_order_give_the_same(window, small_blocks):
    arguments, visible = case("float32", in_order=True, window=window)
    expected = value_and_gradients(reference, arguments, visible)
    close(value_and_gradients(small_blocks, arguments, visible), expected, 2e-6)


@pytest.mark.parametrize("window", [None, 1, 4, 5, 6, 7, 11, 40])
def test_blocks_that_cannot_see_one_another_are_left_out(window):
    axis, blocks = blockwise._Axis(T, 4), range(8)
    distance = np.arange(T)[:, None] - np.arange(T)
    seen = (distance >= 0) & (distance < (window or T))
    some = [[seen[4 * i : 4 * i + 4, 4 * j : 4 * j + 4].any() for j in blocks] for i in blocks]
    empty = jnp.zeros((1, T), jnp.int32)
    for in_order, expected in ((True, some), (False, np.ones((8, 8)).tolist())):
        visible = Visibility(empty, empty, window=window, in_order=in_order)
        assert [[blockwise._may_see(axis, axis, visible, i, j) for j in blocks] for i in blocks] == expected


def test_a_query_that_sees_nothing_gives_zeros_and_no_gradient(small_blocks):
    (_, out), gradients = value_and_gradients(small_blocks, *case("float32"), lambda visible: visible.q_positions < 0)
    assert not any(np.asarray(each).any() for each in (out, *gradients))


def test_the_backward_pass_keeps_no_probabilities():
    arguments, visible = case("float32")

    def kept(function):
        attend = functools.partial(jax.vjp, lambda q, k, v: function(q, KeysValues(k, v), visible))
        _, backward = jax.eval_shape(attend, *arguments)
        return max(leaf.size for leaf in jax.tree.leaves(backward))

    assert kept(reference) == B * N * T * T
    assert kept(training.attention) == B * T * N * H


def test_no_array_has_all_scores():
    """Neither pass, at a length where they would be many; in blocks of 512."""
    length = 4096
    q = jax.ShapeDtypeStruct((1, length, 4, 16), jnp.float32)
    kv = KeysValues(*2 * [jax.ShapeDtypeStruct((1, 2, length, 16), jnp.float32)])
    positions = jax.ShapeDtypeStruct((1, length), jnp.int32)
    visible = Visibility(positions, positions, positions, positions, in_order=True)
    gradient = jax.grad(lambda *arguments: training.attention(*arguments).sum(), (0, 1), allow_int=True)
    text = jax.jit(gradient).lower(q, kv, visible).as_text()
    shapes = [tuple(map(int, shape.split("x"))) for shape in re.findall(r"tensor<((?:\d+x)+\d+)x\w+>", text)]
    assert max(map(np.prod, shapes)) <= blockwise.SCORES
    assert all(sum(size >= length for size in shape) < 2 for shape in shapes)


def lowered(platform, dtype=jnp.bfloat16, packed=False, head=96, window=None, length=200, **remat):
    """StableHLO of the gradients for a platform that need not be here; nothing is compiled."""
    q = jax.ShapeDtypeStruct((2, length, 4, head), dtype)
    k = jax.ShapeDtypeStruct((2, 2, length, head), dtype)
    positions = jax.ShapeDtypeStruct((2, length), jnp.int32)

    def loss(q, k, v, positions):
        ids = positions if packed else None
        visible = Visibility(positions, positions, ids, ids, window, in_order=True)
        attend = jax.checkpoint(lambda *qkv: training.attention(qkv[0], KeysValues(*qkv[1:]), visible), **remat)
        return attend(q, k, v).astype(jnp.float32).sum()

    traced = jax.jit(jax.value_and_grad(loss, (0, 1, 2))).trace(q, k, k, positions)
    return traced.lower(lowering_platforms=(platform,)).as_text()


@pytest.fixture
def gpu(monkeypatch):
    """A process that computes on a GPU and has cuDNN, as far as can be told before anything is compiled."""
    from jax._src.cudnn import fused_attention_stablehlo

    versions = types.SimpleNamespace(cudnn_get_version=lambda: 91800)
    monkeypatch.setattr(fused_attention_stablehlo, "cuda_versions", versions)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")


@pytest.mark.parametrize(("window", "said"), [(7, 7), (199, 199), (200, 0)])
def test_cudnn_is_asked_for_a_causal_window(gpu, window, said):
    text = lowered("cuda", window=window)
    calls = re.findall(r"custom_call @__cudnn\$(\w+)\(.*", text)
    assert sorted(calls) == ["fmhaSoftmax", "fmhaSoftmax", "fmhaSoftmaxBackward"]  # one of them computed again
    config = text.replace("\\22", "").replace(" ", "")
    assert set(re.findall(r"mask_type:(\w+)", config)) == {"CAUSAL"}
    assert set(re.findall(r"sliding_window_length:(\d+)", config)) == {str(said)}
    assert {round(float(each), 6) for each in re.findall(r"fmha_scale:([\d.]+)", config)} == {round(96**-0.5, 6)}


@pytest.mark.parametrize("window", [11, *(pytest.param(window, marks=SLOW) for window in (None, 1))])
def test_what_cudnn_is_asked_for_is_the_reference(monkeypatch, window):
    """Computed by JAX's own slow form of the same function, with padding on the right."""
    monkeypatch.setattr(jax.nn, "dot_product_attention", functools.partial(_by_xla, jax.nn.dot_product_attention))
    arguments, visible = case("float32", in_order=True, window=window)
    one_sequence = [jnp.where(jnp.arange(T) < jnp.array([[T], [21], [0]]), jnp.arange(T), -1)] * 2
    visible = Visibility(*one_sequence, window=window, in_order=True)
    got = value_and_gradients(cudnn.attention, arguments, visible)
    close(got, value_and_gradients(reference, arguments, visible), 2e-6)
    out = cudnn.attention(arguments[0], KeysValues(*arguments[1:]), visible)
    assert not out[visible.q_positions < 0].any()


def _by_xla(function, *arguments, implementation, **options):
    assert implementation == "cudnn"
    return function(*arguments, implementation="xla", **options)


def test_a_run_says_how_attention_is_computed(gpu):
    config = phi3_jax.PRESETS["phi-3-mini-4k"]
    one, packed = (
        how_attention_is_computed(Settings(pack=pack, dtype="bfloat16", compute_dtype="bfloat16"), config)
        for pack in (False, True)
    )
    assert one == "attention: cudnn"
    assert packed == "attention: blockwise, because cuDNN's attention takes one sequence per row (pack=false)"


def test_cudnn_s_results_are_kept_where_a_policy_asks_for_it(gpu):
    assert lowered("cuda", policy=training.is_kept).count("@__cudnn$fmhaSoftmax(") == 1
    assert lowered("cuda").count("@__cudnn$fmhaSoftmax(") == 2


@pytest.mark.parametrize(
    ("reason", "changes"),
    [
        ("one sequence per row", {"packed": True}),
        ("not float32", {"dtype": jnp.float32}),
        ("multiple of 8", {"head": 12}),
        ("only whole sequences", {}),
    ],
)
def test_other_cases_are_computed_in_blocks_and_it_is_said_why(gpu, reason, changes):
    q = jax.ShapeDtypeStruct((2, 5, 4, changes.get("head", 96)), changes.get("dtype", jnp.bfloat16))
    k = jax.ShapeDtypeStruct((2, 2, 5, q.shape[-1]), q.dtype)
    ids = jnp.zeros((2, 5), jnp.int32)
    segments = ids if "packed" in changes else None
    name, why = training.choice(q, KeysValues(k, k), Visibility(ids, ids, segments, segments, None, bool(changes)))
    assert name == "blockwise"
    assert reason in why


def test_without_cudnn_it_is_said_that_there_is_none(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    (q, k, v), visible = case(jnp.bfloat16, in_order=True)
    visible = Visibility(visible.q_positions, visible.k_positions, in_order=True)
    assert "cuDNN" in cudnn.why_not(q, KeysValues(k, v), visible)


def test_a_tpu_is_given_splash_attention(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    text = lowered("tpu", packed=True, window=7, policy=training.is_kept)
    names = [name.split("_")[2] for name in re.findall(r"kernel_name = \"(splash_\w+)", text)]
    assert sorted(names) == ["dkv", "dq", "fwd"]
    assert "splash" not in lowered("tpu", dtype=jnp.float32)


@SLOW
@pytest.mark.parametrize("window", [None, 11, 150])
def test_splash_attention_equals_the_reference(window):
    """Interpreted: more than one block, with a length that is none of its own."""
    length = 200
    rng = np.random.default_rng(1)
    positions, segments = np.full((2, length), -1, np.int32), np.zeros((2, length), np.int32)
    positions[0] = np.arange(length)
    for number, where in enumerate((slice(0, 7), slice(7, 8), slice(8, 180))):
        positions[1, where], segments[1, where] = np.arange(where.stop - where.start), number
    visible = Visibility(*map(jnp.asarray, (positions, positions, segments, segments)), window, in_order=True)
    shapes = (2, length, 4, 16), (2, 2, length, 16), (2, 2, length, 16)
    arguments = [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]
    got = value_and_gradients(functools.partial(splash.attention, interpret=True), arguments, visible)
    close(got, value_and_gradients(reference, arguments, visible), 2e-6)

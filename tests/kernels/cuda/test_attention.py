"""Attention over the key-value cache by the kernels for NVIDIA cards, emulated on the CPU, against float64."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from phi3_jax.kernels.attention import cuda
from phi3_jax.kernels.attention.arguments import KeysValues, Visibility
from phi3_jax.kernels.attention.masks import attention_mask
from phi3_jax.model.rope import rotate

pytestmark = pytest.mark.usefixtures("emulated")


@dataclasses.dataclass(frozen=True)
class Case:
    """What attention is asked for. Row b of the batch has lengths[b] tokens by now, of which the last T are queries."""

    T: int = 1
    S: int = 77
    N: int = 2
    K: int = 1
    H: int = 64
    lengths: tuple[int, ...] = (77, 1, 40)  # more than S: a ring that has wrapped
    window: int | None = None
    dtype: str = "bfloat16"  # of the cache
    q_dtype: str = "bfloat16"
    segments: bool = False
    seed: int = 0
    loud: int | None = None  # a slot with large values, which nobody can overhear


def positions(case):
    """q_positions [B, T] and k_positions [B, S], by numpy."""
    q = np.full((len(case.lengths), case.T), -1, np.int32)
    k = np.full((len(case.lengths), case.S), -1, np.int32)
    for b, length in enumerate(case.lengths):
        new = np.arange(max(0, length - case.T), length)
        q[b, case.T - len(new) :] = new  # padding comes first
        kept = np.arange(max(0, length - case.S), length)
        k[b, kept % case.S] = kept
    return q, k


def operands(case):
    """(q, the cache with three layers of which the second counts, who sees what): numpy arrays in float64 or integers.

    Slots that no query of their row sees hold NaN.
    """
    random = np.random.default_rng(case.seed)
    B = len(case.lengths)
    q_positions, k_positions = positions(case)
    q_segments = k_segments = None
    if case.segments:
        q_segments = random.integers(0, 3, (B, case.T)).astype(np.int32)
        k_segments = random.integers(0, 3, (B, case.S)).astype(np.int32)
    mask = np.asarray(attention_mask(q_positions, k_positions, case.window, q_segments, k_segments))
    q = 2 * random.standard_normal((B, case.T, case.N, case.H))
    shape = (3, B, case.K, case.S, case.H)
    unseen = ~mask.any(axis=1)[None, :, None]  # [1, B, 1, S]
    if case.segments and case.T > 8:  # there only what no position admits is kept away
        unseen = ~np.asarray(attention_mask(q_positions, k_positions, case.window)).any(axis=1)[None, :, None]
    if case.dtype == "int8":
        k, v = (random.integers(-127, 128, shape).astype(np.int8) for _ in range(2))
        scales = [np.where(unseen, np.nan, random.random(shape[:-1]) / 60 + 0.002).astype(np.float32) for _ in range(2)]
    else:
        k, v = (np.where(unseen[..., None], np.nan, random.standard_normal(shape)) for _ in range(2))
        k, v = (each.astype(ml_dtypes.bfloat16 if case.dtype == "bfloat16" else np.float32) for each in (k, v))
        scales = [None, None]
    if case.loud is not None:
        v[:, :, :, case.loud] *= 1000
    q = q.astype(ml_dtypes.bfloat16 if case.q_dtype == "bfloat16" else np.float32)
    return q, (k, v, *scales), (q_positions, k_positions, q_segments, k_segments), mask


def shapes(case):
    B = len(case.lengths)
    q, k = (B, case.T, case.N, case.H), (B, case.K, case.S, case.H)
    return jax.ShapeDtypeStruct(q, case.q_dtype), jax.ShapeDtypeStruct(k, case.dtype)


def exact(q, cache, mask):
    """In float64, one query head after another; 0 where a query sees nothing."""
    k, v, k_scale, v_scale = (None if each is None else each[1].astype(np.float64) for each in cache)
    if k_scale is not None:
        k, v = k * k_scale[..., None], v * v_scale[..., None]
    (B, T, N, H), K = q.shape, k.shape[1]
    out = np.zeros(q.shape)
    for b in range(B):
        for n in range(N):
            for t in range(T):
                seen = mask[b, t]
                if not seen.any():
                    continue
                keys, values = k[b, n // (N // K)][seen], v[b, n // (N // K)][seen]
                scores = keys @ q[b, t, n].astype(np.float64) / np.sqrt(H)
                p = np.exp(scores - scores.max())
                out[b, t, n] = p @ values / p.sum()
    return out


def check(case):
    q, cache, who, mask = operands(case)
    expected = exact(q, cache, mask)
    kv = KeysValues(*(None if each is None else jnp.asarray(each) for each in cache), layer=jnp.int32(1))
    visible = Visibility(*(None if each is None else jnp.asarray(each) for each in who), window=case.window)
    found = cuda.attention(jnp.asarray(q), kv, visible)
    assert (found.shape, found.dtype) == (q.shape, q.dtype)
    found = np.asarray(found, np.float64)
    # Tensor cores take the queries and p in bfloat16.
    exactly = case.dtype == "float32" or case.T * case.N // case.K <= 8
    error = 2.0**-8 * np.abs(expected) if case.q_dtype == "bfloat16" else 0
    if case.loud is not None:
        error = 0.02 * np.abs(expected)
    np.testing.assert_array_less(np.abs(found - expected), error + (2e-5 if exactly else 0.02))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("H", [64, 96, 128])
def test_one_query(H, dtype):  # noqa: N803
    """Rows of unequal lengths, one of them empty; heads that share keys, and heads that do not."""
    check(Case(H=H, dtype=dtype, lengths=(77, 0, 1, 40), q_dtype="float32"))
    check(Case(H=H, dtype=dtype, N=2, K=2, S=33, lengths=(33, 32), seed=1))
    check(Case(H=H, dtype=dtype, N=3, K=1, S=33, lengths=(17,), seed=2, q_dtype="float32"))


@pytest.mark.parametrize("window", [1, 5, 32, 33, 64])
def test_ring(window):
    """Slots are used again, and the oldest of them are out of the window, by one."""
    check(Case(S=64, lengths=(65, 130, 63), window=window, q_dtype="float32"))
    check(Case(S=67, lengths=(70, 200), T=3, N=2, window=window, seed=1, q_dtype="float32"))


@pytest.mark.parametrize("T", [2, 3, 4, 5])
def test_few_queries(T):  # noqa: N803
    """Guesses that see one another's past only; rows that are shorter than these."""
    check(Case(T=T, N=4, K=2, S=50, lengths=(50, 2, 33), q_dtype="float32", dtype="int8"))
    check(Case(T=T, N=1, K=1, S=40, lengths=(39, 1), window=7, seed=1))


def test_every_warp_goes_round_more_than_once(monkeypatch):
    monkeypatch.setattr(cuda, "_SLOTS", 1000)
    case = Case(S=290, N=1, lengths=(290, 128, 97), q_dtype="float32")
    assert cuda.splits(*shapes(case)) == 1
    check(case)


def test_a_token_that_is_not_a_number_does_not_reach_the_guesses_before_it():
    case = Case(T=3, S=40, N=1, lengths=(40,), q_dtype="float32")
    q, (k, v, *_), (q_positions, k_positions, *_), mask = operands(case)
    expected = exact(q, (k, v, None, None), mask)[:, :2]
    k[1, 0, :, -1], v[1, 0, :, -1] = np.nan, np.nan
    kv = KeysValues(jnp.asarray(k), jnp.asarray(v), layer=jnp.int32(1))
    found = cuda.attention(jnp.asarray(q), kv, Visibility(jnp.asarray(q_positions), jnp.asarray(k_positions)))
    np.testing.assert_allclose(found[:, :2], expected, atol=2e-5)
    assert np.isnan(found[:, 2]).all()


@pytest.mark.parametrize("segments", [False, True])
def test_splits(segments, monkeypatch):
    """The slots of a row in several parts, whose last has the newest key; in some parts nobody sees any."""
    monkeypatch.setattr(cuda, "_SLOTS", 32)
    for S, lengths in [(600, (600, 599, 33, 0)), (385, (385, 1000)), (128, (97,))]:
        for dtype in ("float32", "int8"):
            case = Case(S=S, lengths=lengths, dtype=dtype, q_dtype="float32", segments=segments, window=380)
            assert cuda.splits(*shapes(case)) > 2
            check(case)


def test_segments():
    for T, dtype in [(1, "bfloat16"), (3, "int8")]:
        check(Case(T=T, segments=True, dtype=dtype, lengths=(77, 60), q_dtype="float32"))


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize("H", [64, 96, 128])
def test_many_queries(H, dtype):  # noqa: N803
    """On tensor cores: rows at the borders of a block, prompts that are shorter, some of them empty."""
    check(Case(T=65, S=130, N=1, H=H, dtype=dtype, lengths=(130, 40, 0), q_dtype="float32"))
    check(Case(T=17, S=96, N=4, K=2, H=H, dtype=dtype, lengths=(96, 17), seed=1))


@pytest.mark.parametrize("window", [1, 40, 64, 65])
def test_many_queries_over_a_ring(window):
    check(Case(T=33, S=160, N=2, lengths=(300, 161, 64), window=window, dtype="int8"))
    check(Case(T=11, S=75, N=2, K=2, lengths=(150, 75), window=window, seed=1))


def test_groups_of_slots_that_all_but_one_query_see():
    """The first slot of a group is out of the last query's window; the last slot comes after the first query."""
    for window in (134, 135, 136):
        check(Case(T=11, S=200, N=1, lengths=(200,), window=window, loud=64))
    for length in (201, 202, 203):
        check(Case(T=11, S=256, N=1, lengths=(length,), loud=191))


def test_many_queries_in_segments():
    check(Case(T=37, S=100, N=1, lengths=(100, 60), segments=True))
    check(Case(T=9, S=70, N=3, lengths=(100, 70), segments=True, dtype="int8", window=30))


def test_many_queries_over_split_slots(monkeypatch):
    """A few guesses of a few rows over many slots; groups of slots that nobody sees lie between others."""
    monkeypatch.setattr(cuda, "_SLOTS", 32)
    for dtype in ("bfloat16", "int8"):
        case = Case(T=9, S=500, N=2, lengths=(500, 130, 0, 900), dtype=dtype, window=300)
        assert cuda.splits(*shapes(case)) > 2
        check(case)


def test_many_queries_in_float32_are_exact():
    check(Case(T=17, S=96, N=2, dtype="float32", lengths=(96, 17), q_dtype="float32"))


@pytest.mark.parametrize(
    ("T", "slots", "dtype"),
    [
        (1, 300, "int8"),
        (18, 60, "int8"),
        pytest.param(1, 70, "float32", marks=pytest.mark.slow),
        pytest.param(3, 40, "bfloat16", marks=pytest.mark.slow),
    ],
)
def test_new_tokens_are_rotated_stored_and_attended_to(T, slots, dtype, monkeypatch):  # noqa: N803
    """Two launches give what rotation, writing and attention give one after another; a part of each head is rotated."""
    monkeypatch.setattr(cuda, "_SLOTS", 32)
    case = Case(
        T=T, S=slots, N=4, K=2, lengths=(slots, slots + 30, 11), window=slots - T, dtype=dtype, q_dtype="float32"
    )
    q, arrays, who, _ = operands(case)
    random = np.random.default_rng(9)
    qkv = jnp.asarray(random.standard_normal((len(case.lengths), T, 8, case.H)), jnp.float32)
    cos, sin = (jnp.asarray(random.standard_normal((len(case.lengths), T, 24)), jnp.float32) for _ in range(2))
    kv = KeysValues(*(None if each is None else jnp.asarray(each) for each in arrays), layer=jnp.int32(1))
    visible = Visibility(*(None if each is None else jnp.asarray(each) for each in who), window=case.window)
    out, stored = cuda.attend_new(qkv, cos, sin, kv, visible)
    q, k, v = jnp.split(qkv, [4, 6], axis=2)
    expected = cuda.write(kv, visible.q_positions, rotate(k, cos, sin), v)
    for found, wanted in zip(jax.tree.leaves(stored), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(
            np.asarray(found, np.float32), np.asarray(wanted, np.float32), rtol=1e-2 if dtype == "bfloat16" else 1e-5
        )
    cache = tuple(
        None if each is None else np.asarray(each) for each in (stored.k, stored.v, stored.k_scale, stored.v_scale)
    )
    mask = np.asarray(visible.mask())
    difference = np.abs(np.asarray(out) - exact(np.asarray(rotate(q, cos, sin)), cache, mask))
    assert difference.max() < (2e-5 if T < 5 else 0.02)

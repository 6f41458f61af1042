import dataclasses
import functools
import itertools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import phi3_jax
from phi3_jax.infer import PromptLookup, Sampling
from phi3_jax.infer.engine import decoding
from phi3_jax.infer.engine.speculation import LookupDrafter
from phi3_jax.infer.sampling import SamplingArrays
from phi3_jax.kernels.attention import cpu, why_not_cpu
from phi3_jax.model import slots_needed

LENGTH, WINDOW = 5000, 2047


@functools.partial(jax.jit, static_argnums=0, donate_argnames="cache")
def extend(config, params, tokens, cache):
    return phi3_jax.Phi3(config).apply({"params": params}, tokens, cache=cache)


@pytest.fixture(scope="module")
def long_run():
    """A model with Phi-3-mini's window, 5000 tokens, and their logits from one run without a cache."""
    config = phi3_jax.Phi3Config(
        vocab_size=31,
        hidden_size=12,
        intermediate_size=20,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=6,
        max_position_embeddings=8192,
        rope_theta=1e4,
        sliding_window=WINDOW,
        initializer_range=0.5,
    )
    params = phi3_jax.random_params(config)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 31, (1, LENGTH)), jnp.int32)
    whole = jax.jit(lambda p, t: phi3_jax.Phi3(config).apply({"params": p}, t))(params, tokens)
    return config, params, tokens, np.asarray(whole)


@pytest.mark.parametrize("chunk", [512, 2047, 3000])
def test_a_ring_equals_a_run_without_cache_at_phi_3s_window(long_run, chunk):
    """4900 tokens in chunks, then 100 one at a time, past two and a half windows."""
    config, params, tokens, expected = long_run
    slots = slots_needed(config, LENGTH, chunk)
    assert slots == min(LENGTH, WINDOW + chunk - 1)
    cache = phi3_jax.KVCache.create(config, 1, slots)
    borders = [*range(0, 4900, chunk), *range(4900, LENGTH + 1)]
    parts = []
    for begin, end in itertools.pairwise(borders):
        logits, cache = extend(config, params, tokens[:, begin:end], cache)
        parts.append(np.asarray(logits))
    np.testing.assert_allclose(np.concatenate(parts, axis=1), expected, atol=1e-4)


def test_a_ring_of_just_the_window_serves_decoding_and_one_slot_less_does_not(long_run):
    config, params, tokens, _ = long_run
    config = dataclasses.replace(config, sliding_window=7)
    whole = phi3_jax.Phi3(config).apply({"params": params}, tokens[:, :40])
    for slots, same in ((7, True), (6, False)):
        cache = phi3_jax.KVCache.create(config, 1, slots)
        for i in range(40):
            logits, cache = extend(config, params, tokens[:, i : i + 1], cache)
        assert np.allclose(logits[:, 0], whole[:, -1], atol=1e-4) == same


def test_a_ring_does_not_grow_with_the_text(long_run):
    config = long_run[0]
    assert slots_needed(config, 10**6, 512) == WINDOW + 511
    assert slots_needed(dataclasses.replace(config, sliding_window=None), 10**6, 512) == 10**6


@pytest.mark.parametrize("implementation", [None, "xla"])
def test_int8_keys_and_values_are_within_half_a_step(tiny, implementation):
    config = tiny.config
    cache = phi3_jax.KVCache.create(config, 2, 5, jnp.int8)
    random = np.random.default_rng(4)
    k, v = (
        jnp.asarray(random.standard_normal((2, 3, 2, 8)) * 10.0 ** random.integers(-3, 3, (2, 3, 2, 1))) for _ in "kv"
    )
    k = k.at[0, 1].set(0.0)
    positions = jnp.asarray([[0, 1, 2], [3, 4, -1]])
    cache = cache.claim(positions).write(jnp.int32(1), positions, k, v, implementation)
    floats = (cache.k[1] * cache.k_scale[1][..., None], cache.v[1] * cache.v_scale[1][..., None])
    for stored, original in zip(floats, (k, v), strict=True):
        for row, slots in enumerate([[0, 1, 2], [3, 4]]):
            got = np.asarray(stored[row, :, slots])  # [slot, K, H]
            want = np.asarray(original[row, : len(slots)])
            assert (np.abs(got - want) <= np.abs(want).max(-1, keepdims=True) / 254 * 1.0001).all()
    assert cache.positions.tolist() == [[0, 1, 2, -1, -1], [-1, -1, -1, 3, 4]]
    # Neither the other layers nor the free slots were touched.
    assert not cache.k[0].any()
    assert not cache.k[1, 1, :, :3].any()


@pytest.mark.parametrize("drafter", [None, pytest.param(LookupDrafter(PromptLookup(3)), marks=pytest.mark.slow)])
def test_decoding_updates_the_cache_in_place(tiny, drafter):
    """The compiled loop's output is its input's memory, and nothing copies the cache."""

    def compiled(capacity):
        settings = decoding.Settings(
            limits=jnp.full((2,), 30),
            end_ids=jnp.zeros((0,), jnp.int32),
            sampling=SamplingArrays.of([Sampling()] * 2, 97),
            prompt_lengths=jnp.full((2,), 3),
        )
        state = decoding.begin(tiny.config, settings, jnp.zeros((2, 64), jnp.int32), capacity, jnp.float32)
        args = tiny.config, tiny.params, state, settings, jnp.int32(8), drafter
        return decoding.decode.lower(*args).compile(), state

    (small, _), (large, state) = compiled(128), compiled(4096)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    assert large.memory_analysis().alias_size_in_bytes >= 0.99 * size
    shape = ",".join(map(str, state.cache.k.shape))
    assert f"f32[{shape}]" in large.as_text()
    assert not re.search(rf"= f32\[{shape}\]\S* copy\(", large.as_text())
    # What grows is one layer's scores, mask and view of the keys, for each place of a turn, not all layers'.
    layer, places = size / tiny.config.num_hidden_layers, 1 if drafter is None else 4
    growth = large.memory_analysis().temp_size_in_bytes - small.memory_analysis().temp_size_in_bytes
    assert growth < 3 * layer * places


@pytest.mark.slow
@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.int8])
def test_heads_and_slots_padded_for_a_tpu_change_no_number(tiny, monkeypatch, dtype):
    def logits(platform):
        with monkeypatch.context() as patch:
            patch.setattr(jax, "default_backend", lambda: platform)
            cache = phi3_jax.KVCache.create(tiny.config, 2, 23, dtype)
        sizes.append((cache.capacity, *cache.k.shape[-2:]))
        model, all_ = phi3_jax.Phi3(tiny.config), []
        for piece in jnp.split(tokens, [7, 11], axis=1):
            part, cache = model.apply({"params": tiny.params}, piece, cache=cache)
            all_.append(part)
        return jnp.concatenate(all_, axis=1)

    tokens = jnp.asarray(np.random.default_rng(5).integers(4, 97, (2, 13)), jnp.int32)
    sizes = []
    expected = logits("cpu")
    np.testing.assert_allclose(logits("tpu"), expected, rtol=1e-5, atol=1e-5)
    assert sizes == [(23, 23, tiny.config.head_dim), (128, 128, 128)]


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize(
    ("window", "capacity", "pieces", "fits"),
    [
        pytest.param(None, 8, [5, 3], True, marks=pytest.mark.slow),
        pytest.param(None, 8, [5, 3, 1], False, marks=pytest.mark.slow),
        (None, 8, [8, 1], False),
        (6, 6, [5, 1, 1, 1, 1, 1, 1, 1], True),  # a ring of the window's size takes tokens one by one
        (6, 6, [5, 2], False),
        pytest.param(6, 8, [3, 3, 3, 3, 3], True, marks=pytest.mark.slow),  # window + 3 - 1 slots for three at a time
        pytest.param(6, 7, [3, 3, 3], False, marks=pytest.mark.slow),
        pytest.param(6, 8, [8, 1], True, marks=pytest.mark.slow),
    ],
)
def test_a_cache_that_is_too_small_gives_no_number(tiny, window, capacity, pieces, fits):
    """Raised where positions are known, NaN inside of a compiled program, and only in the row that overflows."""
    config = dataclasses.replace(tiny.config, sliding_window=window, long_rope=None, num_hidden_layers=1)
    params = {**tiny.params, "layers": jax.tree.map(lambda leaf: leaf[:1], tiny.params["layers"])}
    model, total = phi3_jax.Phi3(config), sum(pieces)
    tokens = jnp.asarray(np.random.default_rng(8).integers(4, 97, (2, total)), jnp.int32)
    expected = np.asarray(model.apply({"params": params}, tokens))
    run = jax.jit(lambda tokens, positions, cache: model.apply({"params": params}, tokens, positions, cache=cache))
    cache, begin = phi3_jax.KVCache.create(config, 2, capacity), 0
    for size in pieces:
        places = jnp.arange(begin, begin + size)
        positions = jnp.stack([places, jnp.where(places < 2, places, -1)])  # the second row has two tokens
        before, piece = cache, tokens[:, begin : begin + size]
        logits, cache = run(piece, positions, cache)
        begin += size
        if begin < total or fits:
            np.testing.assert_allclose(logits[0], expected[0, begin - size : begin], rtol=1e-4, atol=1e-4)
    assert np.isnan(logits[0]).all() != fits
    assert np.isfinite(logits[1]).all()
    if not fits:
        with pytest.raises(
            ValueError, match=f"positions up to {total - 1} do not fit into a cache of {capacity} slots"
        ):
            model.apply({"params": params}, piece, positions, cache=before)


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="there are no huge pages")
@pytest.mark.skipif(why_not_cpu("float32") is not None, reason="no kernels")
def test_memory_that_is_left_as_it_came_gets_no_huge_pages(tiny):
    """Or a first token would make all of it, where the system gives them unasked."""
    cache = phi3_jax.KVCache.create(tiny.config, 2, 40000, unset=True)
    flags = {}
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if limits := re.match("([0-9a-f]+)-([0-9a-f]+) ", line):
            begin, end = (int(each, 16) for each in limits.groups())
        elif line.startswith("VmFlags:"):
            flags[range(begin, end)] = line.split()
    for array in (cache.k, cache.v):
        middle = array.unsafe_buffer_pointer() + array.nbytes // 2
        assert "nh" in next(found for part, found in flags.items() if middle in part)


def test_who_looks_for_nan_gets_a_cache_of_zeros(tiny, monkeypatch):
    monkeypatch.setattr(cpu, "reserve", None)
    with jax.debug_nans(True):
        cache = phi3_jax.KVCache.create(tiny.config, 2, 64, unset=True)
    assert not cache.k.any()

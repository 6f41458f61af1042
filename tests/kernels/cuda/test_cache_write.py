"""Writing to the key-value cache by the kernels for NVIDIA cards, emulated on the CPU, against what XLA makes of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import phi3_jax
from phi3_jax.kernels.attention import cuda
from phi3_jax.model.cache import KVCache

pytestmark = pytest.mark.usefixtures("emulated")


def empty(dtype, S, H=96):  # noqa: N803
    """3 layers, 2 rows, 3 heads."""
    config = phi3_jax.Phi3Config(
        vocab_size=5,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=3,
        num_attention_heads=3,
        num_key_value_heads=3,
        head_dim=H,
        max_position_embeddings=64,
        rope_theta=1e4,
    )
    return KVCache.create(config, 2, S, dtype)


def filled(cache):
    """The same with sevens everywhere: what is not written stays as it was."""
    return jax.tree.map(lambda leaf: jnp.full_like(leaf, 7), cache)


RING = [[5, 6, 7, 8], [-1, -1, 0, 1]]  # past the end of 7 slots; padding


@pytest.mark.parametrize(
    ("dtype", "new", "H", "S", "positions"),
    [
        pytest.param("float32", "float32", 96, 7, RING, marks=pytest.mark.slow),
        pytest.param("bfloat16", "float32", 64, 7, RING, marks=pytest.mark.slow),
        ("bfloat16", "bfloat16", 128, 4, [[0, 1, 2, 3], [3, 4, 5, 6]]),
        ("int8", "float32", 96, 7, RING),
        pytest.param("int8", "bfloat16", 128, 9, [[2, -1, 3, 4], [8, 9, 10, 11]], marks=pytest.mark.slow),
    ],
)
def test_write(dtype, new, H, S, positions):  # noqa: N803
    random = np.random.default_rng(0)
    cache = filled(empty(dtype, S, H))
    positions = jnp.asarray(positions, jnp.int32)
    k, v = (jnp.asarray(random.standard_normal((2, 4, 3, H)) * 3, new) for _ in range(2))
    k = k.at[0, 0, 0].set(0)
    expected = cache.write(jnp.int32(1), positions, k, v, "xla")
    kv = cuda.write(cache.keys_values(jnp.int32(1)), positions, k, v)
    for found, scale, new_ones, wanted in [(kv.k, kv.k_scale, k, expected.k), (kv.v, kv.v_scale, v, expected.v)]:
        found, wanted = np.asarray(found, np.float32), np.asarray(wanted, np.float32)
        if scale is None:
            np.testing.assert_array_equal(found, wanted)
            continue
        assert np.abs(found - wanted).max() <= 1  # XLA multiplies with 1/127
        assert (found != wanted).mean() < 1e-3
        most = np.abs(np.asarray(new_ones, np.float32)).max(axis=-1)
        for b, t in np.ndindex(positions.shape):
            slot = int(positions[b, t]) % S
            if positions[b, t] >= 0 and (positions[b] % S == slot).sum() == 1:
                np.testing.assert_array_equal(scale[1, b, :, slot], most[b, t] / np.float32(127))
        np.testing.assert_array_equal(scale[::2], 7)


def test_of_two_tokens_in_a_slot_the_later_position_stays():
    cache = empty("float32", 3)
    new = jnp.arange(2 * 5 * 3 * 96, dtype=jnp.float32).reshape(2, 5, 3, 96)
    positions = jnp.asarray([[4, 5, 6, 7, 8], [1, 4, -1, 2, 5]], jnp.int32)
    kv = cuda.write(cache.keys_values(jnp.int32(0)), positions, new, -new)
    for row, slots in [(0, [2, 3, 4]), (1, [None, 1, 4])]:
        for slot, token in enumerate(slots):
            expected = 0 if token is None else new[row, token]
            np.testing.assert_array_equal(kv.k[0, row, :, slot], expected)
            np.testing.assert_array_equal(kv.v[0, row, :, slot], -expected)
    np.testing.assert_array_equal(kv.k[1:], 0)

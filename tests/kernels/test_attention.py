"""Attention over the key-value cache on the CPU: the reference in XLA, and what the kernels' own tests do not reach."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from phi3_jax.kernels.attention import attention, why_not_cpu
from phi3_jax.kernels.attention.arguments import KeysValues, Visibility

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.mark.parametrize("implementation", ["xla", "cpu"])
def test_integers_have_scales_of_their_own_for_keys_and_for_values(implementation):
    if implementation == "cpu" and (reason := why_not_cpu("int8")) is not None:
        pytest.skip(reason)
    random = np.random.default_rng(0)
    B, T, N, K, S, H = 2, 1, 4, 2, 37, 24
    k, v = (random.integers(-127, 128, (B, K, S, H)).astype(np.int8) for _ in range(2))
    k_scale, v_scale = ((random.random((B, K, S)) + 0.1).astype(np.float32) / 60 for _ in range(2))
    q = random.standard_normal((B, T, N, H)).astype(np.float32)
    kv = KeysValues(*map(jnp.asarray, (k, v, k_scale, v_scale)))
    visible = Visibility(jnp.full((B, T), S, jnp.int32), jnp.broadcast_to(jnp.arange(S), (B, S)))
    keys, values = (
        np.repeat(x * scale[..., None].astype(np.float64), 2, 1) for x, scale in [(k, k_scale), (v, v_scale)]
    )
    scores = np.einsum("BTNH,BNSH->BNTS", q, keys) / np.sqrt(H)
    p = np.exp(scores - scores.max(axis=-1, keepdims=True))
    expected = np.einsum("BNTS,BNSH->BTNH", p / p.sum(axis=-1, keepdims=True), values)
    np.testing.assert_allclose(attention(jnp.asarray(q), kv, visible, implementation), expected, atol=2e-5)


@pytest.mark.parametrize("slots", [512, 771])
def test_no_slot_is_lost_where_threads_share_a_row(slots):
    """The query is like one key, whose values it gets; the newest of 512 slots and more lies where a part ends."""
    if (reason := why_not_cpu("float32")) is not None:
        pytest.skip(reason)
    random = np.random.default_rng(0)
    k, v = (jnp.asarray(random.standard_normal((1, 1, slots, 64)), jnp.float32) for _ in range(2))
    visible = Visibility(jnp.full((1, 1), slots - 1), jnp.arange(slots)[None])
    call = jax.jit(lambda q: attention(q, KeysValues(k, v), visible, "cpu"))
    for slot in [*range(0, slots, 3), *range(slots - 5, slots)]:
        found = call(jnp.broadcast_to(4 * k[:, :, None, slot], (1, 1, 2, 64)))
        np.testing.assert_allclose(found, np.broadcast_to(v[0, 0, slot], (1, 1, 2, 64)), atol=1e-3)

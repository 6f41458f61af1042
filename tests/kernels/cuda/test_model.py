"""A model whose attention is computed by the kernels for NVIDIA cards, emulated on the CPU."""

import itertools

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import phi3_jax
from phi3_jax.kernels import status
from phi3_jax.model import KVCache, Phi3, cache, parameter_shapes

pytestmark = pytest.mark.usefixtures("emulated")


@pytest.fixture
def on_a_card(monkeypatch):
    """Programs choose kernels as on a GPU, and run them on this CPU."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(cache, "by_platform", lambda reference, cuda, **others: cuda or reference)


def config(**sizes):
    usual = {"vocab_size": 11, "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 2, "head_dim": 64}
    usual |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "rope_theta": 1e4}
    return phi3_jax.Phi3Config(**usual | {"sliding_window": 9, "initializer_range": 0.3} | sizes)


@pytest.mark.slow
@pytest.mark.usefixtures("on_a_card")
def test_a_ring_equals_a_run_without_cache():
    """A prompt in two chunks, then one token at a time, past the window; a second row is shorter."""
    model = config()
    params = phi3_jax.random_params(model)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 11, (2, 20)), jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(20), (2, 20)).at[1, 15:].set(-1)
    expected = Phi3(model).apply({"params": params}, tokens, positions)
    kept = KVCache.create(model, 2, 9 + 8 - 1)
    for begin, end in itertools.pairwise([0, 8, 14, 15, 16, 17, 18, 19, 20]):
        new = positions[:, begin:end]
        logits, kept = Phi3(model).apply({"params": params}, tokens[:, begin:end], new, cache=kept)
        seen = np.asarray(new >= 0)
        np.testing.assert_allclose(np.asarray(logits)[seen], np.asarray(expected)[:, begin:end][seen], atol=1e-4)


@pytest.mark.usefixtures("on_a_card")
def test_status_says_what_attention_uses():
    assert status(head_dim=96)["attention"] == "cuda kernels"
    assert "heads of (64, 96, 128), not 80" in status(head_dim=80)["attention"]
    assert "not float16" in status(cache_dtype="float16")["attention"]


@pytest.mark.usefixtures("on_a_card")
@pytest.mark.parametrize("head_dim", [16, 64])
def test_heads_of_other_sizes_are_left_to_xla(head_dim):
    model = config(head_dim=head_dim)
    shapes = {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in parameter_shapes(model).items()}
    params, tokens = flax.traverse_util.unflatten_dict(shapes, sep="/"), jax.ShapeDtypeStruct((1, 3), jnp.int32)
    kept = jax.eval_shape(lambda: KVCache.create(model, 1, 8))
    text = str(jax.make_jaxpr(lambda p, t, c: Phi3(model).apply({"params": p}, t, cache=c))(params, tokens, kept))
    assert ("phi3_cuda_attend_new" in text) == (head_dim == 64)

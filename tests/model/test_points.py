"""What the points leave in a program: nothing where nobody looks, and room for no more than what is looked at."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest
from without_points import Bare

import phi3_jax
from phi3_jax.inspection import Hooks, zero
from phi3_jax.inspection.running import compiled
from phi3_jax.kernels import PerLayer
from phi3_jax.model import decoder
from phi3_jax.model.points import Tap

B, T = 3, 11
TOKENS = jax.ShapeDtypeStruct((B, T), jnp.int32)


def per_layer(params):
    layers = jax.tree.map(lambda leaf: PerLayer(tuple(leaf)), params["layers"])
    return params | {"layers": layers}


def program(tiny, params, walk, with_cache=False, of=lambda function: function):
    cache = phi3_jax.KVCache.create(tiny.config, B, T) if with_cache else None

    def logits(params, tokens, cache):
        result = phi3_jax.Phi3(tiny.config, walk=walk).apply({"params": params}, tokens, cache=cache)
        return result[0].sum(), result[1]

    def plain(params, tokens, cache):
        return phi3_jax.Phi3(tiny.config, walk=walk).apply({"params": params}, tokens).sum()

    return jax.jit(of(logits if with_cache else plain)).lower(params, TOKENS, cache).as_text()


@pytest.mark.parametrize(
    ("walk", "with_cache", "of"),
    [
        pytest.param("slice", False, jax.grad, marks=pytest.mark.slow),
        pytest.param("slice", False, jax.jit, marks=pytest.mark.slow),
        ("index", True, jax.jit),
        pytest.param("index", False, jax.grad, marks=pytest.mark.slow),
        pytest.param("slice", True, jax.jit, marks=pytest.mark.slow),
        pytest.param("unroll", False, jax.jit, marks=pytest.mark.slow),
        pytest.param("unroll", True, jax.jit, marks=pytest.mark.slow),
    ],
)
def test_without_hooks_the_program_is_the_same_text_as_without_points(tiny, monkeypatch, walk, with_cache, of):
    params = per_layer(tiny.params) if walk == "unroll" else tiny.params
    with_points = program(tiny, params, walk, with_cache, of)
    monkeypatch.setattr(decoder, "Tap", Bare)
    monkeypatch.setattr(decoder, "NO_TAP", Bare())
    assert program(tiny, params, walk, with_cache, of) == with_points


def shapes(tiny, hooks):
    """The shapes of all arrays in the program, the largest layers' among them, as text."""
    text = compiled.lower(tiny.config, tiny.params, TOKENS, None, None, hooks).as_text()
    return set(re.findall(r"tensor<([\dx]+)x[fi]\d+>", text))


def test_only_what_is_asked_for_is_kept(tiny):
    c = tiny.config
    L, N, D, F = c.num_hidden_layers, c.num_attention_heads, c.hidden_size, c.intermediate_size
    every = {f"{L}x{B}x{T}x{D}", f"{L}x{B}x{N}x{T}x{T}", f"{L}x{B}x{T}x{F}", f"{L}x{B}x{T}x{N}x{c.head_dim}"}
    found = shapes(tiny, Hooks(("attn.pattern", "resid_post"), jnp.asarray([2, 0]), jnp.asarray([4]), jnp.asarray([5])))
    assert {f"2x{B}x1x1x{T}", f"2x{B}x1x{D}"} <= found  # layers, rows, one head or none, one place
    assert not every & found
    assert shapes(tiny, Hooks(("resid_post",))) & every == {f"{L}x{B}x{T}x{D}"}
    # An edit keeps nothing, and of the logits only those are computed that are read.
    found = shapes(tiny, Hooks(("logits",), positions=jnp.asarray([4]), edits=(zero(c, "attn.pattern", heads=[1]),)))
    assert not every & found
    assert f"{B}x1x{c.vocab_size}" in found
    assert f"{B}x{T}x{c.vocab_size}" not in found


def test_layers_are_counted_from_either_end(tiny):
    hooks = Hooks(("resid_post",), layers=jnp.asarray([-1, 0]))
    for number, expected in enumerate((1, 2, 0)):
        assert Tap(hooks, tiny.config, None, {}, number)._place() == expected


@pytest.mark.parametrize("reads", [("attn.qq",), ("blocks",)])
def test_hooks_know_their_points(reads):
    with pytest.raises(
        ValueError, match=r"there is no point '(attn.qq'; did you mean attn.q\?|blocks'; known are embed)"
    ):
        Hooks(reads)


def test_a_wrong_shape_of_an_edit_is_named(tiny):
    edit = zero(tiny.config, "resid_pre")
    for wrong, message in (
        (
            {"value": jnp.zeros((1, B, T + 1, 1))},
            r"resid_pre: an edit of shape \[1, 3, 12, 1\], where \[L, 3, 11, 24\]",
        ),
        ({"positions": jnp.zeros((B + 1, 1), jnp.int32)}, "positions for 4 rows, where there are 3"),
        ({"layers": jnp.ones(2, bool)}, "an edit for 2 layers, where there are 3: make it with this model's config"),
        ({"point": "attn.v", "heads": jnp.ones(6, bool)}, "attn.v: an edit for 6 heads, where there are 2"),
        ({"function": jax.tree_util.Partial(jnp.sum)}, r"the function makes \[\] of \[3, 11, 24\]"),
    ):
        with pytest.raises(ValueError, match=message):
            shapes(tiny, Hooks(edits=(dataclasses.replace(edit, **wrong),)))

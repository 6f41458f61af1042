"""The kernels of this device against float64, and whole answers against the model in float32 on the CPU."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import models
import numpy as np

import phi3_jax
from phi3_jax.infer import Options, Run, Sampling
from phi3_jax.kernels import QuantizedTensor
from phi3_jax.kernels.attention import attention
from phi3_jax.kernels.attention.arguments import KeysValues, Visibility
from phi3_jax.kernels.linear import gated, linear
from phi3_jax.model import KVCache
from phi3_jax.quantization import Format, quantize

_BFLOAT16 = 2.0**-8  # the largest relative error of rounding to it
_Case = tuple[int, tuple[int, int], str, int, bool]  # H, (N, K), the cache's dtype, T, whether it is a ring
_NAMES = "H {}, heads {}, {}, {} queries, ring {}"
_SMALL = 1e-3  # beside values of size 1
_TIMES = 8  # that a kernel is run, each as soon as the one before: where threads race, one result is another
_NEAR = 0.15  # of log-probabilities of a model in bfloat16, whose layers have random weights


def check(report: Any, rehearse: bool) -> None:
    """Adds how many cases of each kind were right; a fault for each that was not. A rehearsal has fewer."""
    kinds = {"linear": _linear_cases, "gated": _gated_cases, "attention": _attention_cases}
    kinds |= {"new tokens": _new_token_cases, "answers": _answer_cases}
    for kind, make in kinds.items():
        cases = make(rehearse)
        count, worst = 0, 0.0
        for name, error in cases:
            count, worst = count + 1, max(worst, error)
            if not error <= 1:  # NaN, too
                report.fault(f"contract {kind} {name}", f"{error:.2f} times the error that rounding explains")
        report.add(f"contract {kind}", {"cases": count, "largest error, of what rounding explains": worst})


def _always(function: Callable[..., jax.Array], *arguments: Any, **options: Any) -> np.ndarray:
    """What the function gives, in float64; NaN if it gives something else another time."""
    found = [np.asarray(each) for each in [function(*arguments, **options) for _ in range(_TIMES)]]
    same = all(each.tobytes() == found[0].tobytes() for each in found)
    return found[0].astype(np.float64) if same else np.full(found[0].shape, np.nan)


def _once(function: Callable[..., jax.Array], *arguments: Any, **options: Any) -> np.ndarray:
    return np.asarray(function(*arguments, **options), np.float64)


# ---------------------------------------------------------------- products


def _linear_cases(rehearse: bool) -> Iterator[tuple[str, float]]:
    rng = np.random.default_rng(0)
    forms = [None, *(Format(*each) for each in itertools.product((8, 4), (32, 64, 128), (True, False)))]
    product = jax.jit(linear, static_argnames="dtype")
    for form, rows in itertools.product(forms[::6] if rehearse else forms, (1, 8, 17, 130)):
        out, in_ = (97, 200) if rows % 2 else (192, 384)
        weight = jnp.asarray(rng.normal(size=(out, in_)) * 0.05, jnp.bfloat16)
        x = jnp.asarray(rng.normal(size=(rows, in_)), jnp.bfloat16)
        tensor = weight if form is None else quantize(weight.astype(jnp.float32), form)
        exact = _floats(tensor)
        if form is not None and jax.default_backend() == "tpu":
            tensor = tensor.by_columns()  # as its kernel reads them
        for dtype in (jnp.bfloat16, jnp.float32) if rows == 8 else (jnp.bfloat16,):
            # A library's product of floats may add in another order each time.
            found = (_once if form is None else _always)(product, x, tensor, dtype=dtype)
            yield f"{form or 'bfloat16'}, {rows} rows, {jnp.dtype(dtype)}", _of_product(found, np.float64(x), exact)


def _gated_cases(rehearse: bool) -> Iterator[tuple[str, float]]:
    """up * silu(gate), which one kernel may compute at once."""
    rng = np.random.default_rng(3)
    product = jax.jit(gated)
    for bits, symmetric, rows in itertools.product((4,) if rehearse else (4, 8), (True, False), (1, 32, 130)):
        tensor = quantize(jnp.asarray(rng.normal(size=(2 * 104, 352)) * 0.05, jnp.float32), Format(bits, 32, symmetric))
        x = jnp.asarray(rng.normal(size=(rows, 352)), jnp.bfloat16)
        found, weight = _always(product, x, tensor), _floats(tensor)
        gate, up = np.split(np.float64(x) @ weight.T, 2, axis=-1)
        gate_error, up_error = np.split(_allowed(np.float64(x), weight), 2, axis=-1)
        silu = gate / (1 + np.exp(-gate))  # whose slope is below 1.1
        allowed = 1.1 * np.abs(up) * gate_error + np.abs(silu) * up_error + 3 * _BFLOAT16 * np.abs(up * silu) + 1e-6
        yield f"{bits} bits, symmetric {symmetric}, {rows} rows", float((np.abs(found - up * silu) / allowed).max())


def _floats(tensor: Any) -> np.ndarray:
    """A weight in float64, computed here from its integers."""
    if not isinstance(tensor, QuantizedTensor):
        return np.asarray(tensor, np.float64)
    values = np.asarray(tensor.values)
    if tensor.bits == 4:
        values = np.stack([values & 15, values >> 4], axis=-1).reshape(len(values), -1)
    scales = np.repeat(np.asarray(tensor.scales, np.float64), tensor.group, axis=-1)
    if tensor.mins is None:
        floats = (values.astype(np.float64) - 2 ** (tensor.bits - 1)) * scales
    else:
        floats = values * scales + np.repeat(np.asarray(tensor.mins, np.float64), tensor.group, axis=-1)
    return floats[:, : tensor.columns]


def _of_product(found: np.ndarray, x: np.ndarray, weight: np.ndarray) -> float:
    """The largest error, of what rounding each weight and the result to bfloat16 explains (six deviations)."""
    return float((np.abs(found - x @ weight.T) / _allowed(x, weight)).max())


def _allowed(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return 6 * _BFLOAT16 / 2 * np.sqrt((x * x) @ (weight * weight).T) + _BFLOAT16 * np.abs(x @ weight.T)


# ---------------------------------------------------------------- attention over the cache


def _attention_cases(rehearse: bool) -> Iterator[tuple[str, float]]:
    rng = np.random.default_rng(1)
    compiled = jax.jit(attention)
    for case in itertools.product(
        (96,) if rehearse else (64, 96, 128), ((4, 4), (6, 2)), ("bfloat16", "int8"), (1, 5, 150), (False, True)
    ):
        q, kv, visible = _attention_arguments(rng, case)
        found = _always(compiled, q, kv, visible)
        exact, spread = _attended(np.float64(q), kv, visible)
        errors = np.abs(found - exact) / (4 * _BFLOAT16 * spread)
        yield _NAMES.format(*case), float(errors.max())


def _attention_arguments(rng: np.random.Generator, case: _Case) -> tuple[jax.Array, KeysValues, Visibility]:
    H, (N, K), dtype, T, ring = case
    L, B, S, window = 2, 3, 700, 300 if ring else None
    lengths = [T, 431, 1900 if ring else 700]  # the newest T of them are the queries
    k_positions, q_positions = np.full((B, S), -1, np.int32), np.full((B, T), -1, np.int32)
    for row, length in enumerate(lengths):
        tokens = np.arange(length)
        k_positions[row, tokens % S] = tokens  # later ones overwrite those that they follow in the ring
        q_positions[row] = tokens[-T:]
    if T > 1:
        q_positions[1, -1] = -1  # padding
    padded = -(-H // 128) * 128 if jax.default_backend() == "tpu" else H
    k, v = rng.normal(size=(2, L, B, K, S, padded))
    k[..., H:] = v[..., H:] = 0
    q = jnp.asarray(rng.normal(size=(B, T, N, H)), jnp.bfloat16)
    visible = Visibility(jnp.asarray(q_positions), jnp.asarray(k_positions), window=window)
    if dtype != "int8":
        kv = KeysValues(jnp.asarray(k, dtype), jnp.asarray(v, dtype), layer=jnp.int32(1))
        return q, kv, visible
    scales = [(np.abs(each).max(axis=-1) / 127).astype(np.float32) for each in (k, v)]
    whole = [jnp.asarray(np.round(x / s[..., None]), jnp.int8) for x, s in zip((k, v), scales, strict=True)]
    return q, KeysValues(*whole, *map(jnp.asarray, scales), layer=jnp.int32(1)), visible


def _attended(q: np.ndarray, kv: KeysValues, visible: Visibility) -> tuple[np.ndarray, np.ndarray]:
    """Attention in float64 -> (output [B, T, N, H], the size of the values that were averaged).

    Queries that see nothing may get any finite output: their size is infinite.
    """
    B, T, N, H = q.shape
    k, v = (np.asarray(each[1], np.float64)[..., :H] for each in (kv.k, kv.v))
    if kv.k_scale is not None and kv.v_scale is not None:
        k, v = k * np.asarray(kv.k_scale[1])[..., None], v * np.asarray(kv.v_scale[1])[..., None]
    q_at, k_at = np.asarray(visible.q_positions), np.asarray(visible.k_positions)
    out, spread = np.zeros_like(q), np.full_like(q, np.inf)
    for b, t, n in np.ndindex(B, T, N):
        seen = (k_at[b] >= 0) & (k_at[b] <= q_at[b, t])
        if visible.window is not None:
            seen &= k_at[b] > q_at[b, t] - visible.window
        if not seen.any():
            continue
        keys, values = k[b, n // (N // kv.k.shape[2]), seen], v[b, n // (N // kv.k.shape[2]), seen]
        scores = keys @ q[b, t, n] / np.sqrt(H)
        weights = np.exp(scores - scores.max())
        weights /= weights.sum()
        out[b, t, n] = weights @ values
        # One value that is 0 has no size, and so no error; but the bound must not be 0.
        spread[b, t, n] = np.sqrt(weights @ (values * values)) + np.abs(out[b, t, n]) + _SMALL
    return out, spread


def _new_token_cases(rehearse: bool) -> Iterator[tuple[str, float]]:
    """Rotated, stored and attended to: by kernels as by XLA, the rest of the cache untouched."""
    rng = np.random.default_rng(4)
    attend = jax.jit(KVCache.attend, static_argnames="kernels")
    kinds = (("int8", 4, 4), ("bfloat16", 6, 2))[: 1 if rehearse else 2]
    for (dtype, N, K), T in itertools.product(kinds, (1, 5, 70)):
        config = dataclasses.replace(models.config(True), num_attention_heads=N, num_key_value_heads=K, head_dim=96)
        q_at = np.stack([np.arange(T) + first for first in (0, 300, 777)]).astype(np.int32)
        q_at[1, T // 2 + 1 :] = -1  # padding
        cache = KVCache.create(config, len(q_at), 400, dtype)
        for first in (0, 377):  # the oldest are overwritten
            filled = jnp.broadcast_to(first + jnp.arange(400), (len(q_at), 400))
            cache = cache.claim(jnp.where(filled < q_at[:, :1], filled, -1))
        kept = [jnp.asarray(rng.integers(1, 99, each.shape), each.dtype) / 64 for each in (cache.k, cache.v)]
        if cache.k_scale is not None:
            kept = [jnp.asarray(rng.integers(-127, 128, each.shape), jnp.int8) for each in kept]
            scales = [jnp.full(each.shape, 0.02, jnp.float32) for each in (cache.k_scale, cache.v_scale)]
            cache = dataclasses.replace(cache, k_scale=scales[0], v_scale=scales[1])
        cache = dataclasses.replace(cache, k=kept[0], v=kept[1]).claim(jnp.asarray(q_at))
        qkv = jnp.asarray(rng.normal(size=(len(q_at), T, N + 2 * K, 96)), jnp.bfloat16)
        angles = rng.uniform(-3, 3, (len(q_at), T, 40))
        cos, sin = jnp.asarray(np.cos(angles), jnp.bfloat16), jnp.asarray(np.sin(angles), jnp.bfloat16)
        seen = Visibility(jnp.asarray(q_at), cache.positions, window=300)
        found, exact = (attend(cache, jnp.int32(1), qkv, cos, sin, seen, kernels=each) for each in (True, False))
        yield f"{dtype}, heads {N, K}, {T} tokens", _of_cache(found, exact, q_at >= 0)


def _of_cache(found: Any, exact: Any, is_token: np.ndarray) -> float:
    """The largest difference of outputs and caches, of what two roundings explain."""
    (out, kept), (wanted_out, wanted) = found, exact
    errors = [(np.float64(out) - np.float64(wanted_out))[is_token] / (8 * _BFLOAT16)]
    for one, other in zip(jax.tree.leaves(kept), jax.tree.leaves(wanted), strict=True):
        size = 4 if one.dtype == jnp.bfloat16 else 0  # of the products whose difference a rotated element is
        allowed = 3 if one.dtype == jnp.int8 else 3 * _BFLOAT16 * (np.abs(np.float64(other)) + size) + 1e-6
        errors.append((np.float64(one) - np.float64(other)) / allowed)
    return float(np.max([np.abs(each).max() for each in errors]))


# ---------------------------------------------------------------- whole answers


def _answer_cases(rehearse: bool) -> Iterator[tuple[str, float]]:
    """Every token of ragged rows must have the log-probability that the model in float32 gives it on the CPU."""
    sizes = {"hidden_size": 192, "intermediate_size": 256, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = dataclasses.replace(models.config(True), **sizes, sliding_window=40)
    prompts = [np.random.default_rng(n).integers(5, config.vocab_size, n).tolist() for n in (3, 70, 130)]
    for form in models.FORMS[2:] if rehearse else models.FORMS:
        checkpoint = models.checkpoint(config, form)
        for cache in ("bfloat16", "int8") if form == "int4" else ("bfloat16",):
            options = Options(prefill_chunk=64, logprobs=0, cache_dtype=cache)
            run = Run(checkpoint, prompts, [20, 9, 30], [Sampling(), Sampling(0.8, seed=3), Sampling()], options)
            tokens: list[list[int]] = [[] for _ in prompts]
            logprobs: list[list[float]] = [[] for _ in prompts]
            while not run.is_over:
                for row, new in enumerate(run.advance(8)):
                    tokens[row] += new.token_ids
                    logprobs[row] += [each.logprob for each in new.logprobs or []]
            exact = _logprobs(config, models.stacked(config, form), prompts, tokens)
            errors = [np.abs(np.subtract(a, b)).max() for a, b in zip(logprobs, exact, strict=True)]
            yield f"{form}, cache {cache}", float(max(errors)) / _NEAR


def _logprobs(
    config: phi3_jax.Phi3Config, params: Any, prompts: list[list[int]], answers: list[list[int]]
) -> list[np.ndarray]:
    flat = flax.traverse_util.flatten_dict(params)
    with jax.default_device(jax.devices("cpu")[0]):
        floats = {path: jnp.asarray(_stack(leaf), jnp.float32) for path, leaf in flat.items()}
        model, found = phi3_jax.Phi3(config, "slice"), []
        for prompt, answer in zip(prompts, answers, strict=True):
            tokens = jnp.asarray([prompt + answer])
            logits: Any = model.apply({"params": flax.traverse_util.unflatten_dict(floats)}, tokens)
            whole = np.asarray(jax.nn.log_softmax(logits[0]), np.float64)
            found.append(whole[np.arange(len(prompt), tokens.shape[1]) - 1, answer])
        return found


def _stack(leaf: Any) -> np.ndarray:
    """A leaf of parameters as floats."""
    if isinstance(leaf, QuantizedTensor) and leaf.values.ndim == 3:
        return np.stack([_floats(jax.tree.map(lambda part, i=i: part[i], leaf)) for i in range(len(leaf.values))])
    return _floats(leaf)

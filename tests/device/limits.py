"""What the device can do at most: bytes per second from memory, operations per second in bfloat16 products."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def best(function: Callable[[], Any], repeats: int = 5, calls: int = 10) -> float:
    """Seconds of one call: the least of `repeats` series of `calls`."""
    jax.block_until_ready(function())
    taken = []
    for _ in range(repeats):
        begin = time.perf_counter()
        for _ in range(calls):
            result = function()
        jax.block_until_ready(result)
        taken.append((time.perf_counter() - begin) / calls)
    return min(taken)


def measure(report: Any, rehearse: bool) -> None:
    """Adds "bandwidth", bytes/s of reading, and "rate", operations/s of a large product of bfloat16 matrices."""
    n = 1 << (20 if rehearse else 31)
    report.add("bandwidth", _bandwidth(n))
    n = 256 if rehearse else 8192
    a = jax.random.normal(jax.random.key(0), (n, n), jnp.bfloat16)
    product = jax.jit(jnp.matmul)
    report.add("rate", 2.0 * n**3 / best(lambda: product(a, a)))


def _bandwidth(size: int) -> float:
    numbers = jnp.ones(size // 2, jnp.bfloat16)
    total = jax.jit(lambda x: x.astype(jnp.float32).sum())
    return size / best(lambda: total(numbers))

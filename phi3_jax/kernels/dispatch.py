"""Chooses between a kernel and its reference in XLA, when a program is traced."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

Function = Callable[..., Any]
_PLATFORMS = {"cpu": "cpu", "gpu": "cuda", "tpu": "tpu"}  # jax.default_backend(): the platform that programs are for


def by_platform(
    reference: Function, *, cpu: Function | None = None, cuda: Function | None = None, tpu: Function | None = None
) -> Function:
    """A function that runs one platform's kernel in programs for that platform, and `reference` elsewhere.

    Derivatives are the reference's, too. Only the kernel of the platform that this process computes on is traced; it
    is the reference where that kernel is None. Whether a kernel can be used is asked by who calls this, and only where
    `jax.default_backend()` is its platform: looking for one may start a compiler.

    All arrays that the functions use must be their arguments, not captured from an enclosing function.
    """
    platform = _PLATFORMS.get(jax.default_backend())
    kernel = {"cpu": cpu, "cuda": cuda, "tpu": tpu}.get(platform or "")
    if kernel is None:
        return reference

    @jax.custom_jvp
    def call(*arguments: Any) -> Any:
        return jax.lax.platform_dependent(*arguments, **{str(platform): kernel}, default=reference)

    @call.defjvp
    def derivative(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> Any:
        return jax.jvp(reference, primals, tangents)

    return call

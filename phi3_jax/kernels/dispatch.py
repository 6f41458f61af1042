"""Chooses between a CPU kernel and its reference in XLA, when a program is compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax


def on_cpu(kernel: Callable[..., Any], reference: Callable[..., Any]) -> Callable[..., Any]:
    """A function that runs `kernel` in programs compiled for the CPU, and `reference` elsewhere and for derivatives.

    All arrays that the two use must be their arguments, not captured from an enclosing function.
    """

    @jax.custom_jvp
    def call(*arguments: Any) -> Any:
        return jax.lax.platform_dependent(*arguments, cpu=kernel, default=reference)

    @call.defjvp
    def derivative(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> Any:
        return jax.jvp(reference, primals, tangents)

    return call

"""Which of two ways of doing the same a compiled program takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax


def on_cpu(kernel: Callable[..., Any], reference: Callable[..., Any]) -> Callable[..., Any]:
    """The kernel where a program is compiled for the CPU, and the reference elsewhere and for derivatives.

    Everything that the two depend on must be an argument, not a variable of a function around them.
    """

    @jax.custom_jvp
    def call(*arguments: Any) -> Any:
        return jax.lax.platform_dependent(*arguments, cpu=kernel, default=reference)

    @call.defjvp
    def derivative(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> Any:
        return jax.jvp(reference, primals, tangents)

    return call

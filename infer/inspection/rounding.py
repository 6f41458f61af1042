"""Numbers as a report has them."""

from __future__ import annotations

from typing import Any

import numpy as np


def rounded(values: Any, digits: int = 5) -> Any:
    """A number, an array, or lists of them, with so many significant digits; None for what is not finite."""
    if isinstance(values, list | tuple):
        return [rounded(value, digits) for value in values]
    if isinstance(values, np.ndarray) and values.ndim:
        return [rounded(value, digits) for value in values.tolist()]
    return float(f"{float(values):.{digits}g}") if np.isfinite(values) else None

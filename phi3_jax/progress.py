"""The type of the callbacks by which long work reports its progress."""

from __future__ import annotations

from collections.abc import Callable

OnProgress = Callable[[int, int], None]  # called with (done, total), in the unit that the function names

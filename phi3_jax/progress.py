"""How long work tells how far it has come."""

from __future__ import annotations

from collections.abc import Callable

OnProgress = Callable[[int, int], None]  # called with (done, in all), in the unit that the function names

"""A progress bar on the terminal."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from tqdm import tqdm

from phi3_jax.progress import OnProgress


@contextlib.contextmanager
def progress_bar(what: str, unit: str = "B") -> Iterator[OnProgress]:
    """Yields a function that shows progress on standard error, once the work takes more than a second.

    Args:
      what: the label of the bar, for example "loading".
      unit: of the numbers.
    """
    with tqdm(desc=what, unit=unit, unit_scale=True, unit_divisor=1000, delay=1, disable=None, leave=False) as bar:

        def on_progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield on_progress

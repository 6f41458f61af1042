"""The picture of a run: loss over steps."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from phi3_jax.checkpoint.atomic_write import new_file

from ..observer import Record

_TRAINED, _HELD_OUT, _INK, _FAINT = "#9db8d9", "#c2452d", "#26251f", "#6f6b62"
_SMOOTHED = "#1f5fa8"
_WINDOW = 0.05  # of the run: what is averaged for the smooth line


def require_drawing() -> None:
    """Raises ImportError if matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError("a picture needs matplotlib: pip install 'phi3_jax[train]'")


def save_curve(records: Sequence[Record], path: str | os.PathLike[str], title: str) -> None:
    """Draws the losses of a metrics file as a PNG file: each step's, their moving mean, and the held-out losses.

    Raises:
      ImportError: matplotlib is not installed.
    """
    require_drawing()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.2), dpi=160, facecolor="white")
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots()
    steps, losses = series(records, "loss")
    window = max(1, round(_WINDOW * len(losses)))
    axes.plot(steps, losses, color=_TRAINED, linewidth=1.0, label="training, each step")
    if window > 1:
        axes.plot(steps, moving_mean(losses, window), color=_SMOOTHED, linewidth=1.8, label=f"mean of {window}")
    held_out, eval_losses = series(records, "eval_loss")
    if held_out:
        axes.plot(held_out, eval_losses, color=_HELD_OUT, marker="o", markersize=4, linewidth=1.6, label="held out")
        axes.annotate(f"{eval_losses[-1]:.3f}", (held_out[-1], eval_losses[-1]), (5, 5), textcoords="offset points",
                      fontsize=8.5, color=_HELD_OUT)  # fmt: skip
    axes.set_title(title, loc="left", fontsize=11, color=_INK)
    axes.set_xlabel("step", fontsize=9, color=_FAINT)
    axes.set_ylabel("loss", fontsize=9, color=_FAINT)
    axes.tick_params(labelsize=8, colors=_FAINT)
    axes.grid(color="#ececea", linewidth=0.8)
    axes.legend(frameon=False, fontsize=8.5)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.tight_layout()
    with new_file(Path(path), overwrite=True) as partial:
        canvas.print_png(os.fspath(partial))


def series(records: Sequence[Record], name: str) -> tuple[list[int], list[float]]:
    """The steps that have a number under a name, and these numbers."""
    found = [(record["step"], record[name]) for record in records if record.get(name) is not None]
    return [step for step, _ in found], [value for _, value in found]


def moving_mean(values: Sequence[float], window: int) -> list[float]:
    """The mean of each value and up to `window` - 1 before it."""
    sums = np.convolve(values, np.ones(window))[: len(values)] if values else np.zeros(0)
    return (sums / np.minimum(np.arange(1, len(values) + 1), window)).tolist()

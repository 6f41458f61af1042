"""The chart of phi3-benchmark: a panel for each case, a bar for each program, a line at the machine's limit."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from phi3_jax.checkpoint.atomic_write import new_file

from .rounds import Result

_OURS, _PEERS = "#1f5fa8", ("#b9b4a7", "#d0ccc2", "#e2dfd8", "#96918a")
_INK, _LIMIT, _FAINT = "#26251f", "#c2452d", "#6f6b62"
_BAR = 0.62  # of the distance between bars
_MOST_COLUMNS = 3


def save_chart(results: Sequence[Result], path: str | os.PathLike[str], title: str, subtitle: str, rounds: int) -> None:
    """Draws the results of all cases into a PNG file.

    Raises:
      ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("a chart needs matplotlib: pip install 'phi3_jax[plot]'") from None
    cases = list(dict.fromkeys(result.case for result in results))
    columns = 2 if len(cases) == 4 else min(_MOST_COLUMNS, len(cases))
    lines = math.ceil(len(cases) / columns)
    sides = max(sum(result.case == case for result in results) for case in cases)
    height = 0.5 + 0.42 * sides + 0.75
    width = 3.9 * columns + 1.2
    figure = Figure(figsize=(max(width, 7.0), lines * height + 1.15), dpi=160, facecolor="white")
    canvas = FigureCanvasAgg(figure)
    grid = figure.subplots(lines, columns, squeeze=False)
    for i, axes in enumerate(grid.flat):
        if i < len(cases):
            _panel(axes, [result for result in results if result.case == cases[i]])
        else:
            axes.set_visible(False)
    total = figure.get_figheight()
    figure.text(0.02, 1 - 0.30 / total, title, fontsize=14, fontweight="bold", color=_INK, va="center")
    figure.text(0.02, 1 - 0.56 / total, subtitle, fontsize=8.5, color=_FAINT, va="center")
    legend = f"bars: median of {rounds} rounds in turns; whiskers: least and greatest"
    has_limit = any(result.of_limit is not None for result in results)
    figure.text(0.02, 0.14 / total, legend, fontsize=8, color=_FAINT, va="center")
    if has_limit:
        text = "red line: what this machine's memory and arithmetic allow for these weights"
        figure.text(0.98, 0.14 / total, text, fontsize=8, color=_LIMIT, va="center", ha="right")
    figure.tight_layout(rect=(0.01, 0.30 / total, 0.99, 1 - 0.72 / total), h_pad=1.6, w_pad=2.0)
    with new_file(Path(path), overwrite=True) as partial:
        canvas.print_png(os.fspath(partial))


def _panel(axes: Any, results: Sequence[Result]) -> None:
    """One case: bars from the top down, in the order of the sides."""
    right = 0.0
    for row, result in enumerate(results):
        speed = result.tokens_per_second
        colour = _OURS if row == 0 else _PEERS[(row - 1) % len(_PEERS)]
        axes.barh(row, speed.median, height=_BAR, color=colour, zorder=2)
        axes.plot([speed.least, speed.greatest], [row, row], color=_INK, linewidth=1.1, zorder=3, solid_capstyle="butt")
        for end in (speed.least, speed.greatest):
            axes.plot([end, end], [row - 0.09, row + 0.09], color=_INK, linewidth=1.1, zorder=3)
        furthest = speed.greatest
        if result.of_limit is not None:
            limit = speed.median / result.of_limit.median
            axes.plot([limit, limit], [row - _BAR / 2, row + _BAR / 2], color=_LIMIT, linewidth=1.8, zorder=3)
            furthest = max(furthest, limit)
        text = _number(speed.median)
        if result.ratio is not None:
            text += f"  (ours {result.ratio.median:.2f}x)"
        axes.annotate(text, (furthest, row), (5, 0), textcoords="offset points", va="center", fontsize=8.5, color=_INK)
        right = max(right, furthest)
    axes.set_title(f"{results[0].case.name}, tokens/s", loc="left", fontsize=10, color=_INK)
    axes.set_yticks(range(len(results)), [result.side for result in results], fontsize=8.5, color=_INK)
    axes.set_ylim(len(results) - 0.45, -0.55)
    axes.set_xlim(0, right * 1.42)  # room for the numbers behind the bars
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=7.5, colors=_FAINT, length=2)
    axes.grid(axis="x", color="#ececea", linewidth=0.8, zorder=0)
    for side in ("top", "right", "bottom"):
        axes.spines[side].set_visible(False)
    axes.spines["left"].set_color(_FAINT)


def _number(x: float) -> str:
    return f"{x:.0f}" if x >= 100 else f"{x:.1f}" if x >= 10 else f"{x:.2f}"

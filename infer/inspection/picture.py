"""A still picture of a report, for a README or a talk: tokens, one head's attention, what layers would say, top ten."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

from phi3_jax.checkpoint.atomic_write import new_file

_INK, _FAINT, _LINE, _BLUE = "#23262b", "#5d636b", "#dedbd3", "#1f5fa8"
_MOST_TOKENS = 16  # columns of the picture: of a longer text its last tokens
_MOST_LAYERS = 16  # rows of the lens: evenly spaced, with the last one
_LONGEST = 11  # characters of a token that are shown


def save_png(report: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Draws the essentials of a report (report.py describes it) into a PNG file; sections that it lacks stay empty.

    Raises:
      ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.colors import LinearSegmentedColormap
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("a picture needs matplotlib: pip install 'phi3_jax[plot]'") from None
    first = max(0, len(report["tokens"]) - _MOST_TOKENS)
    names = [shown(token["text"]) for token in report["tokens"][first:]]
    colours = LinearSegmentedColormap.from_list("blue", ["#ffffff", _BLUE])
    figure = Figure(figsize=(13, 7.6), dpi=150, facecolor="white")
    canvas = FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2, 2, left=0.07, right=0.975, top=0.76, bottom=0.07, wspace=0.16, hspace=0.42)
    _title(figure, report, names, first)
    _lens(figure.add_subplot(grid[:, 1]), report, names, colours)
    _attention(figure.add_subplot(grid[0, 0]), report, names, first, colours)
    _top(figure.add_subplot(grid[1, 0]), report)
    with new_file(Path(path), overwrite=True) as partial:
        canvas.print_png(os.fspath(partial))


def shown(text: str) -> str:
    """A token's text on one line, its spaces at the ends as dots, and shortened."""
    inner = text.strip(" ")
    if not inner:
        return "·" * len(text) or "∅"
    before, after = text.index(inner[0]), len(text) - len(text.rstrip(" "))
    inner = inner.replace("\n", "↵").replace("\t", "⇥")
    inner = "".join(char if char.isprintable() else f"U+{ord(char):04X}" for char in inner)
    if len(inner) > _LONGEST:
        inner = inner[: _LONGEST - 1] + "…"
    return "·" * before + inner + "·" * after


def first_head(report: dict[str, Any]) -> tuple[int, int]:
    """The (layer, head) that added most to the predicted token's logit, which the page shows first too."""
    heads = report.get("attribution", {}).get("heads", [[0.0]])
    return max(
        ((layer, head) for layer, row in enumerate(heads) for head in range(len(row))),
        key=lambda at: -math.inf if heads[at[0]][at[1]] is None else heads[at[0]][at[1]],
    )


def _title(figure: Any, report: dict[str, Any], names: list[str], first: int) -> None:
    figure.text(0.025, 0.955, "How a language model chooses the next word", fontsize=19, color=_INK, family="serif")
    model = report["model"]
    subtitle = f"{model['name']}: {model['layers']} layers, {model['heads']} heads, {model['weights']}"
    figure.text(0.025, 0.92, subtitle, fontsize=10, color=_FAINT)
    words = [_boxed(figure, name, _INK, "white", _LINE) for name in names]
    answer = None
    if "next" in report:
        token, _, probability = report["next"]["top"][0]
        said = f"{shown(report['vocabulary'].get(str(token), str(token)))}  {probability:.2f}"
        answer = _boxed(figure, said, "white", _BLUE, _BLUE)
    renderer, gap = figure.canvas.get_renderer(), 0.018
    widths = [each.get_window_extent(renderer).width / figure.bbox.width for each in (*words, answer) if each]
    start = 0  # what does not fit into the line is left out at its beginning
    while 0.06 + sum(widths[start:]) + gap * len(widths[start:]) > 0.98 and start < len(words):
        words[start].remove()
        start += 1
    x = 0.025
    if first + start:
        figure.text(x, 0.862, "…", fontsize=11, color=_INK)
        x += 0.025
    for t in range(start, len(words)):
        words[t].set_x(x)
        number = str(report["tokens"][first + t]["id"])
        figure.text(x + widths[t] / 2, 0.826, number, fontsize=7.5, color=_FAINT, ha="center")
        x += widths[t] + gap
    if answer:
        answer.set_x(x + 0.012)


def _boxed(figure: Any, word: str, ink: str, paper: str, edge: str) -> Any:
    """A word in the line of tokens, for which a place is to be found."""
    box = {"boxstyle": "round,pad=0.35", "facecolor": paper, "edgecolor": edge}
    return figure.text(0, 0.862, word, fontsize=11, color=ink, bbox=box, parse_math=False)


def _attention(axes: Any, report: dict[str, Any], names: list[str], first: int, colours: Any) -> None:
    layer, head = first_head(report)
    among = f", among the last {len(names)}" if first else ""
    _plain(axes, f"Layer {layer}, head {head}: what each token looks at{among}")
    if "attention" not in report:
        return
    size = len(names)
    for t, row in enumerate(report["attention"]["thousandths"][layer][head][first:]):
        for k, weight in enumerate(row[first:]):
            share = (weight / 1000) ** 0.5  # small weights would not be seen
            axes.add_patch(_square(k, t, colours(share)))
            if weight >= 5 and size <= 10:
                ink = "white" if share > 0.72 else _INK
                axes.text(k + 0.5, t + 0.5, f"{weight / 1000:.2f}", ha="center", va="center", fontsize=7.5, color=ink)
    axes.set_xlim(0, size)
    axes.set_ylim(size, 0)
    _words(axes.set_yticks, size, names)
    _words(axes.set_xticks, size, names, rotation=40, ha="right")


def _lens(axes: Any, report: dict[str, Any], names: list[str], colours: Any) -> None:
    _plain(axes, "What each layer would say next (logit lens)")
    if "lens" not in report:
        return
    layers = report["model"]["layers"]
    step = -(-layers // _MOST_LAYERS)
    rows = list(range(layers - 1, -1, -step))[::-1]
    columns = min(len(names), 7)  # wider ones than attention's: the last tokens
    for y, layer in enumerate(rows):
        for x, guesses in enumerate(report["lens"]["post"][layer][-columns:]):
            token, probability = guesses[0]
            axes.add_patch(_square(x, y, colours(probability)))
            word = shown(report["vocabulary"].get(str(token), str(token)))
            ink = "white" if probability > 0.72 else _INK
            axes.text(x + 0.5, y + 0.5, word, ha="center", va="center", fontsize=8.5, color=ink, parse_math=False)
    axes.set_xlim(0, columns)
    axes.set_ylim(len(rows), 0)
    axes.set_ylabel("layer", fontsize=9, color=_FAINT)
    _words(axes.set_yticks, len(rows), [str(layer) for layer in rows])
    _words(axes.set_xticks, columns, names[-columns:])


def _top(axes: Any, report: dict[str, Any]) -> None:
    _plain(axes, "The ten likeliest next tokens")
    if "next" not in report:
        return
    top = report["next"]["top"][:10]
    for y, (_, logit, probability) in enumerate(top):
        axes.barh(y + 0.5, probability, height=0.62, color=_BLUE)
        text = f"{probability:{'.3f' if probability >= 0.001 else '.1g'}}   logit {logit:.2f}"
        axes.annotate(
            text, (probability, y + 0.5), (5, 0), textcoords="offset points", va="center", fontsize=8, color=_FAINT
        )
    axes.set_xlim(0, top[0][2] * 1.35)
    axes.set_ylim(len(top), 0)
    axes.set_xticks([])
    _words(axes.set_yticks, len(top), [shown(report["vocabulary"].get(str(row[0]), str(row[0]))) for row in top])


def _square(x: int, y: int, colour: Any) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((x, y), 1, 1, facecolor=colour, edgecolor=_LINE, linewidth=0.5)


def _words(set_ticks: Any, size: int, words: list[str], **options: Any) -> None:
    """Words in the middle of each cell of an axis."""
    set_ticks([i + 0.5 for i in range(size)], words, fontsize=8.5, color=_INK, parse_math=False, **options)


def _plain(axes: Any, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=11, color=_INK)
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)

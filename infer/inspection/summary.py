"""A report, and a table of weights, as lines for a terminal; colours are escape sequences, where they are wanted."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import Any

Report = dict[str, Any]
_BOLD, _FAINT, _BLUE, _GREEN, _RED = "1", "2", "34", "32", "31"
_TOP, _HEADS, _MOST_ROWS = 8, 6, 48  # next tokens, heads and tokens of the prompt that are listed
_BAR, _WORD = 24, 18  # characters
_SURE = 0.5  # a guess with this probability is shown in bold


class Style:
    """How a text is coloured: not at all where `colour` is False."""

    def __init__(self, colour: bool) -> None:
        self.colour = colour

    def __call__(self, text: str, *codes: str) -> str:
        """The text in these colours."""
        return f"\033[{';'.join(codes)}m{text}\033[0m" if self.colour and codes else text


def lines(report: Report, colour: bool = False) -> list[str]:
    """What a report says, in short: tokens, the next token, what each layer would say, the heads that matter."""
    style, model = Style(colour), report["model"]
    window = f", window {model['window']}" if model["window"] else ""
    found = [
        style(model["name"], _BOLD)
        + f": {_millions(model['total'])} parameters, {model['layers']} layers x {model['heads']} heads, width "
        + f"{model['width']}{window}, {model['weights']}",
        "",
        *_tokens(report, style),
        "",
        *_next(report, style),
        "",
        *_lens(report, style),
        "",
        *_heads(report, style),
    ]
    if "generation" in report:
        found += ["", *_generation(report, style)]
    if "comparison" in report:
        found += ["", *_comparison(report, style)]
    return found


def weights_lines(table: Report, colour: bool = False) -> list[str]:
    """A table of weights (weights.py), what the model's parts have of them, and what a token takes."""
    style, model = Style(colour), table["model"]
    rows = [["parameter", "shape", "kept as", "MB", "norm", "largest", "error"]]
    for row in table["parameters"]:
        rows.append(
            [
                row["name"],
                " x ".join(map(str, row["shape"])),
                row["dtype"],
                f"{row['bytes'] / 1e6:.2f}",
                *(_number(row[each]) for each in ("norm", "largest")),
                "" if row["error"] is None else f"{row['error']:.2%}",
            ]
        )
    total = table["total"]
    rows.append(["in all", f"{total['count']:,}", model["weights"], f"{total['bytes'] / 1e6:.2f}", "", "", ""])
    found = [style(model["name"], _BOLD) + f": {_millions(model['total'])} parameters", "", *_columns(rows, style)]
    if table["errors"] is not None:
        found += [f"error: {table['errors']}"]
    parts = [["part", "numbers", "parameters", "share"]]
    for part in model["parameters"]:
        parts.append([part["part"], part["formula"], f"{part['count']:,}", f"{part['count'] / model['total']:.1%}"])
    parts.append(["in all", "", f"{model['total']:,}", ""])
    token, cache = table["token"], table["cache"]

    def giga(number: int) -> str:
        return f"{number / 1e9:.3f}"

    def mega(number: int) -> str:
        return f"{number / 1e6:.2f}"

    return [
        *found,
        "",
        *_columns(parts, style),
        "",
        f"a token behind {token['context']} others: {giga(token['flops'])} GFLOP, {giga(token['flops_of_weights'])}"
        f" with weights and {giga(token['flops_of_attention'])} in attention,",
        f"and reads {mega(token['weight_bytes'])} MB of weights and {mega(token['cache_bytes'])} MB of the cache",
        f"the cache: {cache['bytes_per_token']:,} bytes for each token, {cache['dtype']}",
    ]


def _tokens(report: Report, style: Style) -> list[str]:
    """A line for each token: its place, id, text and surprise."""
    tokens, surprise = report["tokens"], report.get("surprise", [None] * len(report["tokens"]))
    found = [style("tokens, and how much each surprises the model (nats)", _BOLD)]
    first = max(0, len(tokens) - _MOST_ROWS)
    if first:
        found.append(style(f"  ... {first} more before", _FAINT))
    for place in range(first, len(tokens)):
        value, token = surprise[place], tokens[place]
        bar = "" if value is None else f"{value:6.2f} {_bar(value / 16, style, _RED if value > 6 else _BLUE)}"
        number = style(f"{token['id']:7}", _FAINT)
        found.append(f"{place:4} {number} {shown(token['text'], _WORD)} {bar}".rstrip())
    return found


def _next(report: Report, style: Style) -> list[str]:
    found = [style("the next token", _BOLD)]
    for token, logit, probability in report["next"]["top"][:_TOP]:
        bar = _bar(probability, style, _GREEN)
        found.append(
            f"  {_word(report, token)} {probability:7.2%} {style(f'logit {logit:7.2f}', _FAINT)} {bar}".rstrip()
        )
    return found


def _lens(report: Report, style: Style) -> list[str]:
    """What each layer would say after the last token, after its attention and after its MLP."""
    lens = report["lens"]

    def guess(token: int, probability: float) -> str:
        text = f"{_word(report, token)} {probability:7.2%}"
        return style(text, _BOLD, _GREEN) if probability >= _SURE else text

    head = f"{'layer':>7}  {'after attention':{_WORD + 8}}  after the MLP"
    found = [style("what each layer would say next (logit lens)", _BOLD), style(head, _FAINT)]
    for layer, (mid, post) in enumerate(zip(lens["mid"], lens["post"], strict=True)):
        found.append(f"{layer:7}  {guess(*mid[-1][0])}  {guess(*post[-1][0])}")
    return found


def _heads(report: Report, style: Style) -> list[str]:
    """The heads that add most to the predicted token's logit, or take most off it, and where each looks."""
    attribution, weights = report["attribution"], report["attention"]["thousandths"]
    scores = [(value, layer, head) for layer, row in enumerate(attribution["heads"]) for head, value in enumerate(row)]
    word = _word(report, attribution["id"]).strip()
    found = [style(f"the heads that do most for {word} (logit {attribution['logit']:.2f})", _BOLD)]
    for value, layer, head in sorted(scores, key=lambda each: -abs(each[0]))[:_HEADS]:
        last = weights[layer][head][-1]
        place = max(range(len(last)), key=lambda index: last[index])
        looked = f"looks at {shown(report['tokens'][place]['text'])} {last[place] / 1000:.2f}"
        found.append(
            f"  layer {layer:2} head {head:2} {style(f'{value:+7.2f}', _GREEN if value > 0 else _RED)}  {looked}"
        )
    return found


def _generation(report: Report, style: Style) -> list[str]:
    generation = report["generation"]
    found = [style("how it goes on", _BOLD)]
    for name, text in generation["texts"].items():
        label = name if name == "greedy" else f"at {generation['temperature']:g}"
        found.append(f"  {label:8} {shown(text)}")
    return found


def _comparison(report: Report, style: Style) -> list[str]:
    comparison = report["comparison"]
    top = ", ".join(f"{_word(report, token).strip()} {probability:.1%}" for token, probability in comparison["top"][:3])
    found = [
        style(f"beside {comparison['name']}", _BOLD),
        f"  it would say {top}; the next tokens' divergence is {comparison['kl'][-1]:.4f} nats",
    ]
    if comparison["note"] is not None:
        return [*found, f"  {comparison['note']}"]
    found.append(style(f"{'layer':>7}  {'cosine':>8}  divergence of what both would say", _FAINT))
    for layer, values in enumerate(comparison["layers"]):
        line = f"{layer:7}  {values['cosine'][-1]:8.5f}  {values['kl'][-1]:.4f}"
        found.append(style(line, _BOLD) if layer == comparison["parted"] else line)
    return found


def shown(text: str, width: int | None = None) -> str:
    """A token's text between bars, in `width` columns of a terminal: nothing in it moves the cursor or sets colours."""
    plain = "".join({"\n": "\\n", "\t": "\\t", "\r": "\\r"}.get(each, each) for each in text)
    plain = "".join(each if each.isprintable() else ascii(each)[1:-1] for each in plain)
    if width is None:
        return f"|{plain}|"
    room = width - 2
    while _columns_of(plain) > room:
        plain = plain[:-2] + "~" if plain.endswith("~") else plain[:-1] + "~"
    return f"|{plain}|" + " " * (room - _columns_of(plain))


def _word(report: Report, token: int) -> str:
    return shown(report["vocabulary"].get(str(token), f"<{token}>"), _WORD)


def _columns_of(text: str) -> int:
    """How many columns of a terminal a text takes: two for a Chinese character, none for an accent."""
    return sum(
        0 if unicodedata.combining(each) else 2 if unicodedata.east_asian_width(each) in "WF" else 1 for each in text
    )


def _bar(share: float, style: Style, colour: str) -> str:
    return style("#" * round(_BAR * min(max(share, 0), 1)), colour)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _millions(count: int) -> str:
    return f"{count / 1e9:.2f} billion" if count >= 1e9 else f"{count / 1e6:.1f} million"


def _columns(rows: Sequence[Sequence[str]], style: Style) -> list[str]:
    """A table: the first column to the left, numbers to the right; the first and the last row stand out."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    left = {0, 1, 2} if len(rows[0]) > 4 else {0, 1}
    found = []
    for number, row in enumerate(rows):
        cells = [
            cell.ljust(w) if i in left else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        line = "  ".join(cells).rstrip()
        found.append(style(line, _BOLD) if number in (0, len(rows) - 1) else line)
    return found

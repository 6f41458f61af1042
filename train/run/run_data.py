"""What a run is trained and evaluated on, from the files that its settings name, and the lines that tell of it."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np

import phi3_jax

from ..data import Dataset, Mixture, Part, counted, epoch_size, prepare, require_held_out, tell
from ..settings import Settings, resolved, with_few_rows
from .observer import Observer

_MANY_PASSES = 20


def prepare_data(
    checkpoint: phi3_jax.Checkpoint, settings: Settings, observer: Observer
) -> tuple[Mixture, Mixture | None]:
    """What is trained on, and what is held out, if anything; tells what is in them."""
    is_split, held_out = settings.eval_fraction > 0, None
    data = _prepare_files(settings.train_files, "train" if is_split else "all", checkpoint, settings, observer)
    settings = with_few_rows(settings, epoch_size(data.counts, settings))
    for text in tell_training(data, settings):
        observer.note(text)
    if is_split:
        held_out = _prepare_files(settings.train_files, "held_out", checkpoint, settings, observer)
    elif settings.eval_files:
        held_out = _prepare_files(settings.eval_files, "all", checkpoint, settings, observer)
    if held_out is not None:
        require_held_out(data, held_out, settings)
        for text in tell_held_out(data, held_out, settings):
            observer.note(text)
    return data, held_out


def _prepare_files(
    names: tuple[str, ...], part: Part, checkpoint: phi3_jax.Checkpoint, settings: Settings, observer: Observer
) -> Mixture:
    assert checkpoint.tokenizer is not None  # `_load` checks
    folder, on_progress = Path(settings.output) / "data", functools.partial(observer.progress, "preparing")
    parts, rows = [], checkpoint.config.vocab_size
    for name in names:
        data = prepare(name, checkpoint.tokenizer, settings, folder, on_progress, part)
        if checkpoint.tokenizer.vocab_size > rows and data.highest_id() >= rows:  # an added token without a row
            piece = checkpoint.tokenizer.piece(data.highest_id())
            raise ValueError(
                f"{name}: it has the token id {data.highest_id()} ({piece!r}), but the model's embedding has {rows} "
                "rows: enlarge the embedding, or take the token out of the tokenizer"
            )
        parts.append(data)
    return Mixture(names, tuple(parts))


def tell_training(data: Mixture, settings: Settings) -> list[str]:
    """Lines about what is trained on and how long; the last that begins with "train: " has the whole. Then warnings."""
    lines = _tell_files(data)
    if len(lines) == 1:
        told = f"train: {lines[0]}; {_tell_length(data, settings)}{tell(data.parts[0].report)}"
        return [told, *_warn_of_length(data, settings)]
    lines = [f"train: {line}{tell(part.report)}" for line, part in zip(lines, data.parts, strict=True)]
    lines.append(f"an epoch has of {_tell_mixture(data, settings)}")
    lines.append(f"train: together {_tell_size(data.parts)}; {_tell_length(data, settings)}")
    return lines + _warn_of_length(data, settings)


def tell_held_out(data: Mixture, held_out: Mixture, settings: Settings) -> list[str]:
    """Lines about what is held out of, or beside, what is trained on; then warnings."""
    rows = min(len(held_out), settings.eval_rows or len(held_out))
    chosen = f"; {rows} of the rows are evaluated" if rows < len(held_out) else ""
    lines = _tell_files(held_out)
    if len(lines) == 1:
        lines = [f"held out: {lines[0]}{chosen}{tell(held_out.parts[0].report)}"]
    else:
        lines = [f"held out: {line}{tell(part.report)}" for line, part in zip(lines, held_out.parts, strict=True)]
        lines.append(f"held out: together {_tell_size(held_out.parts)}{chosen}")
    if known := int(np.isin(held_out.lines, data.lines).sum()):
        lines.append(
            f"WARNING: of the {counted(len(held_out.lines), 'line')} held out {known} are trained on, too, so that the "
            "held-out loss is too low; remove them from one of the files"
        )
    return lines


def _tell_files(data: Mixture) -> list[str]:
    return [f"{name}: {_tell_size([part])}" for name, part in zip(data.names, data.parts, strict=True)]


def _tell_size(parts: Sequence[Dataset]) -> str:
    """How much data there is, of one file or several."""
    reports, length = [part.report for part in parts], parts[0].sequence_length
    lines, texts, rows, tokens, learned = (
        sum(getattr(report, name) for report in reports)
        for name in ("lines", "texts", "rows", "tokens", "learned_tokens")
    )
    full = sum(report.efficiency * report.rows for report in reports) / max(1, rows)
    size = f"{counted(lines, 'line')}, {counted(texts, 'text')}, {counted(tokens, 'token')} ({learned} learned), "
    return f"{size}{counted(rows, 'row')} of {length}, {full:.0%} full"


def _tell_mixture(mixture: Mixture, settings: Settings) -> str:
    """What share of an epoch each file has."""
    times = settings.mixture or (1.0,) * len(mixture.parts)
    tokens = [part.report.tokens for part in mixture.parts]
    all_rows, all_tokens = (sum(map(math.prod, zip(each, times, strict=True))) for each in (mixture.counts, tokens))
    told = []
    for name, each, rows, count in zip(mixture.names, times, mixture.counts, tokens, strict=True):
        share = f"{rows * each / all_rows:.0%} of its rows, {count * each / all_tokens:.0%} of its tokens"
        told.append(f"{name} {counted(rows, 'row')}" + (f" {each:g} times" if each != 1 else "") + f" ({share})")
    return ", ".join(told)


def _tell_length(data: Mixture, settings: Settings) -> str:
    epoch, each = float(epoch_size(data.counts, settings)), _step_rows(settings)
    steps = settings.all_steps(epoch_size(data.counts, settings))
    passes = steps * each / epoch
    text = f"{counted(steps, 'step')} of {counted(each, 'row')} = "
    text += f"{passes:.0f}" if passes >= 100 else f"{passes:.3g}"
    return f"{text} passes over the data" + (f" ({epoch:.6g} rows in a pass)" if settings.mixture else "")


def _warn_of_length(data: Mixture, settings: Settings) -> list[str]:
    epoch, each = epoch_size(data.counts, settings), _step_rows(settings)
    name, there, rows = "the data", epoch, Fraction(each)  # how many rows it has, and a step has of it
    if settings.mixture:  # an epoch is no pass over a file: what counts is the file that comes most often
        times, name, count = max(zip(settings.mixture, data.names, data.counts, strict=True))
        there, rows = Fraction(count), each * count * Fraction(str(times)) / epoch
    warnings = []
    if rows > there:
        warnings.append(
            f"WARNING: a step takes {float(rows):.6g} rows, and a pass over {name} has {float(there):.6g}, so that it "
            "has some of them twice: lower batch_size, accumulation or sequence_length, or give more data"
        )
    if settings.warmup_steps >= (steps := settings.all_steps(epoch)):
        warnings.append(
            f"WARNING: the learning rate never comes up to lr={settings.lr:g}, because it rises for warmup_steps="
            f"{settings.warmup_steps} steps, and the run has {counted(steps, 'step')}: lower one, or raise the other"
        )
    if steps * rows > _MANY_PASSES * there:
        warnings.append(
            f"WARNING: in so many passes over {name} a model learns the lines by heart: watch the held-out loss "
            "(eval_fraction=0.1 holds lines out), or take fewer steps, as epochs=3 does"
        )
    return warnings


def _step_rows(settings: Settings) -> int:
    s = resolved(settings)
    return s.batch_size * s.accumulation

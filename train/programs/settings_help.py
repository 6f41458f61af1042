"""The settings by topic, as phi3-train --help shows them: all but the topics comes from settings.py."""

from __future__ import annotations

import dataclasses
import inspect
import re
import textwrap
import types
import typing
from typing import Any, Literal

from ..settings import Settings
from ..values import spell

TOPICS = {
    "The model": ("checkpoint", "init_adapter", "dtype", "compute_dtype", "quantize"),
    "The data": (
        "train_file", "mixture", "eval_file", "eval_fraction", "eval_rows", "sequence_length", "pack", "truncate",
        "loss_on", "parse_special", "on_bad_line",
    ),
    "What is trained": (
        "train", "lora_rank", "lora_alpha", "lora_targets", "lora_tied", "rank_pattern",
        "alpha_pattern", "lora_rslora", "lora_dropout", "dora",
        "neftune_alpha",
    ),
    "A step": ("batch_size", "accumulation", "seed"),
    "The loss": ("method", "dpo_beta", "dpo_reference", "z_loss", "label_smoothing"),
    "The update rule": (
        "optimizer", "lr", "schedule", "warmup_steps", "final_lr", "weight_decay", "beta1", "beta2", "epsilon",
        "clip_norm",
    ),
    "Memory": ("remat", "loss_chunk", "shard_weights"),
    "The run": (
        "output", "steps", "epochs", "log_every", "eval_every", "save_every", "keep_last", "keep_best", "patience",
        "samples", "sample_prompts", "trackers", "max_bad_steps",
    ),
}  # fmt: skip
_WIDTH = 96


def settings_help() -> str:
    """Every setting: its type, its default in brackets, and what settings.py says about it."""
    hints, said = typing.get_type_hints(Settings), descriptions()
    defaults = {field.name: field.default for field in dataclasses.fields(Settings)}
    lines = []
    for topic, names in TOPICS.items():
        lines += ["", f"Settings: {topic[0].lower()}{topic[1:]}"]
        for name in names:
            shown = spell(defaults[name])
            lines.append(f"  {name}={spelled_type(hints[name])}" + (f" ({shown})" if shown else ""))
            text = said[name][0].upper() + said[name][1:].replace("`", "")
            lines += textwrap.wrap(text, _WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines[1:])


def descriptions() -> dict[str, str]:
    """What the docstring of Settings says about each field."""
    _, _, attributes = inspect.cleandoc(Settings.__doc__ or "").partition("Attributes:\n")
    found: dict[str, str] = {}
    names: list[str] = []
    for line in attributes.splitlines():
        if entry := re.match(r"  (\w+(?:, \w+)*): (.*)", line):
            names = entry[1].split(", ")
            found |= dict.fromkeys(names, entry[2])
        else:
            found |= {name: f"{found[name]} {line.strip()}" for name in names}
    return {name: text.strip() for name, text in found.items()}


def spelled_type(hint: Any) -> str:
    """A type as --help spells it: N, X, TEXT, true|false, or the words that may be given."""
    if typing.get_origin(hint) is Literal:
        return "|".join(typing.get_args(hint))
    if hint == str | tuple[str, ...]:
        return "TEXT,..."
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return "|".join(map(spelled_type, typing.get_args(hint)))
    if isinstance(hint, types.GenericAlias):
        return f"{spelled_type(typing.get_args(hint)[0])},..."
    return {bool: "true|false", int: "N", float: "X"}.get(hint, "TEXT")

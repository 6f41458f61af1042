"""What is checked before a run loads anything: settings against one another, the data's names, and the checkpoint.

A setting differs from its default because somebody gave it. If nothing reads it in this run, that is an error: the
person expects an effect.
"""

from __future__ import annotations

import dataclasses
import itertools
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from phi3_jax.checkpoint import holds_integers, read_config
from phi3_jax.config import Phi3Config
from phi3_jax.model import parameter_shapes

from . import sharding
from .data import find_files, read_entries, require_different_files
from .data.forms import read_form
from .settings import Settings, adapter_config, resolved
from .values import spell


class _With(NamedTuple):
    """Fields that are only read where another one has one of these values."""

    names: tuple[str, ...]
    other: str
    values: tuple[str, ...]


_READ_WITH = (
    _With(("lora_rank", "lora_alpha", "lora_targets", "lora_tied"), "train", ("lora",)),
    _With(("rank_pattern", "alpha_pattern", "lora_rslora", "lora_dropout", "dora"), "train", ("lora",)),
    _With(("dpo_beta",), "method", ("dpo",)),
    _With(("loss_on", "z_loss", "label_smoothing"), "method", ("sft",)),
    _With(("beta1",), "optimizer", ("adamw", "adamw8bit", "lion", "sgd")),
    _With(("beta2",), "optimizer", ("adamw", "adamw8bit", "lion")),
    _With(("epsilon",), "optimizer", ("adamw", "adamw8bit")),
    _With(("final_lr",), "schedule", ("cosine", "linear")),
)
_LOOK = 1000  # so many lines are looked at for one that can be used
_OF_EVALUATION = ("patience", "keep_best")  # of which 0 asks for nothing, which is never missed


def check_before_loading(settings: Settings) -> None:
    """All that can be known before hours are spent.

    Raises:
      FileNotFoundError: a file or the checkpoint is not there.
      ImportError: a package is missing that reads it.
      ValueError: settings that contradict one another, the data's first lines or the checkpoint's sizes.
    """
    check_together(settings)
    check_files(settings)
    check_checkpoint(settings)


def check_together(settings: Settings) -> None:
    """Raises ValueError if settings contradict one another or the machine, or if nothing reads one that was given."""
    s = settings
    if not s.train_files:
        raise ValueError("train_file: not given; name a file of JSON lines")
    for problem in _contradictions(s):
        raise ValueError(problem)
    for row in _READ_WITH:
        if getattr(s, row.other) not in row.values:
            for name in _given(s, row.names):
                there, wanted = f"{row.other}={getattr(s, row.other)}", " or ".join(row.values)
                raise ValueError(
                    f"{spelled(s, name)}: has no effect with {there}, only with {row.other}={wanted}; leave one out"
                )
    evaluated = bool(s.eval_files or s.eval_fraction)
    for name in _given(s, _OF_EVALUATION if not evaluated else ()):
        raise ValueError(f"{spelled(s, name)}: nothing is evaluated; name an eval_file, or give eval_fraction")
    sharding.of_rows(sharding.make_mesh(), resolved(s).batch_size)  # refuses what the devices cannot share


def check_files(settings: Settings) -> None:
    """Finds the files that a run reads, fetches those of a hub, and looks into each data set.

    Raises:
      FileNotFoundError: a file is not there.
      ImportError: a package is missing that reads it.
      ValueError: a file is not one of data, is named twice, or its first line has no form that the method learns from;
        with on_bad_line="skip", none of its lines has.
    """
    require_different_files(settings)
    for name in (*settings.train_files, *settings.eval_files):
        _look_into(find_files(name)[0], settings)
    if settings.sample_prompts and not Path(settings.sample_prompts).is_file():
        raise FileNotFoundError(
            f"sample_prompts={settings.sample_prompts}: no such file; name one with a prompt a line"
        )


def _look_into(path: Path, settings: Settings) -> None:
    skips, problems = settings.on_bad_line == "skip", []
    for entry in itertools.islice(read_entries(path), _LOOK if skips else 1):
        try:
            read_form(entry.fields(), settings.method)
        except ValueError as error:
            problems.append(f"{path}, {entry.unit} {entry.number}: {error}")
        else:
            return
    if not problems:
        raise ValueError(f"{path}: no line of it can be used: it is empty")
    if not skips:
        raise ValueError(f"{problems[0]} (on_bad_line=skip leaves such lines out)")
    if len(problems) < _LOOK:
        raise ValueError(f"{problems[0]}; and no other line of it can be used")


def check_checkpoint(settings: Settings) -> None:
    """Compares the settings with what the checkpoint says of itself; of a hub id only config.json is fetched for this.

    Raises:
      FileNotFoundError: there is no such checkpoint.
      ImportError: it is a GGUF file, and the extra `gguf` is not installed.
      ValueError: rows longer than the context, a rank beyond the matrices, integers where floats are needed; or the
        checkpoint cannot be loaded.
    """
    with warnings.catch_warnings(action="ignore"):  # `load` repeats them
        config = read_config(settings.checkpoint)
    check_sizes(settings, config)
    needs_floats = settings.train == "all" or settings.dora
    if needs_floats and Path(settings.checkpoint).exists() and holds_integers(settings.checkpoint):
        told = "train=all: integers cannot be trained" if settings.train == "all" else "dora=true: needs floats"
        raise ValueError(f"{told}, and {settings.checkpoint} holds integers: name what they were made from")


def check_sizes(settings: Settings, config: Phi3Config) -> None:
    """Raises ValueError if rows are longer than the context, or an adapter's rank or ties are not of this model."""
    s, longest = settings, config.max_position_embeddings
    if s.sequence_length > longest:
        # With LongRoPE, too: each text has the factors of its own length, short or long, as when the model generates.
        raise ValueError(
            f"sequence_length={s.sequence_length}: {s.checkpoint} has a context of {longest} tokens "
            f"(max_position_embeddings); set sequence_length={longest} or less"
        )
    if s.train == "lora" and not s.init_adapter:
        if s.lora_tied and not config.tie_word_embeddings:
            raise ValueError(
                f"lora_tied=true: the head of {s.checkpoint} is not tied to its embedding; leave it out, and name "
                "lm_head in lora_targets to adapt the head, too"
            )
        lora = adapter_config(s)
        for path, shape in parameter_shapes(config).items():
            name, most = path.removesuffix("/weight").split("/")[-1], min(shape[-2:])
            if name in s.lora_targets and (rank := lora.rank_of(name)) > most:
                given = f"rank_pattern={name}:{rank}" if name in dict(lora.ranks) else f"lora_rank={rank}"
                raise ValueError(
                    f"{given}: {name} of {s.checkpoint} is a matrix of {shape[-2]} x {shape[-1]}, its "
                    f"rank is {most} at most; set lora_rank={most} or less, or rank_pattern={name}:{most}"
                )


def spelled(settings: Settings, name: str) -> str:
    """A setting as --set takes it: "lora_targets=qkv_proj,o_proj"."""
    return f"{name}={spell(getattr(settings, name))}"


def _contradictions(s: Settings) -> Iterator[str]:
    if s.sample_prompts and not s.samples:
        yield f"{spelled(s, 'sample_prompts')}: with samples=0 none is answered; set samples, or leave the file out"
    # Evaluations and checkpoints at the end are made in any case: a trial with few steps need not change how often.
    if not s.epochs and _given(s, ("warmup_steps",)) and s.warmup_steps > (steps := s.all_steps()):
        yield f"{spelled(s, 'warmup_steps')}: beyond the end of the run, steps={steps}; lower it, or raise steps"
    if s.optimizer != "sgd" and s.lr > 1:
        yield f"{spelled(s, 'lr')}: {spelled(s, 'optimizer')} moves each weight by about so much; give 1 or less"
    if s.lr * s.weight_decay >= 1:
        yield f"{spelled(s, 'weight_decay')}: with {spelled(s, 'lr')} a step takes all of a weight away; lower one"


def _given(settings: Settings, names: tuple[str, ...]) -> list[str]:
    """Those of the fields that differ from their defaults, and ask for something."""
    defaults = {field.name: field.default for field in dataclasses.fields(settings)}

    def is_given(value: Any, name: str) -> bool:
        return value != defaults[name] and not (name in _OF_EVALUATION and value == 0)

    return [name for name in names if is_given(getattr(settings, name), name)]

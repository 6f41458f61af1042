"""The settings of a training run: a recipe is one `Settings`, and `--set name=value` changes a field."""

from __future__ import annotations

import dataclasses
import math
import re
import typing
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, Literal, TypeVar

import jax

from phi3_jax.adapters import HEAD, TABLE, LoraConfig
from phi3_jax.spelling import did_you_mean

from .values import MOST_ROWS, check, cut, parse

Number = TypeVar("Number", int, float)

Optimizer = Literal["adamw", "adamw8bit", "adafactor", "lion", "sgd"]
Schedule = Literal["cosine", "linear", "constant"]
Remat = Literal["none", "dots", "full"]
Dtype = Literal["float32", "bfloat16"]
Auto = Literal["auto"]
DEFAULT_STEPS = 100
_STEP_ROWS = 8  # where nothing else is said


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings of a training run. Data sizes are in tokens, steps are optimizer steps.

    What is "auto" a run chooses itself, by the kind of its devices and by the memory that its step is compiled to take
    (run/memory/auto.py); it tells what it chose. Elsewhere it is float32, none, 1024, and 8 rows once (`resolved`).

    Attributes:
      checkpoint: what the run starts from, as for `phi3_jax.load`.
      init_adapter: a folder or hub id of an adapter that training goes on from, with its own rank, alpha and targets,
        which the settings below need not repeat but must not contradict; with train=all it is merged first. Empty: a
        new one.
      output: the run's folder: checkpoints, metrics, the loss curve, and at the end the adapter or the model.
      train_file: a file or several, or data sets of the hub as owner/name:split (data/sources.py), in one of the forms
        of data/forms.py.
      mixture: how often an epoch has the rows of each of these files: 2 is twice, 0.5 half of them, and the next epoch
        another half; empty: once.
      eval_file: the same for what is held out; without it and `eval_fraction` nothing is evaluated.
      eval_fraction: the share of the lines of train_file that is held out and never trained on. Which lines these are
        depends on their contents and the seed.
      eval_rows: at most so many rows are evaluated, chosen by the seed; 0 is all.
      method: "sft" learns texts, "dpo" learns preferences between a chosen and a rejected answer.
      dpo_beta: how closely DPO keeps to its reference; larger is closer.
      dpo_reference: what DPO compares with: "start" is what training begins with, init_adapter included; "base" is the
        checkpoint alone; or the folder or hub id of another adapter. With train=all it is always the start.
      loss_on: what of a chat is learned: answers with their end token, or everything.
      parse_special: special tokens that plain texts spell, such as <|user|>, become these tokens; else they are text.
      on_bad_line: what happens at a line that cannot be used: the run stops, or the line is skipped.
      truncate: what happens to a chat, completion or preference that is longer than a row: the run stops, it is
        skipped, tokens are cut from its beginning ("left"), or the oldest turns are left out ("turns"). What cannot be
        cut so without losing what is learned last is skipped.
      sequence_length: tokens of a row.
      pack: put several texts into a row; else each has a row of its own, with padding.
      batch_size: rows that go through the model at a time, over all devices.
      accumulation: how many such batches make a step; a run that chooses both has 8 rows in a step, or fewer where the
        data are fewer.
      seed: of the order of the data, of new weights, of dropout and of noise.
      train: which weights change: "all", or those of a low-rank adapter ("lora").
      lora_rank: of the adapter's matrices; at most the smaller side of an adapted matrix.
      lora_alpha: the strength of the adapter, whose update is multiplied by lora_alpha / lora_rank.
      lora_targets: which matrices are adapted; embed_tokens and lm_head can be, too.
      lora_tied: with the target embed_tokens, a head that is tied to the embedding gets the same update; else that is
        the embedding's alone.
      lora_rslora: divide lora_alpha by the square root of lora_rank instead (arXiv:2312.03732).
      lora_dropout: the fraction of the adapter's inputs that is dropped in training.
      dora: learn the norms of the weights' rows separately from their directions (arXiv:2402.09353).
      rank_pattern: ranks that differ from lora_rank, each as target:rank.
      alpha_pattern: alphas that differ from lora_alpha, each as target:alpha.
      dtype: of the weights, but not of a quantised base, nor of an adapter, which is float32. With train="all" and
        "bfloat16" each step rounds by chance (rounding.py), so that small updates are not lost.
      compute_dtype: of the computation; with "bfloat16" here, float32 weights are master weights.
      quantize: the base under an adapter becomes integers (QLoRA): int8, int4, int4-mixed, or with details such as
        int4-g64-asymmetric; "stored" keeps those of a GGUF file.
      neftune_alpha: strength of the noise on embeddings (arXiv:2310.05914); 0 is none.
      optimizer: the update rule (optimizer.py).
      lr: the learning rate, after warmup_steps in which it rises.
      schedule: how the learning rate falls after them, until the last step.
      warmup_steps: in how many steps the learning rate rises.
      final_lr: the fraction of lr that is left at the end.
      weight_decay: the share of lr by which weights shrink in a step, but not those of norms.
      beta1: how much of the gradients' moving mean stays at an update; sgd's momentum.
      beta2: how much of the moving mean of their squares stays; in lion, of the mean that is kept.
      epsilon: what adamw adds to the root of that mean.
      clip_norm: gradients are clipped to this global norm; 0 is off.
      loss_chunk: how many tokens' logits are in memory at a time; 0 is all.
      z_loss: weight of the square of the logits' log-sum (arXiv:2204.02311).
      label_smoothing: weight of a uniform distribution over all tokens, mixed into what is learned (arXiv:1512.00567).
      remat: what the backward pass computes again: nothing ("none"), all but matrix products ("dots"), or everything in
        a layer ("full").
      shard_weights: spread the weights over the devices as well as the batch.
      epochs: passes over the data, which may be fractional, instead of `steps`.
      steps: optimizer steps of the run; if this and `epochs` are 0, 100. With more of them a finished run goes on, by
        the schedule of the new number.
      log_every: after how many steps metrics are written.
      eval_every: after how many steps the held-out data is evaluated, and sample prompts are answered, besides before
        the first and after the last one.
      save_every: after how many steps a checkpoint is written, besides after the last one.
      patience: the run ends after so many evaluations without a lower loss than one before, that before the first step
        included; 0 is never.
      samples: how many prompts are answered then: the first ones of the held-out data, or where nothing is held out, of
        the training data.
      sample_prompts: a file of prompts that are answered instead, all of them (run/samples.py).
      trackers: where metrics go besides metrics.jsonl and TensorBoard: some of csv, wandb, mlflow.
      keep_last: how many of the newest checkpoints stay.
      keep_best: how many checkpoints of lowest evaluation loss stay, besides; 0 is none, and no best one at the end.
      max_bad_steps: the run ends after this many steps in a row whose loss or gradient is not finite.
    """

    checkpoint: str = "demo"
    init_adapter: str = ""
    output: str = "runs/train"
    train_file: str | tuple[str, ...] = ()
    mixture: tuple[float, ...] = ()
    eval_file: str | tuple[str, ...] = ()
    eval_fraction: float = 0.0
    eval_rows: int = 0
    method: Literal["sft", "dpo"] = "sft"
    dpo_beta: float = 0.1
    dpo_reference: str = "start"
    loss_on: Literal["assistant", "all"] = "assistant"
    parse_special: bool = False
    on_bad_line: Literal["stop", "skip"] = "stop"
    truncate: Literal["stop", "skip", "left", "turns"] = "stop"
    sequence_length: int = 512
    pack: bool = True
    batch_size: int | Auto = "auto"
    accumulation: int | Auto = "auto"
    seed: int = 0
    train: Literal["all", "lora"] = "lora"
    lora_rank: int = 16
    lora_alpha: float = 32.0
    lora_targets: tuple[str, ...] = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
    lora_tied: bool = False
    rank_pattern: tuple[str, ...] = ()
    alpha_pattern: tuple[str, ...] = ()
    lora_rslora: bool = False
    lora_dropout: float = 0.0
    dora: bool = False
    dtype: Literal[Dtype, "auto"] = "auto"
    compute_dtype: Literal[Dtype, "auto"] = "auto"
    quantize: str = ""
    neftune_alpha: float = 0.0
    optimizer: Optimizer = "adamw"
    lr: float = 1e-4
    schedule: Schedule = "cosine"
    warmup_steps: int = 10
    final_lr: float = 0.1
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    clip_norm: float = 1.0
    loss_chunk: int | Auto = "auto"
    z_loss: float = 0.0
    label_smoothing: float = 0.0
    remat: Literal[Remat, "auto"] = "auto"
    shard_weights: bool = False
    epochs: float = 0.0
    steps: int = 0
    log_every: int = 1
    eval_every: int = 50
    save_every: int = 50
    patience: int = 0
    samples: int = 2
    sample_prompts: str = ""
    trackers: tuple[str, ...] = ()
    keep_last: int = 2
    keep_best: int = 1
    max_bad_steps: int = 5

    def __post_init__(self) -> None:
        """Raises ValueError for a value that is not allowed, or two that contradict one another."""
        hints = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):
            check(field.name, getattr(self, field.name), hints[field.name])
        if self.quantize and self.train == "all":
            raise ValueError(
                f"quantize={self.quantize}: integers cannot be trained (train=all); train an adapter on them with "
                "train=lora"
            )
        if self.dora and self.quantize:
            raise ValueError(f"dora=true: needs the base as floats; leave quantize={self.quantize} out")
        if self.method == "dpo" and self.pack:
            raise ValueError("method=dpo compares single texts: set pack=false")
        _check_reference(self)
        if self.train == "lora" and not self.init_adapter:
            adapter_config(self)
        self._check_data()

    def _check_data(self) -> None:
        size, times = self.batch_size, self.accumulation
        if isinstance(size, int) and isinstance(times, int) and size * times > MOST_ROWS:
            raise ValueError(f"batch_size={size}, accumulation={times}: a step has at most {MOST_ROWS} rows")
        if self.epochs and self.steps:
            raise ValueError(f"epochs={self.epochs} and steps={self.steps}: give one of them, and 0 for the other")
        if "" in (*self.train_files, *self.eval_files):
            raise ValueError("train_file and eval_file: one of the names is empty")
        if self.eval_fraction and self.eval_files:
            raise ValueError("eval_fraction and eval_file: give one of them, and 0 or nothing for the other")
        if self.eval_rows and not (self.eval_files or self.eval_fraction):
            raise ValueError("eval_rows: nothing is held out; give eval_file or eval_fraction")
        if self.mixture and self.train_files and len(self.mixture) != len(self.train_files):
            raise ValueError(
                f"mixture={','.join(map(str, self.mixture))}: numbers are {len(self.mixture)}, and names in train_file "
                f"{len(self.train_files)}; give one for each"
            )

    @property
    def train_files(self) -> tuple[str, ...]:
        """The names in `train_file`."""
        return _names(self.train_file)

    @property
    def eval_files(self) -> tuple[str, ...]:
        """The names in `eval_file`."""
        return _names(self.eval_file)

    def all_steps(self, epoch: Fraction | None = None) -> int:
        """How many optimizer steps the run has; with `epochs` that takes the number of rows in an epoch.

        Raises:
          ValueError: it is not given.
        """
        if not self.epochs:
            return self.steps or DEFAULT_STEPS
        if epoch is None:
            raise ValueError(f"epochs={self.epochs}: how many steps these are depends on the data; give steps")
        s = resolved(self)
        return max(1, math.ceil(epoch * Fraction(str(self.epochs)) / (s.batch_size * s.accumulation)))


@dataclasses.dataclass(frozen=True)
class Resolved(Settings):
    """Settings of which none is "auto"."""

    batch_size: int = _STEP_ROWS
    accumulation: int = 1
    dtype: Dtype = "float32"
    compute_dtype: Dtype = "float32"
    loss_chunk: int = 1024
    remat: Remat = "none"


CHOSEN = ("dtype", "compute_dtype", "remat", "loss_chunk", "batch_size", "accumulation")  # what may be "auto"


def resolved(settings: Settings) -> Resolved:
    """The settings with the defaults of `Resolved` where they say "auto"; each device gets as many rows."""
    s, devices = settings, jax.device_count()
    values = {field.name: getattr(s, field.name) for field in dataclasses.fields(s)}
    there = {name: value for name, value in values.items() if name not in CHOSEN or value != "auto"}
    rows = -(-_STEP_ROWS // devices) * devices
    if s.accumulation != "auto":
        rows = max(devices, rows // s.accumulation // devices * devices)
    return Resolved(**{"batch_size": rows} | there)


def with_few_rows(settings: Settings, epoch: Fraction) -> Settings:
    """The settings, with fewer rows in a step than are usual if a pass over the data has not so many.

    Only where a run chooses them. They are a power of two for each device, so that they can be halved.

    Args:
      epoch: the rows of a pass.
    """
    s, devices = settings, jax.device_count()
    if (s.batch_size, s.accumulation) != ("auto", "auto") or epoch >= resolved(s).batch_size:
        return s
    rows = devices
    while 2 * rows <= epoch:
        rows *= 2
    return dataclasses.replace(s, batch_size=rows, accumulation=1)


def _names(value: str | tuple[str, ...]) -> tuple[str, ...]:
    return ((value,) if value else ()) if isinstance(value, str) else tuple(value)


def adapter_config(settings: Settings) -> LoraConfig:
    """The adapter that these settings train. Raises ValueError if there is none such."""
    s = settings
    ranks, alphas = _pairs("rank_pattern", s.rank_pattern, int), _pairs("alpha_pattern", s.alpha_pattern, float)
    for name, pairs in (("rank_pattern", ranks), ("alpha_pattern", alphas)):
        for target, number in pairs:
            if target not in s.lora_targets:
                near = did_you_mean(target, s.lora_targets)
                raise ValueError(
                    f"{name}={target}:{number}: {target} is none of lora_targets={','.join(s.lora_targets)}{near}"
                )
    if s.lora_tied and (TABLE not in s.lora_targets or HEAD in s.lora_targets):
        raise ValueError(f"lora_tied=true: needs {TABLE} in lora_targets, whose update the head gets, and not {HEAD}")
    lora = (s.lora_rank, s.lora_alpha, s.lora_targets, s.lora_rslora, s.lora_dropout, s.dora, s.lora_tied)
    return LoraConfig(*lora, ranks, alphas)


def _check_reference(settings: Settings) -> None:
    reference = settings.dpo_reference
    if reference == "start":
        return
    if settings.method != "dpo":
        raise ValueError(f"dpo_reference={reference}: only method=dpo compares with a reference")
    if settings.train == "all" and (reference != "base" or settings.init_adapter):
        raise ValueError(
            f"dpo_reference={reference}: with train=all the reference is what training starts from: leave it out"
        )


def _pairs(name: str, pattern: Sequence[str], kind: type[Number]) -> tuple[tuple[str, Number], ...]:
    """("o_proj:8", ...) -> (("o_proj", 8), ...). Raises ValueError for what is none."""
    found: dict[str, Number] = {}
    for text in pattern:
        target, colon, number = text.partition(":")
        if re.search(r"\d", target) or "." in target:
            raise ValueError(
                f"{name}={text}: layers share one number for each target; give target:number without a layer"
            )
        try:
            value = kind(number)
        except ValueError:
            value = None
        if not colon or value is None or target in found or not (kind is int) <= value < float("inf"):
            what = "a whole number from 1 on" if kind is int else "a number from 0 on"
            raise ValueError(f"{name}={text}: give target:number, once for each target and with {what}")
        found[target] = value
    return tuple(found.items())


def change(settings: Settings, changes: Sequence[str]) -> Settings:
    """Settings with some fields changed, each given as "name=value"; a tuple's elements have commas between.

    Raises:
      ValueError: an unknown name, one that is given twice, or a value that the field cannot have.
    """
    hints = typing.get_type_hints(Settings)
    values: dict[str, Any] = {}
    for text in changes:
        name, equals, value = text.partition("=")
        name = name.strip()
        if name not in hints:
            raise ValueError(
                f"--set {cut(text)}: there is no setting {cut(name)}{suggestion(name)}; phi3-train --help lists all"
            )
        if not equals:
            raise ValueError(f"--set {cut(text)}: give a value, too: --set {name}=VALUE")
        if name in values:
            raise ValueError(f"--set {cut(text)}: {name} is given twice; leave one of them out")
        values[name] = parse(name, value, hints[name])
    return dataclasses.replace(settings, **values)


# What other trainers (transformers, PEFT, TRL, axolotl) call these settings.
ELSEWHERE = {
    "adam_beta1": "beta1", "adam_beta2": "beta2", "adam_epsilon": "epsilon", "base_model": "checkpoint",
    "beta": "dpo_beta", "dataset": "train_file", "early_stopping_patience": "patience", "eval_steps": "eval_every",
    "gradient_accumulation_steps": "accumulation", "gradient_checkpointing": "remat", "learning_rate": "lr",
    "logging_steps": "log_every", "lora_r": "lora_rank", "lr_scheduler": "schedule", "lr_scheduler_type": "schedule",
    "max_grad_norm": "clip_norm", "max_length": "sequence_length", "max_seq_length": "sequence_length",
    "max_steps": "steps", "micro_batch_size": "batch_size", "model": "checkpoint", "model_name_or_path": "checkpoint",
    "neftune_noise_alpha": "neftune_alpha", "num_epochs": "epochs", "num_train_epochs": "epochs", "optim": "optimizer",
    "output_dir": "output", "packing": "pack", "per_device_train_batch_size": "batch_size", "r": "lora_rank",
    "report_to": "trackers", "save_steps": "save_every", "save_total_limit": "keep_last",
    "sequence_len": "sequence_length", "target_modules": "lora_targets", "train_dataset": "train_file",
    "use_dora": "dora", "use_rslora": "lora_rslora",
}  # fmt: skip


def suggestion(name: str) -> str:
    """The end of an error's text, such as "; did you mean lr?" for "learning_rate"; empty if nothing is near."""
    plain = name.strip().lower().replace("-", "_")
    if plain in ELSEWHERE:
        return f"; did you mean {ELSEWHERE[plain]}?"
    return did_you_mean(name, [field.name for field in dataclasses.fields(Settings)])

"""The settings of a training run: a recipe is one `Settings`, and `--set name=value` changes a field."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Sequence
from typing import Any, Literal

Optimizer = Literal["adamw", "adamw8bit", "adafactor", "lion", "sgd"]
Schedule = Literal["cosine", "linear", "constant"]
Remat = Literal["none", "dots", "full"]
Dtype = Literal["float32", "bfloat16"]
Auto = Literal["auto"]


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings of a training run. Data sizes are in tokens, steps are optimizer steps.

    What is "auto" a run chooses itself, by the kind of its devices and by the memory that its step is compiled to take
    (run/memory/auto.py); it tells what it chose. Other functions take it as float32, none, 1024, and 8 rows once.

    Attributes:
      checkpoint: what the run starts from, as for `phi3_jax.load`.
      init_adapter: a folder or hub id of an adapter that training goes on from; empty: a new one.
      output: the run's folder: checkpoints, metrics, the loss curve, and at the end the adapter or the model.
      train_file: files, or data sets of the hub as owner/name:split (data/sources.py), in one of the forms of
        data/forms.py.
      mixture: how often an epoch has the rows of each of these files: 2 is twice, 0.5 half of them; empty: once.
      eval_file: the same for what is held out; without it and `eval_fraction` nothing is evaluated.
      eval_fraction: the share of the lines of train_file that is held out.
      eval_rows: at most so many rows are evaluated; 0 is all.
      method: "sft" learns texts, "dpo" learns preferences between a chosen and a rejected answer.
      dpo_beta: how closely DPO keeps to its reference; larger is closer.
      dpo_reference: what DPO compares with: "start" is what training begins with, init_adapter included; "base" is the
        checkpoint alone; or another adapter's folder.
      loss_on: what of a chat is learned: answers with their end token, or everything.
      parse_special: special tokens that plain texts spell, such as <|user|>, become these tokens; else they are text.
      on_bad_line: what happens at a line that cannot be used: the run stops, or the line is skipped.
      truncate: what happens to a chat or completion that is longer than a row: the run stops, it is skipped, tokens
        are cut from its beginning ("left"), or the oldest turns are left out ("turns").
      sequence_length: tokens of a row.
      pack: put several texts into a row; else each has a row of its own, with padding.
      batch_size: rows that go through the model at a time, over all devices.
      accumulation: how many such batches make a step; where a run chooses, a step has 8 rows.
      seed: of the order of the data, of new weights and of dropout.
      train: which weights change: "all", or those of a low-rank adapter ("lora").
      lora_rank, lora_alpha, lora_targets, lora_rslora, lora_dropout, dora: the adapter (phi3_jax/adapters.py).
      rank_pattern: ranks that differ from lora_rank, each as target:rank.
      dtype: of the weights, but not of a quantised base, nor of an adapter, which is float32. With train="all" and
        "bfloat16" each step rounds by chance (rounding.py), so that small updates are not lost.
      compute_dtype: of the computation; with "bfloat16" here, float32 weights are master weights.
      quantize: a policy of phi3_jax/quantization/policy.py for the base under an adapter (QLoRA).
      neftune_alpha: strength of the noise on embeddings (arXiv:2310.05914); 0 is none.
      optimizer, lr, schedule, warmup_steps, final_lr, weight_decay, beta1, beta2, epsilon: the update rule
        (optimizer.py); final_lr is the fraction of `lr` at the end.
      clip_norm: gradients are clipped to this global norm; 0 is off.
      loss_chunk: how many tokens' logits are in memory at a time; 0 is all.
      z_loss, label_smoothing: weights of these two terms.
      remat: what the backward pass computes again: nothing ("none"), all but matrix products ("dots"), or everything in
        a layer ("full").
      shard_weights: spread the weights over the devices as well as the batch.
      epochs: passes over the data, instead of `steps`.
      steps: optimizer steps of the run.
      log_every, eval_every, save_every: in steps.
      patience: the run ends after so many evaluations without a lower loss; 0 is never.
      samples: how many prompts are answered at each evaluation: the first of the held-out data, or of
      sample_prompts: a file with a prompt in each line.
      trackers: where metrics go besides metrics.jsonl and TensorBoard: some of csv, wandb, mlflow.
      keep_last, keep_best: how many checkpoints stay; the best are those of lowest evaluation loss.
      max_bad_steps: the run ends after this many steps in a row whose loss or gradient is not finite.
    """

    checkpoint: str = "demo"
    init_adapter: str = ""
    output: str = "runs/train"
    train_file: str = ""
    mixture: tuple[float, ...] = ()
    eval_file: str = ""
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
    rank_pattern: tuple[str, ...] = ()
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
    steps: int = 100
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
            _check(field.name, getattr(self, field.name), hints[field.name])
        if self.quantize and self.train == "all":
            raise ValueError("quantize: integers cannot be trained; train an adapter on them with train=lora")
        if self.dora and self.quantize:
            raise ValueError("dora: needs the base as floats; leave quantize out")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout={self.lora_dropout}: must be in [0, 1)")
        if self.method == "dpo" and self.pack:
            raise ValueError("method=dpo compares single texts: set pack=false")


@dataclasses.dataclass(frozen=True)
class Resolved(Settings):
    """Settings of which none is "auto"."""

    batch_size: int = 8
    accumulation: int = 1
    dtype: Dtype = "float32"
    compute_dtype: Dtype = "float32"
    loss_chunk: int = 1024
    remat: Remat = "none"


_ROWS = 8  # of a step, where nothing else is said
CHOSEN = ("dtype", "compute_dtype", "remat", "loss_chunk", "batch_size", "accumulation")  # what may be "auto"


def resolved(settings: Settings, **chosen: Any) -> Resolved:
    """The settings with these values, or else the defaults of `Resolved`, where they say "auto".

    With an `accumulation` that is given, batch_size is what makes 8 rows of a step, or 1.
    """
    if settings.accumulation != "auto":
        chosen = {"batch_size": max(1, _ROWS // settings.accumulation)} | chosen
    values = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}
    there = {name: value for name, value in values.items() if name not in CHOSEN or value != "auto"}
    return Resolved(**chosen | there)


_AT_LEAST_ONE = {
    "sequence_length", "batch_size", "accumulation", "lora_rank", "steps", "log_every", "eval_every", "save_every",
    "keep_last", "max_bad_steps",
}  # fmt: skip


def _check(name: str, value: Any, hint: Any) -> None:
    hint, may_be_auto = _without_auto(hint)
    if may_be_auto and value == "auto":
        return
    if typing.get_origin(hint) is Literal:
        if value not in typing.get_args(hint):
            raise ValueError(f"{name}={value!r}: must be one of {', '.join(typing.get_args(hint))}")
    elif hint in (int, float) and not isinstance(value, bool) and isinstance(value, int | float):
        least = 1 if name in _AT_LEAST_ONE else 0
        if not value >= least or value == float("inf"):
            raise ValueError(f"{name}={value}: must be at least {least}")


def change(settings: Settings, changes: Sequence[str]) -> Settings:
    """Settings with some fields changed, each given as "name=value"; a tuple's elements have commas between.

    Raises:
      ValueError: an unknown name, or a value that the field cannot have.
    """
    hints = typing.get_type_hints(Settings)
    values: dict[str, Any] = {}
    for text in changes:
        name, equals, value = text.partition("=")
        if not equals or name not in hints:
            raise ValueError(f"--set {text}: give name=value, with one of {', '.join(hints)}")
        values[name] = _parse(name, value, hints[name])
    return dataclasses.replace(settings, **values)


def _parse(name: str, text: str, hint: Any) -> Any:
    hint, may_be_auto = _without_auto(hint)
    if may_be_auto and text == "auto":
        return text
    if isinstance(hint, types.GenericAlias):
        return tuple(_parse(name, each, typing.get_args(hint)[0]) for each in text.split(",")) if text else ()
    if hint is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError(f"{name}={text}: must be true or false")
        return text.lower() == "true"
    if hint in (int, float):
        try:
            return hint(text)
        except ValueError:
            raise ValueError(f"{name}={text}: must be {'a whole number' if hint is int else 'a number'}") from None
    return text


def _without_auto(hint: Any) -> tuple[Any, bool]:
    """The type of a field that may be "auto", without it, and whether it is one."""
    if typing.get_origin(hint) is not typing.Union:
        return hint, False
    (rest,) = (each for each in typing.get_args(hint) if each != Auto)
    return rest, True

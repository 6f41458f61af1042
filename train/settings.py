"""The settings of a training run: a recipe is one `Settings`, and `--set name=value` changes a field."""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Sequence
from typing import Any, Literal, TypeVar

from phi3_jax.adapters import LoraConfig

Number = TypeVar("Number", int, float)

Optimizer = Literal["adamw", "adamw8bit", "adafactor", "lion", "sgd"]
Schedule = Literal["cosine", "linear", "constant"]
Remat = Literal["none", "dots", "full"]


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings of a training run. Data sizes are in tokens, steps are optimizer steps.

    Attributes:
      checkpoint: what the run starts from, as for `phi3_jax.load`.
      init_adapter: a folder or hub id of an adapter that training goes on from, with its own rank, alpha and targets,
        which the settings below need not repeat but must not contradict; with train=all it is merged first. Empty: a
        new one.
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
        checkpoint alone; or the folder or hub id of another adapter. With train=all it is always the start.
      loss_on: what of a chat is learned: answers with their end token, or everything.
      parse_special: special tokens that plain texts spell, such as <|user|>, become these tokens; else they are text.
      on_bad_line: what happens at a line that cannot be used: the run stops, or the line is skipped.
      truncate: what happens to a chat or completion that is longer than a row: the run stops, it is skipped, tokens
        are cut from its beginning ("left"), or the oldest turns are left out ("turns").
      sequence_length: tokens of a row.
      pack: put several texts into a row; else each has a row of its own, with padding.
      batch_size: rows that go through the model at a time, over all devices.
      accumulation: how many such batches make a step.
      seed: of the order of the data, of new weights and of dropout.
      train: which weights change: "all", or those of a low-rank adapter ("lora").
      lora_rank, lora_alpha, lora_targets, lora_rslora, lora_dropout, dora: the adapter (phi3_jax/adapters.py); targets
        can be embed_tokens and lm_head, too.
      lora_tied: with the target embed_tokens, a head that is tied to the embedding gets the same update; else that is
        the embedding's alone.
      rank_pattern, alpha_pattern: what differs from lora_rank and lora_alpha, each as target:number.
      dtype: of the weights, but not of a quantised base, nor of an adapter, which is float32.
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
    batch_size: int = 8
    accumulation: int = 1
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
    dtype: Literal["float32", "bfloat16"] = "float32"
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
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
    loss_chunk: int = 1024
    z_loss: float = 0.0
    label_smoothing: float = 0.0
    remat: Remat = "none"
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
        _check_reference(self)
        if self.train == "lora" and not self.init_adapter:
            adapter_config(self)


_AT_LEAST_ONE = {
    "sequence_length", "batch_size", "accumulation", "lora_rank", "steps", "log_every", "eval_every", "save_every",
    "keep_last", "max_bad_steps",
}  # fmt: skip


def _check(name: str, value: Any, hint: Any) -> None:
    if typing.get_origin(hint) is Literal:
        if value not in typing.get_args(hint):
            raise ValueError(f"{name}={value!r}: must be one of {', '.join(typing.get_args(hint))}")
    elif hint in (int, float) and not isinstance(value, bool) and isinstance(value, int | float):
        least = 1 if name in _AT_LEAST_ONE else 0
        if not value >= least or value == float("inf"):
            raise ValueError(f"{name}={value}: must be at least {least}")


def adapter_config(settings: Settings) -> LoraConfig:
    """The adapter that these settings train. Raises ValueError if there is none such."""
    s = settings
    ranks, alphas = _pairs("rank_pattern", s.rank_pattern, int), _pairs("alpha_pattern", s.alpha_pattern, float)
    lora = (s.lora_rank, s.lora_alpha, s.lora_targets, s.lora_rslora, s.lora_dropout, s.dora, s.lora_tied)
    return LoraConfig(*lora, ranks, alphas)


def _check_reference(settings: Settings) -> None:
    reference = settings.dpo_reference
    if reference == "start":
        return
    if not reference:
        raise ValueError("dpo_reference: must be start, base, or an adapter's folder or hub id")
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

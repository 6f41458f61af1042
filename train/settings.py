"""The settings of a training run: a recipe is one `Settings`, and `--set name=value` changes a field."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Sequence
from typing import Any, Literal

from phi3_jax.spelling import did_you_mean

from .values import check, parse

Optimizer = Literal["adamw", "adamw8bit", "adafactor", "lion", "sgd"]
Schedule = Literal["cosine", "linear", "constant"]
Remat = Literal["none", "dots", "full"]


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings of a training run. Data sizes are in tokens, steps are optimizer steps.

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
      accumulation: how many such batches make a step.
      seed: of the order of the data, of new weights, of dropout and of noise.
      train: which weights change: "all", or those of a low-rank adapter ("lora").
      lora_rank: of the adapter's matrices; at most the smaller side of an adapted matrix.
      lora_alpha: the strength of the adapter, whose update is multiplied by lora_alpha / lora_rank.
      lora_targets: which matrices are adapted.
      lora_rslora: divide lora_alpha by the square root of lora_rank instead (arXiv:2312.03732).
      lora_dropout: the fraction of the adapter's inputs that is dropped in training.
      dora: learn the norms of the weights' rows separately from their directions (arXiv:2402.09353).
      rank_pattern: ranks that differ from lora_rank, each as target:rank.
      dtype: of the weights, but not of a quantised base, nor of an adapter, which is float32.
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
      epochs: passes over the data, instead of `steps`.
      steps: optimizer steps of the run.
      log_every: after how many steps metrics are written.
      eval_every: after how many steps the held-out data is evaluated, besides before the first and after the last one.
      save_every: after how many steps a checkpoint is written, besides after the last one.
      patience: the run ends after so many evaluations without a lower loss; 0 is never.
      samples: how many prompts are answered at each evaluation: the first of the held-out data, or of sample_prompts.
      sample_prompts: a file with a prompt in each line.
      trackers: where metrics go besides metrics.jsonl and TensorBoard: some of csv, wandb, mlflow.
      keep_last: how many of the newest checkpoints stay.
      keep_best: how many checkpoints of lowest evaluation loss stay, besides.
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
    rank_pattern: tuple[str, ...] = ()
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


def change(settings: Settings, changes: Sequence[str]) -> Settings:
    """Settings with some fields changed, each given as "name=value"; a tuple's elements have commas between.

    Raises:
      ValueError: an unknown name, one that is given twice, or a value that the field cannot have.
    """
    hints = typing.get_type_hints(Settings)
    values: dict[str, Any] = {}
    for text in changes:
        name, equals, value = text.partition("=")
        if name not in hints:
            raise ValueError(f"--set {text}: there is no setting {name}{suggestion(name)}; phi3-train --help lists all")
        if not equals:
            raise ValueError(f"--set {text}: give a value, too: --set {name}=VALUE")
        if name in values:
            raise ValueError(f"--set {text}: {name} is given twice; leave one of them out")
        values[name] = parse(name, value, hints[name])
    return dataclasses.replace(settings, **values)


# What other trainers (transformers, PEFT, TRL, axolotl) call these settings.
_ELSEWHERE = {
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
    if plain in _ELSEWHERE:
        return f"; did you mean {_ELSEWHERE[plain]}?"
    return did_you_mean(name, [field.name for field in dataclasses.fields(Settings)])

"""Which adapter a run trains: what its settings say, or one that it goes on from; and what DPO compares it with."""

from __future__ import annotations

import dataclasses
import hashlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import phi3_jax
from phi3_jax.adapters import HEAD, TABLE, Adapter, LoraConfig
from phi3_jax.checkpoint import AttachableAdapter, find_adapter, read_attachable
from phi3_jax.config import Phi3Config

from .settings import Settings, adapter_config
from .values import spell

Named = tuple[LoraConfig, Adapter]
# The settings that `init_adapter` says itself.
OWN = ("lora_rank", "lora_alpha", "lora_targets", "lora_rslora", "dora", "lora_tied", "rank_pattern", "alpha_pattern")


def named_adapters(settings: Settings) -> dict[str, str]:
    """The adapters that a run reads, by the setting that names them."""
    reference = "" if settings.dpo_reference in ("start", "base") else settings.dpo_reference
    names = {"init_adapter": settings.init_adapter, "dpo_reference": reference}
    return {setting: name for setting, name in names.items() if name}


def fingerprints(settings: Settings) -> dict[str, str]:
    """What the files of these adapters hold, to know them again; hub ids are downloaded.

    Warns:
      UserWarning: an adapter was made for another checkpoint.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: a file is damaged, or describes something that is not implemented here.
    """
    prints = {}
    for setting, name in named_adapters(settings).items():
        try:
            found = find_adapter(name)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{setting}: {error}") from None
        if found.base and not _is_same(found.base, settings.checkpoint):
            warnings.warn(
                f"{setting}={name}: was made for {found.base}, as its file says, and not for checkpoint="
                f"{settings.checkpoint}: in another model it means nothing",
                stacklevel=2,
            )
        whole = hashlib.sha256()
        for path in (found.settings, found.weights):
            with path.open("rb") as file:
                whole.update(hashlib.file_digest(file, "sha256").digest())
        prints[setting] = whole.hexdigest()
    return prints


def with_init_adapter(settings: Settings, checkpoint: phi3_jax.Checkpoint) -> tuple[Settings, Adapter | None]:
    """The settings with what `init_adapter` is (its rank, alpha, targets, ...), and its numbers; None for a new one.

    Dropout stays the run's own: it belongs to the training, not to what was trained.

    Warns:
      UserWarning: the adapter would be trained otherwise than by PEFT.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: the adapter does not fit the checkpoint, or a setting that is not at its default contradicts it.
    """
    if not settings.init_adapter or settings.train == "all":  # which begins with the adapter merged
        return settings, None
    found = _read("init_adapter", settings.init_adapter, checkpoint)
    own = _own(found.lora)
    defaults = Settings()
    for name, theirs in own.items():
        ours = getattr(settings, name)
        if ours != getattr(defaults, name) and _unordered(ours) != _unordered(theirs):
            raise ValueError(
                f"{name}={spell(ours)}: init_adapter={settings.init_adapter} has {spell(theirs)}; leave {name} out, "
                "or train a new adapter"
            )
    if found.pads:
        warnings.warn(
            f"{settings.init_adapter}: its updates of several modules, ranks or alphas have become one of "
            f"{', '.join(found.pads)} each, which learns more freely than they would in PEFT",
            stacklevel=2,
        )
    return dataclasses.replace(settings, **own), found.adapter


def reference_adapter(settings: Settings, checkpoint: phi3_jax.Checkpoint) -> Named | None:
    """The adapter that `dpo_reference` names; None if it names none."""
    name = named_adapters(settings).get("dpo_reference")
    if name is None:
        return None
    found = _read("dpo_reference", name, checkpoint)
    return found.lora, found.adapter


def notes(settings: Settings, config: Phi3Config) -> Iterator[str]:
    """What to tell before a run: the adapter that it goes on from, and that it unties the embedding and the head."""
    if settings.train == "all":
        return
    if settings.init_adapter:
        told = [f"{name}={spell(value)}" for name, value in _own(adapter_config(settings)).items() if value]
        yield f"goes on from {settings.init_adapter}: {', '.join(told)}"
    targets = [target for target in (TABLE, HEAD) if target in settings.lora_targets]
    if targets and config.tie_word_embeddings and not settings.lora_tied:
        yield (
            f"{' and '.join(targets)} of a tied model: the adapter unties the two, as in PEFT; lora_tied=true with "
            f"{TABLE} alone changes both by one update"
        )


def _own(lora: LoraConfig) -> dict[str, Any]:
    """The settings that an adapter's configuration stands for."""
    ranks = tuple(f"{target}:{rank}" for target, rank in lora.ranks)
    alphas = tuple(f"{target}:{alpha}" for target, alpha in lora.alphas)
    values = (lora.rank, float(lora.alpha), lora.targets, lora.rslora, lora.dora, lora.tied, ranks, alphas)
    return dict(zip(OWN, values, strict=True))


def _read(setting: str, name: str, checkpoint: phi3_jax.Checkpoint) -> AttachableAdapter:
    try:
        return read_attachable(name, checkpoint.config, checkpoint.params)
    except ValueError as error:
        raise ValueError(f"{setting}: {error}") from None


def _is_same(one: str, other: str) -> bool:
    return one == other or (Path(one).exists() and Path(other).exists() and Path(one).samefile(other))


def _unordered(value: Any) -> Any:
    if not isinstance(value, tuple):
        return value
    return {(name, float(number or 0)) for name, _, number in (str(each).partition(":") for each in value)}

"""adapter_model.safetensors: the tensors of an adapter, found by all names that PEFT has given them, and checked."""

from __future__ import annotations

import dataclasses
import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path

from phi3_jax.adapters import LoraConfig
from phi3_jax.checkpoint import safetensors_files
from phi3_jax.checkpoint.hub import download, is_hub_id
from phi3_jax.checkpoint.peft.modules import Module, is_fused, is_unfused, modules
from phi3_jax.checkpoint.peft.settings import CONFIG, REMEDY, Settings, read_settings
from phi3_jax.checkpoint.peft.trained_on import TRAINED_ON
from phi3_jax.checkpoint.tensor_source import TensorSource
from phi3_jax.config import Phi3Config

WEIGHTS, PICKLED = "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."
# The end of a tensor's name -> what it is of its module. Files that were not written by PEFT's save_pretrained, but
# as whole state dicts, have the adapter's name in it, too.
_ENDINGS = {
    "a": r"\.(?:lora_A(?:\.[^.]+)?\.weight|lora_embedding_A(?:\.[^.]+)?)",
    "b": r"\.(?:lora_B(?:\.[^.]+)?\.weight|lora_embedding_B(?:\.[^.]+)?)",
    "magnitude": r"\.lora_magnitude_vector(?:\.[^.]+)?(?:\.weight)?",
    "tokens": r"\.token_adapter\.trainable_tokens_delta(?:\.[^.]+)?",
    "unused": r"\.(?:original_module\.weight|lora_velora_embed(?:\.[^.]+)?)",
    "base": r"\.base_layer\.weight",
    "whole": r"(?:\.modules_to_save(?:\.[^.]+)?)?\.weight",
}
_NAME = re.compile("(.*?)(?:" + "|".join(f"(?P<{part}>{ending})" for part, ending in _ENDINGS.items()) + ")")


@dataclasses.dataclass(frozen=True)
class Update:
    """What an adapter adds to one module: scaling * b a. DoRA then gives the rows the magnitudes as norms.

    Attributes:
      lora: the rank and the alpha of this module.
      a: [R, I]; of the embedding [R, V].
      b: [O, R]; of the embedding [D, R].
      magnitude: [O]; of the embedding [D]: its columns have norms.
    """

    module: Module
    lora: LoraConfig
    a: TensorSource
    b: TensorSource
    magnitude: TensorSource | None


@dataclasses.dataclass(frozen=True)
class AdapterFiles:
    """An adapter as it lies in its two files, checked but not yet read.

    Attributes:
      weights: the second file, for messages.
      base: (module, weight) that is put into the model before all else, and so into a head that is tied to it.
      whole: (module, weight) of `modules_to_save`: in place of the module's own, even where it is tied to another.
      rows: (module, numbers, rows) in place of single rows.
      updates: the low-rank ones.
    """

    settings: Settings
    weights: Path
    base: list[tuple[Module, TensorSource]]
    whole: list[tuple[Module, TensorSource]]
    rows: list[tuple[Module, list[int], TensorSource]]
    updates: list[Update]


@dataclasses.dataclass(frozen=True)
class FoundAdapter:
    """An adapter's two files on this machine.

    Attributes:
      base: the name of the model that it was made for, as PEFT stores it, or "".
    """

    settings: Path
    weights: Path
    base: str


def find_adapter(folder: str | os.PathLike[str]) -> FoundAdapter:
    """Finds an adapter's files; of a hub id they are fetched. No model is needed.

    Raises:
      FileNotFoundError: one is missing.
      ValueError: the first is damaged, or has settings that are not computed here.
    """
    place = _place(folder)
    settings = read_settings(place / CONFIG)
    _require_weights(place / WEIGHTS)
    return FoundAdapter(place / CONFIG, place / WEIGHTS, settings.base)


def read_adapter(folder: str | os.PathLike[str], config: Phi3Config) -> AdapterFiles:
    """Finds an adapter's tensors for a model of these sizes.

    The folder may be a hub id, of which only the adapter's own files are fetched.

    Warns:
      UserWarning: there is a second file of weights, adapter_model.bin, which PEFT does not read either.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: a file is damaged, does not fit the model or the other file, or describes something that is not
        implemented here.
    """
    place = _place(folder)
    settings, path = read_settings(place / CONFIG), place / WEIGHTS
    tensors = _read_weights(path)
    unfused = any(map(is_unfused, tensors))
    if unfused and any(map(is_fused, tensors)):
        raise ValueError(f"{path}: some tensors are for q_proj or gate_proj, others for qkv_proj or gate_up_proj")
    known = modules(config, unfused)
    found = _by_module(tensors, path)
    tied = config.tie_word_embeddings
    adapted, saved = settings.adapted(known, tied), settings.stored_whole(known, tied)
    chosen = _chosen_rows(settings, known, tied)
    _check_vocabulary(found, known, path)
    expected = {(m.name, part): shape for m in adapted for part, shape in _shapes(m, settings).items()}
    expected |= {(m.name, "whole"): m.shape for m in saved}
    expected |= {(m.name, "tokens"): (len(ids), m.shape[1]) for m, ids in chosen}
    # Others may be stored in full, too; of a module with an update that is the weight below it.
    updated, replaced = {m.name for m in adapted}, {m.name for m in saved}
    also = {(name, "base" if name in updated else "whole"): m.shape for name, m in known.items()}
    _check(found, expected, also, known, path)
    sources = {key: source for key, (_, source) in found.items()}
    whole = [(known[name], source) for (name, part), source in sources.items() if part in ("base", "whole")]
    return AdapterFiles(
        settings,
        path,
        [(m, source) for m, source in whole if m.name not in replaced],
        [(m, source) for m, source in whole if m.name in replaced],
        [(m, ids, sources[m.name, "tokens"]) for m, ids in chosen],
        [
            Update(
                m,
                settings.of(m.name),
                sources[m.name, "a"],
                sources[m.name, "b"],
                sources[m.name, "magnitude"] if settings.lora.dora else None,
            )
            for m in adapted
        ],
    )


def tensor_name(module: Module, part: str) -> str:
    """The name that PEFT gives to a tensor."""
    if module.kind == "embedding":
        endings = {"a": "lora_embedding_A", "b": "lora_embedding_B"}
    else:
        endings = {"a": "lora_A.weight", "b": "lora_B.weight"}
    endings |= {
        "magnitude": "lora_magnitude_vector",
        "whole": "weight",
        "tokens": "token_adapter.trainable_tokens_delta",
    }
    return f"{PREFIX}{module.name}.{endings[part]}"


def _place(folder: str | os.PathLike[str]) -> Path:
    place = Path(folder)
    return download(str(folder), (CONFIG, WEIGHTS, TRAINED_ON)) if not place.exists() and is_hub_id(folder) else place


def _require_weights(path: Path) -> None:
    if not path.exists():
        raise FileNotFoundError(f"{path}: the file is missing; {PICKLED} is not read: save it as safetensors")


def _read_weights(path: Path) -> dict[str, TensorSource]:
    _require_weights(path)
    if path.with_name(PICKLED).exists():
        warnings.warn(f"{path.parent}: {WEIGHTS} is read, as by PEFT, and {PICKLED} is not", stacklevel=4)
    return safetensors_files.read_file(path)


def _by_module(tensors: Mapping[str, TensorSource], path: Path) -> dict[tuple[str, str], tuple[str, TensorSource]]:
    """(module, part) -> (the tensor's name, the tensor); names that cannot be read are modules of their own."""
    found: dict[tuple[str, str], tuple[str, TensorSource]] = {}
    for name, source in tensors.items():
        match = _NAME.fullmatch(name.removeprefix(PREFIX))
        key = (match[1], str(match.lastgroup)) if match else (name, "unknown")
        if key in found:
            raise ValueError(f"{path}: {name} and {found[key][0]} are the same thing: take one adapter out of the file")
        found[key] = (name, source)
    return {key: value for key, value in found.items() if key[1] != "unused"}


def _shapes(module: Module, settings: Settings) -> dict[str, tuple[int, ...]]:
    outputs, inputs = module.shape if module.kind != "embedding" else reversed(module.shape)
    rank = settings.of(module.name).rank
    shapes: dict[str, tuple[int, ...]] = {"a": (rank, inputs), "b": (outputs, rank)}
    return shapes | ({"magnitude": (outputs,)} if settings.lora.dora else {})


def _chosen_rows(settings: Settings, known: Mapping[str, Module], tied: bool) -> list[tuple[Module, list[int]]]:
    """The embedding's and the head's rows of `trainable_token_indices`."""
    chosen = [
        (m, ids)
        for key, ids in settings.tokens.items()
        for m in known.values()
        if m.kind in ("embedding", "head") and m.name.endswith(key)
    ]
    # With a tied head, PEFT has rules of its own for all but the embedding's rows, which are the head's, too.
    if len(chosen) != len(settings.tokens) or (tied and any(m.kind == "head" for m, _ in chosen)):
        raise ValueError(
            f"{settings.path}: trainable_token_indices={dict(settings.tokens)} is not computed here; {REMEDY}"
        )
    for module, ids in chosen:
        if not all(0 <= i < module.shape[0] for i in ids):
            raise ValueError(f"{settings.path}: trainable_token_indices must be below the model's {module.shape[0]}")
    return chosen


def _check_vocabulary(
    found: Mapping[tuple[str, str], tuple[str, TensorSource]], known: Mapping[str, Module], path: Path
) -> None:
    for (module, part), (name, source) in found.items():
        m = known.get(module)
        if m is None or m.kind not in ("embedding", "head") or part in ("tokens", "magnitude") or not source.shape:
            continue
        if part in ("base", "whole"):
            tokens = source.shape[0]
        elif part == ("a" if m.kind == "embedding" else "b"):
            tokens = source.shape[-1 if m.kind == "embedding" else 0]
        else:
            continue
        if tokens != m.shape[0]:
            raise ValueError(
                f"{path}: {name} is for a vocabulary of {tokens}, and the model's has {m.shape[0]}: resize it with "
                f"transformers (resize_token_embeddings({tokens})), {REMEDY}"
            )


def _check(
    found: Mapping[tuple[str, str], tuple[str, TensorSource]],
    expected: Mapping[tuple[str, str], tuple[int, ...]],
    also: Mapping[tuple[str, str], tuple[int, ...]],
    known: Mapping[str, Module],
    path: Path,
) -> None:
    allowed = {**also, **expected}
    problems = {
        "missing tensors": sorted(tensor_name(known[name], part) for name, part in expected.keys() - found.keys()),
        "unknown tensors": sorted(found[key][0] for key in found.keys() - allowed.keys()),
        "wrong shapes": [
            f"{name} is {list(source.shape)} instead of {list(allowed[key])}"
            for key, (name, source) in found.items()
            if key in allowed and source.shape != allowed[key]
        ],
    }
    if any(problems.values()):
        told = "; ".join(f"{what}: {', '.join(which[:8])}" for what, which in problems.items() if which)
        raise ValueError(f"{path}: not an adapter of this model, or not as {CONFIG} says; {told}")

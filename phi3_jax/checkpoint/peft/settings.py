"""adapter_config.json: what an adapter is, and which modules of a model it is for, decided as PEFT decides it."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from phi3_jax.adapters import LoraConfig
from phi3_jax.checkpoint.peft.modules import HEAD, TABLE, Module
from phi3_jax.checkpoint.peft.patterns import Steps, matches
from phi3_jax.json_files import is_whole, read_object, shown
from phi3_jax.spelling import did_you_mean

CONFIG = "adapter_config.json"
REMEDY = "merge the adapter into its model with PEFT (merge_and_unload, save_pretrained) and load that"
_READ = {
    "peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "target_modules", "exclude_modules",
    "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "modules_to_save", "bias",
    "init_lora_weights", "ensure_weight_tying", "trainable_token_indices",
}  # fmt: skip
# Ignored: where the file came from; how the adapter was initialised (with one of _INITS) and is held in memory; what
# changes only the gradients (velora_config) or only the layers of other models (fan_in_fan_out).
_INERT = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "eva_config", "fan_in_fan_out", "inference_mode",
    "loftq_config", "lora_ga_config", "megatron_core", "peft_version", "qalora_group_size", "revision",
    "runtime_config", "task_type", "velora_config",
}  # fmt: skip
_MOST = 10_000  # names in a list
# Others (pissa, olora, loftq, corda, lora_ga) change the base's weights before the adapter is trained on them.
_INITS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings that mean something for a model's numbers.

    Attributes:
      path: the file, for messages.
      lora: rank, alpha and the rest of modules that `ranks` and `alphas` do not name.
      targets: names of modules, a regular expression, or "all-linear".
      exclude: names, or a regular expression, of modules that are not adapted all the same.
      layers: the only layers that are adapted; None for all.
      layers_names: what the list of layers may be called; empty for any name.
      ranks, alphas: for the modules whose names end with a pattern; the first pattern counts.
      saved: modules that are stored in full.
      tokens: {"embed_tokens": ids}: rows that are stored in full.
      tied: a tied head follows the embedding.
      base: the name of the model that it was made for, or "".
      steps: what matching names may take, for all of them.
    """

    path: Path
    lora: LoraConfig
    targets: str | list[str]
    exclude: str | list[str]
    layers: list[int] | None
    layers_names: list[str]
    ranks: Mapping[str, Any]
    alphas: Mapping[str, Any]
    saved: list[str]
    tokens: Mapping[str, list[int]]
    tied: bool
    base: str
    steps: Steps = dataclasses.field(default_factory=Steps, repr=False, compare=False)

    def of(self, module: str) -> LoraConfig:
        """The rank and the alpha of one module. Raises ValueError where they are no sensible numbers."""
        rank = next((rank for key, rank in self.ranks.items() if self._ends(key, module)), self.lora.rank)
        alpha = next((alpha for key, alpha in self.alphas.items() if self._ends(key, module)), self.lora.alpha)
        try:
            return dataclasses.replace(self.lora, rank=rank, alpha=alpha)
        except ValueError as error:
            raise ValueError(f"{self.path}: {module}: {error}") from None

    def adapted(self, modules: Mapping[str, Module], has_tied_head: bool) -> list[Module]:
        """The modules that get a low-rank update. Raises ValueError if there are none."""
        found = [m for m in modules.values() if m.kind != "norm" and not self._excluded(m.name) and self._is_target(m)]
        if not found:
            linear = {name.rpartition(".")[2]: None for name, m in modules.items() if m.kind == "linear"}
            raise ValueError(
                f"{self.path}: target_modules={shown(self.targets)} names none of {', '.join(linear)} in any layer "
                "that it is for"
            )
        return self._with_tied([m.name for m in found], modules) if self.tied and has_tied_head else found

    def stored_whole(self, modules: Mapping[str, Module], has_tied_head: bool) -> list[Module]:
        """The modules of `modules_to_save`: those whose name, or a part of it up to a dot, ends with one of them."""

        def is_saved(name: str) -> bool:
            parts = name.split(".")
            containers = [".".join(parts[: i + 1]) for i in range(len(parts))]
            return any(container.endswith(each) for each in self.saved for container in containers)

        found = [m for m in modules.values() if is_saved(m.name)]
        return self._with_tied([m.name for m in found], modules) if self.tied and has_tied_head else found

    def _with_tied(self, names: Iterable[str], modules: Mapping[str, Module]) -> list[Module]:
        asked = set(names)
        asked |= {TABLE, HEAD} if asked & {TABLE, HEAD} else set()
        return [m for m in modules.values() if m.name in asked]

    def _excluded(self, name: str) -> bool:
        listed = self._matches(self.exclude, name) if isinstance(self.exclude, str) else _listed(self.exclude, name)
        return listed or any(self._matches(rf"(^|.*\.){each}($|\..*)", name) for each in self.saved)

    def _is_target(self, module: Module) -> bool:
        if isinstance(self.targets, str):
            if self.targets.lower() == "all-linear":
                return module.kind == "linear"
            return self._matches(self.targets, module.name)
        if module.name in self.targets:
            return True
        return _listed(self.targets, module.name) and self._in_layers(module)

    def _in_layers(self, module: Module) -> bool:
        if self.layers is None:
            return True
        named = not self.layers_names or any(
            f".{module.name}".find(f".{each}.{module.layer}.") >= 0 for each in self.layers_names
        )
        return module.layer in self.layers and named

    def _ends(self, pattern: str, name: str) -> bool:
        plain = pattern.removeprefix("^")
        self._take(1 + len(plain) // 64)
        if not re.fullmatch(r"[\w.]+", plain):
            return self._matches(rf"(.*\.)?({pattern})$", name)
        # Names are the rule, and one for each module of a large model makes many pairs; their dots fit any letter.
        before, end = name[: -len(plain)], name[-len(plain) :]
        return (
            len(end) == len(plain)
            and all(one in (".", two) for one, two in zip(plain, end, strict=True))
            and (not before or (before.endswith(".") and plain == pattern))
        )

    def _take(self, steps: int) -> None:
        try:
            self.steps.take(steps)
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}; {REMEDY}") from None

    def _matches(self, pattern: str, name: str) -> bool:
        try:
            return matches(pattern, name, self.steps)
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}; {REMEDY}") from None


def read_settings(path: Path) -> Settings:
    """Reads adapter_config.json.

    Raises:
      FileNotFoundError: there is none.
      ValueError: it is damaged, or has settings that are not computed here.
    """
    if not path.exists():
        inside = sorted(each.parent for each in path.parent.glob(f"*/{CONFIG}")) if path.parent.is_dir() else []
        also = f"; there is one in {inside[0]}" if inside else ""
        raise FileNotFoundError(f"{path}: the file is missing; name a folder that PEFT or this library wrote{also}")
    found = read_object(path)
    if (kind := found.get("peft_type")) != "LORA":
        raise ValueError(f"{path}: peft_type is {shown(kind)}, and only 'LORA' is computed here; {REMEDY}")
    if (bias := found.get("bias", "none")) not in ("none", "all", "lora_only"):
        raise ValueError(f"{path}: bias={shown(bias)} is none of 'none', 'all', 'lora_only'")
    if (init := found.get("init_lora_weights")) not in _INITS:
        raise ValueError(f"{path}: init_lora_weights={shown(init)} changes the base's weights, too; {REMEDY}")
    if wrong := [key for key, value in found.items() if key not in _READ | _INERT and value]:
        near = did_you_mean(wrong[0], _READ)
        raise ValueError(
            f"{path}: {shown(wrong[0])[1:-1]}={shown(found[wrong[0]])} is not computed here; {REMEDY}{near}"
        )
    try:
        lora = LoraConfig(
            found.get("r", 8),
            found.get("lora_alpha", 8),
            rslora=_flag(found, "use_rslora"),
            dropout=found.get("lora_dropout", 0.0),
            dora=_flag(found, "use_dora"),
        )
        targets, exclude = found.get("target_modules"), _or(found, "exclude_modules", [])
        layers = found.get("layers_to_transform")
        if isinstance(targets, str) and layers is not None:
            raise ValueError(f"layers_to_transform={shown(layers)} needs a list of target_modules, as in PEFT")
        return Settings(
            path,
            lora,
            targets if isinstance(targets, str) else _strings(targets, "target_modules"),
            exclude if isinstance(exclude, str) else _strings(exclude, "exclude_modules"),
            _layers(layers),
            _layers_names(found.get("layers_pattern")),
            _patterns(found, "rank_pattern"),
            _patterns(found, "alpha_pattern"),
            _strings(_or(found, "modules_to_save", []), "modules_to_save"),
            _tokens(_or(found, "trainable_token_indices", {})),
            _flag(found, "ensure_weight_tying"),
            _text(found, "base_model_name_or_path"),
        )
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _or(found: Mapping[str, Any], key: str, default: Any) -> Any:
    """The value of a key that may be absent or null."""
    return default if (value := found.get(key)) is None else value


def _flag(found: Mapping[str, Any], key: str) -> bool:
    if not isinstance(value := _or(found, key, False), bool):
        raise ValueError(f"{key}={shown(value)} must be true or false")
    return value


def _text(found: Mapping[str, Any], key: str) -> str:
    if not isinstance(value := _or(found, key, ""), str):
        raise ValueError(f"{key}={shown(value)} must be a string")
    return value


def _listed(names: list[str], name: str) -> bool:
    return any(f".{name}".endswith(f".{each}") for each in names)


def _strings(value: Any, key: str) -> list[str]:
    if not (isinstance(value, list) and all(isinstance(each, str) for each in value)):
        also = ", a regular expression or 'all-linear'" if key == "target_modules" else ""
        raise ValueError(f"{key}={shown(value)} must be a list of names{also}")
    if len(value) > _MOST:
        raise ValueError(f"{key} lists {len(value)} names, more than {_MOST}: name kinds of modules, such as 'o_proj'")
    return value


def _layers(value: Any) -> list[int] | None:
    numbers = [value] if type(value) is int else value
    if numbers is not None and not (
        isinstance(numbers, list) and all(map(is_whole, numbers)) and len(numbers) <= _MOST
    ):
        raise ValueError(f"layers_to_transform={shown(value)} must be a layer's number, or a list of them")
    return numbers or None


def _layers_names(value: Any) -> list[str]:
    names = _strings([value] if isinstance(value, str) else [] if value is None else value, "layers_pattern")
    if strange := [name for name in names if not re.fullmatch(r"[\w.]*", name)]:
        raise ValueError(f"layers_pattern={shown(strange[0])} is not computed here, only a name such as 'layers'")
    return [name for name in names if name]


def _patterns(found: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = _or(found, key, {})
    if not isinstance(value, dict):
        raise ValueError(f"{key}={shown(value)} must map names to numbers")
    return value


def _tokens(value: Any) -> dict[str, list[int]]:
    rows = value if isinstance(value, dict) else {} if value == [] else {"embed_tokens": value}
    for ids in rows.values():
        if not (isinstance(ids, list) and ids and all(map(is_whole, ids)) and len(set(ids)) == len(ids)):
            raise ValueError(
                f"trainable_token_indices={shown(value)} must be a list of token ids, or one for each module"
            )
    return rows

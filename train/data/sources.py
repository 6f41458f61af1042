"""What a run names as its data -> files: a file, or one split of a data set in a folder or on the Hugging Face hub.

    chats.jsonl                                        a file
    HuggingFaceH4/ultrachat_200k:train_sft             a hub data set, and which of its splits
    openai/gsm8k:main:train                            one with several configurations
    owner/name@REVISION:train                          a commit, tag or branch of it
    hf://datasets/owner/name/data/part.parquet         a file of it, or a pattern
    folder:train                                       a folder here that holds a data set as on the hub

Which files are a split is told by the data set's card (README.md), or else by their names, as for `datasets`. Only data
files are fetched, never a script.
"""

from __future__ import annotations

import fnmatch
import glob
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .files import COMPRESSED, SUFFIXES

_HUB = re.compile(
    r"(?P<scheme>hf://datasets/)?(?P<id>[\w.-]+/[\w.-]+)(?:@(?P<revision>refs/(?:convert/\w+|pr/\d+)|[^/:@]+))?"
    r"(?:/(?P<inside>[^:]+))?(?P<parts>(?::[^:/]+){0,2})"
)
_SYNONYMS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_ABOUT = re.compile(r"(dataset_infos?|dataset_dict|state|config)\.json|cache-.*\.arrow")  # written by `datasets`
_SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})(\W.*)")


def find_files(name: str | os.PathLike[str]) -> list[Path]:
    """The files of a data set, in order; downloads those that are not in the hub's local cache yet.

    Raises:
      FileNotFoundError: there is no such file, folder or data set, or it has no data files.
      ValueError: it has several configurations or no such split; says which there are.
    """
    path = Path(name)
    if path.is_file():
        return [path]
    folder, *parts = str(name).split(":") if "://" not in str(name) else [""]
    if path.is_dir() or (folder and Path(folder).is_dir() and len(parts) <= 2):
        folder, parts = (str(path), []) if path.is_dir() else (folder, parts)
        names = [str(each.relative_to(folder)) for each in Path(folder).rglob("*") if each.is_file()]
        return [Path(folder) / each for each in choose(folder, names, _card(Path(folder)), parts)]
    found = _HUB.fullmatch(str(name))
    is_id = found is not None and (found["scheme"] or not (found["inside"] or is_data(found["id"])))
    if found is None or not is_id:
        more = "" if is_data(str(name)) else ", or name a folder, or a data set of the hub as owner/name:split"
        raise FileNotFoundError(f"{name}: no such file; give one of JSON lines{more}")
    return _fetch(found["id"], found["revision"], found["inside"], found["parts"].split(":")[1:])


def choose(source: str, names: Sequence[str], card: Sequence[Any], parts: Sequence[str]) -> list[str]:
    """Which files of a data set are meant by [], [split] or [configuration, split].

    Args:
      source: for messages.
      names: all files, with folders.
      card: the field `configs` of its card, [] if there is none.
    """
    shown = [name for name in names if not any(part.startswith((".", "__")) for part in Path(name).parts)]
    data = sorted(name for name in shown if is_data(name) and not _ABOUT.fullmatch(Path(name).name))
    if not data:
        scripts = [name for name in names if name.endswith(".py")]
        more = " but a script; owner/name@refs/convert/parquet may have its data" if scripts else ""
        raise FileNotFoundError(f"{source}: has no file of {', '.join(SUFFIXES)}{more}")
    split = parts[-1] if parts else "train"
    splits = _by_card(source, data, card, parts[0] if len(parts) == 2 else None) or _by_name(
        data if len(parts) < 2 else [name for name in data if parts[0] in re.split(r"[/\\]|[-._]\w*$", name)]
    )
    if split not in splits:
        raise ValueError(f"{source}: has no split {split!r}; name one as {source}:SPLIT, of {', '.join(splits)}")
    picked = splits[split]
    kinds = {next(s for s in SUFFIXES if s in Path(name).suffixes) for name in picked}
    if len(kinds) > 1:
        raise ValueError(f"{source}: its split {split!r} has files of several kinds ({', '.join(picked)}); name a file")
    _require_all_shards(source, picked)
    return picked


def is_data(name: str) -> bool:
    """Whether a file of this name is read as data."""
    suffixes = Path(name.lower()).suffixes
    return (suffixes[:-1] if suffixes[-1:] and suffixes[-1] in COMPRESSED else suffixes)[-1:] in [[s] for s in SUFFIXES]


def _by_card(source: str, data: Sequence[str], card: Sequence[Any], wanted: str | None) -> dict[str, list[str]]:
    """The splits that the card lists: [{config_name, default, data_files: [{split, path}] or data_dir}]."""
    listed = [each for each in card if isinstance(each, dict) and {"data_files", "data_dir"} & each.keys()]
    configs = {str(each.get("config_name", "default")): each for each in listed}
    if not configs:
        return {}
    preferred = [name for name, each in configs.items() if each.get("default") is True or name == "default"]
    name = wanted or (list(configs) if len(configs) == 1 else [*preferred, None])[0]
    if name not in configs:
        raise ValueError(
            f"{source}: has several configurations; name one as {source}:CONFIGURATION:SPLIT, of {', '.join(configs)}"
        )
    folder = str(configs[name].get("data_dir") or "").strip("./")
    data = [each for each in data if each.startswith(f"{folder}/")] if folder else data
    files = configs[name].get("data_files")
    if files is None:
        return _by_name(data)
    splits: dict[str, list[str]] = {}
    try:
        for entry in files if isinstance(files, list) and not isinstance(files[0], str) else [{"path": files}]:
            patterns = entry["path"] if isinstance(entry["path"], list) else [entry["path"]]
            patterns = [f"{folder}/{each}" if folder else each.removeprefix("./") for each in patterns]
            if matching := [each for each in data if any(_matches(each, pattern) for pattern in patterns)]:
                splits[str(entry.get("split", "train"))] = matching
    except (KeyError, TypeError, AttributeError, IndexError):
        raise ValueError(f"{source}: its card lists data_files in an unknown way; name a file of it") from None
    return splits


def _matches(name: str, pattern: str) -> bool:
    """Whether a pattern of a card means this file; "**/" may stand for no folder, too."""
    return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, pattern.replace("**/", ""))


def _by_name(data: Sequence[str]) -> dict[str, list[str]]:
    """The splits that the names tell: data/SPLIT-00000-of-00003.parquet, or a word such as "validation"."""
    splits: dict[str, list[str]] = {}
    for name in data:
        if (shard := _SHARD.fullmatch(name)) and shard[1].startswith("data/"):
            splits.setdefault(shard[1].removeprefix("data/"), []).append(name)
    for split, words in _SYNONYMS.items() if not splits else ():
        pattern = re.compile(rf"(^|[-._ /0-9])({'|'.join(words)})($|[-._ /0-9])")
        if matching := [name for name in data if pattern.search(name)]:
            splits[split] = matching
    return splits or {"train": list(data)}


def _require_all_shards(source: str, names: Sequence[str]) -> None:
    """A part of a data set is not taken for the whole."""
    for name in names:
        if re.search(r"(^|/)partial-", name):  # the hub's own conversions to parquet stop at some size
            raise FileNotFoundError(f"{source}: {name} is only a part of this split; name hf://datasets/... to have it")
        if shard := _SHARD.fullmatch(name):
            expected = {f"{shard[1]}-{number:05}-of-{shard[3]}{shard[4]}" for number in range(int(shard[3]))}
            alike = [each for each in names if each.startswith(f"{shard[1]}-") and f"-of-{shard[3]}" in each]
            if len(alike) < len(expected):
                raise FileNotFoundError(f"{source}: only {len(alike)} of {shard[3]} files like {name} are there")


def _card(folder: Path) -> list[Any]:
    """The field `configs` of the card in a folder."""
    from huggingface_hub.repocard import metadata_load

    if not (folder / "README.md").is_file():
        return []
    configs = (metadata_load(folder / "README.md") or {}).get("configs")
    return configs if isinstance(configs, list) else []


def _fetch(hub_id: str, revision: str | None, inside: str | None, parts: Sequence[str]) -> list[Path]:
    """The files of a split, or with `inside` those of that name, downloaded."""
    from huggingface_hub import HfApi

    offline = False
    try:
        info = HfApi().dataset_info(hub_id, revision=revision)
        names = [each.rfilename for each in info.siblings or []]
    except Exception as error:  # without a network, its class depends on the version of the hub's package
        reason, offline = str(error).splitlines()[0], True
    try:
        folder = _snapshot(hub_id, revision, ["README.md"], offline)
    except OSError as error:
        told = reason if offline else str(error).splitlines()[0]
        raise FileNotFoundError(
            f"{hub_id}: no such file or folder here, and the hub gave no such data set ({told}). "
            "Without a network, fetch its files elsewhere, put them into one folder and name that"
        ) from None
    if offline:
        names = [str(each.relative_to(folder)) for each in folder.rglob("*") if each.is_file()]
    if inside is None:
        picked = choose(hub_id, names, _card(folder), parts)
    else:
        data = sorted(filter(is_data, names))
        picked = [name for name in data if _matches(name, inside) or name.startswith(f"{inside}/")]
        if not picked:
            raise FileNotFoundError(f"{hub_id}: has no data file {inside}; it has {', '.join(data)}")
    patterns = [glob.escape(name) for name in picked]
    if offline and inside is None:  # asks for all that are numbered alike: some may never have been fetched
        patterns = [re.sub(r"\d+", "*", pattern) for pattern in patterns]
    try:
        folder = _snapshot(hub_id, revision, patterns, offline)
    except OSError as error:
        raise FileNotFoundError(f"{hub_id}: {str(error).splitlines()[0]}") from None
    return [folder / name for name in picked]


def _snapshot(hub_id: str, revision: str | None, patterns: Sequence[str], offline: bool) -> Path:
    """The folder of the local cache that then has these files. Raises OSError, also for what the hub answers."""
    from huggingface_hub import snapshot_download

    return Path(
        snapshot_download(
            hub_id, repo_type="dataset", revision=revision, allow_patterns=list(patterns), local_files_only=offline
        )
    )

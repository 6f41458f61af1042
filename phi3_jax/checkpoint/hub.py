"""Downloads from the Hugging Face hub: only of files that are asked for by name."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
)
# The only files of a checkpoint that are fetched from a hub: weights and data, never code.
HUB_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model-*-of-*.safetensors",
    "model.safetensors.index.json",
    "adapter_config.json",
    "adapter_model.safetensors",
    "trained_on.json",
    *TOKENIZER_FILES,
)
_HUB_ID = re.compile(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")


def is_hub_id(path: str | os.PathLike[str]) -> bool:
    """Whether this may be a hub id: "microsoft/Phi-3-mini-4k-instruct", or with a revision "owner/name@revision"."""
    return _HUB_ID.fullmatch(str(path)) is not None


def with_revision(path: str | os.PathLike[str], revision: str) -> str:
    """The hub id "owner/name@revision". Raises ValueError if the path is no hub id, or names another revision."""
    match = _HUB_ID.fullmatch(str(path))
    if match is None or Path(path).exists():
        raise ValueError(f"revision={revision!r} is for hub ids, and {path} is none: leave it out")
    if match[2] not in (None, revision):
        raise ValueError(f"{path}: revision={revision!r} is another one: give only one of them")
    return f"{match[1]}@{revision}"


def download(hub_id: str, files: Sequence[str]) -> Path:
    """Downloads the files (names or patterns) that are not in the hub's local cache yet -> their folder there.

    Args:
      hub_id: "owner/name", or "owner/name@revision" with a branch, tag or commit.

    Raises:
      FileNotFoundError: the hub has no such model or revision, or cannot be reached; says what to do.
      ValueError: a revision is asked of what lies on this machine.
    """
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    match = _HUB_ID.fullmatch(hub_id)
    if match is None:
        raise ValueError(f"{hub_id}: not a hub id with a revision, such as microsoft/Phi-3-mini-4k-instruct@main")
    name, revision = match.groups()
    if revision is not None and Path(name).exists():
        raise ValueError(f"{hub_id}: {name} lies on this machine, and revisions are for hub ids: leave @{revision} out")
    try:
        return Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=list(files)))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        what = "model" if revision is None else f"model, or no revision {revision} of it"
        raise FileNotFoundError(
            f"{hub_id}: no such folder here, and the hub gave no such {what} ({str(error).splitlines()[0]}). Without a "
            f"network, fetch these files elsewhere, put them into one folder and name that: {', '.join(files)}"
        ) from None

"""Downloads from the Hugging Face hub: only of files that are asked for by name."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def is_hub_id(path: str | os.PathLike[str]) -> bool:
    """Whether this may be a hub id, such as "microsoft/Phi-3-mini-4k-instruct"."""
    return _HUB_ID.fullmatch(str(path)) is not None


def download(hub_id: str, files: Sequence[str]) -> Path:
    """Downloads the files (names or patterns) that are not in the hub's local cache yet -> their folder there.

    Raises:
      FileNotFoundError: the hub has no such model, or cannot be reached; says what to do.
    """
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(huggingface_hub.snapshot_download(hub_id, allow_patterns=list(files)))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise FileNotFoundError(
            f"{hub_id}: no such folder here, and the hub gave no such model ({str(error).splitlines()[0]}). Without a "
            f"network, fetch these files elsewhere, put them into one folder and name that: {', '.join(files)}"
        ) from None

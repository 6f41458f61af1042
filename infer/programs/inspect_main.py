"""phi3-inspect: shows how a model turns a prompt into its next word; or what its weights are.

phi3-inspect --prompt "The capital of France is"
phi3-inspect --prompt "The capital of France is" --format html --format png --output france --generate 20
phi3-inspect --prompt "The capital of France is" --compare_quantize int4
phi3-inspect --checkpoint microsoft/Phi-3-mini-4k-instruct --weights
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from absl import flags

import phi3_jax
from phi3_jax.checkpoint import require_tokenizer
from phi3_jax.checkpoint.atomic_write import new_file
from phi3_jax.command_line.model_flags import ADAPTER, CHECKPOINT, QUANTIZE
from phi3_jax.command_line.program import run_program
from phi3_jax.command_line.progress import progress_bar
from phi3_jax.regular_file import read_text

from ..inspection import collect
from . import flags as common

_PROMPT = flags.DEFINE_string("prompt", None, "The text to read, or with --chat the user's message.")
_PROMPT_FILE = flags.DEFINE_string("prompt_file", None, "A file that holds it; - is standard input.")
_CHAT = flags.DEFINE_bool("chat", False, "Put the prompt into the checkpoint's chat template.")
_PARSE_SPECIAL = flags.DEFINE_bool("parse_special", False, "Let text such as <|user|> in the prompt be special tokens.")
_FORMATS = ["html", "png", "json"]
_FORMAT = flags.DEFINE_multi_enum(
    "format", ["html"], _FORMATS, "What to write; give several. png needs the extra plot."
)
_OUTPUT = flags.DEFINE_string(
    "output", "inspect", "The files' name, to which .html, .png or .json is added; of one format also with its ending."
)

_TOPICS: dict[str, list[flags.FlagHolder[Any]]] = {
    "Model": [CHECKPOINT, ADAPTER, common.DTYPE, QUANTIZE, common.VERBOSE],
    "Prompt": [_PROMPT, _PROMPT_FILE, _CHAT, common.SYSTEM, _PARSE_SPECIAL],
    "What is written": [_FORMAT, _OUTPUT],
}


def main() -> int:
    """Loads, runs the prompt, prints a summary, and writes the files."""
    _check_flags()
    places = _places()
    text = _prompt_text()
    checkpoint = common.load_checkpoint()
    ids = _ids(checkpoint, text)
    with progress_bar("reading", unit="") as on_progress:
        report = collect(checkpoint, ids, text, name=_name(), on_progress=on_progress)
    for kind, place in places.items():
        _write(report, kind, place)
        print(f"{place}: {place.stat().st_size / 1e6:.1f} MB", file=sys.stderr)
    return 0


def _write(report: dict[str, Any], kind: str, place: Path) -> None:
    if kind == "png":
        from ..inspection.picture import save_png

        save_png(report, place)
        return
    text = _as_json(report)
    if kind == "html":
        from ..inspection.html import html

        text = html(report)
    with new_file(place, overwrite=True) as partial:
        partial.write_text(text, encoding="utf-8")


def _as_json(report: dict[str, Any]) -> str:
    return json.dumps(report, ensure_ascii=False, separators=(",", ":"), allow_nan=False) + "\n"


def _places() -> dict[str, Path]:
    """Where each format is written. Raises ValueError where there is no folder for it, before a model is loaded."""
    output, kinds = Path(_OUTPUT.value), list(dict.fromkeys(_FORMAT.value))
    if not output.parent.is_dir():
        raise ValueError(f"--output={output}: there is no folder {output.parent}; make it first")
    if len(kinds) == 1 and output.suffix == f".{kinds[0]}":
        return {kinds[0]: output}
    return {kind: output.with_name(f"{output.name}.{kind}") for kind in kinds}


def _ids(checkpoint: phi3_jax.Checkpoint, text: str) -> list[int]:
    tokenizer, most = require_tokenizer(checkpoint), checkpoint.config.max_position_embeddings
    if not _CHAT.value:
        return tokenizer.encode(text, parse_special=_PARSE_SPECIAL.value, add_eos=False, most=most)
    system = [] if common.SYSTEM.value is None else [{"role": "system", "content": common.SYSTEM.value}]
    return phi3_jax.encode_chat(tokenizer, [*system, {"role": "user", "content": text}], most=most)


def _name() -> str:
    """The model's name, for titles: the last part of a path or hub id."""
    name = CHECKPOINT.value.rstrip("/").rsplit("/", 1)[-1].removesuffix(".gguf")
    return name + (f" with {Path(ADAPTER.value).name}" if ADAPTER.value else "")


def _prompt_text() -> str:
    if _PROMPT_FILE.value is None:
        return _PROMPT.value or ""
    return sys.stdin.read() if _PROMPT_FILE.value == "-" else read_text(_PROMPT_FILE.value)


def _check_flags() -> None:
    """Raises ValueError for flags that contradict one another, or that would have no effect."""
    if (_PROMPT.value is None) == (_PROMPT_FILE.value is None):
        raise ValueError('give one of --prompt and --prompt_file, as in --prompt "The capital of France is"')
    if common.SYSTEM.value is not None and not _CHAT.value:
        raise ValueError("--system needs --chat")


def run() -> None:
    """The console script."""
    run_program("phi3-inspect", main, _TOPICS)


if __name__ == "__main__":
    run()

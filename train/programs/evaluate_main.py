"""phi3-evaluate: how surprising texts or answers are to a model, and how often it picks the right one of several.

phi3-evaluate --checkpoint demo --text held-out.txt --stride 512
phi3-evaluate --checkpoint demo --adapter runs/train/adapter --data held_out.jsonl
phi3-evaluate --checkpoint demo --questions quiz.jsonl --json figures.json

--text takes a file of plain text, or JSON lines {"text": ...}, each a text of its own. --data takes what phi3-train
takes, and gives the loss of the tokens that training would learn: in chats, the answers. --questions takes JSON lines
{"question": ..., "choices": [..., ...], "answer": NUMBER}, where 0 is the first choice.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import typing
from pathlib import Path
from typing import Any

from absl import flags

import phi3_jax
from phi3_jax.checkpoint import require_tokenizer
from phi3_jax.checkpoint.atomic_write import new_file
from phi3_jax.command_line.model_flags import ADAPTER, CHECKPOINT, QUANTIZE
from phi3_jax.command_line.program import run_program
from phi3_jax.command_line.progress import progress_bar

from ..data import find_files
from ..evaluation.evaluate import Accuracy, HeldOutLoss, Perplexity, accuracy, held_out_loss, perplexity
from ..evaluation.files import read_data, read_questions, read_texts
from ..evaluation.score import PATHS, usual_path
from ..evaluation.score import Path as ScoringPath

_DTYPE = flags.DEFINE_enum(
    "dtype",
    "auto",
    ["auto", "float32", "bfloat16", "float16"],
    "What weights become that are not quantised. auto: float32 on the CPU, elsewhere as stored.",
)
_PATH = flags.DEFINE_enum(
    "path",
    None,
    PATHS,
    "generation: what phi3-generate runs, by its kernels, which round activations, and with its cache. exact: XLA's "
    "operations on the same weights, as training has it. By default generation where weights are packed for the CPU's "
    "kernels, else exact.",
)
_TEXT = flags.DEFINE_string("text", None, "A text, or .jsonl with many, whose perplexity is wanted.")
_WINDOW = flags.DEFINE_integer(
    "window", None, "Tokens that are read at a time; by default the context, 2048 at most.", upper_bound=1 << 20
)
_STRIDE = flags.DEFINE_integer(
    "stride",
    None,
    "A window begins so many tokens after the one before; by default half of it. Less is slower, and fair.",
)
_DATA = flags.DEFINE_string("data", None, "A file or data set as for phi3-train, whose held-out loss is wanted.")
_PARSE_SPECIAL = flags.DEFINE_bool("parse_special", False, "As phi3-train's setting: for --data in plain text.")
_QUESTIONS = flags.DEFINE_string("questions", None, "A .jsonl of questions with choices.")
_JSON = flags.DEFINE_string("json", None, "A file for all figures.")


def main() -> int:
    """Reads the files, loads the model, evaluates and prints."""
    if not (_TEXT.value or _DATA.value or _QUESTIONS.value):
        raise ValueError("give --text, --data or --questions, or several of them")
    texts = read_texts(_TEXT.value) if _TEXT.value else []
    questions = read_questions(_QUESTIONS.value) if _QUESTIONS.value else []
    if _DATA.value:
        find_files(_DATA.value)  # raises before the model is loaded, with the tokenizer that reads it
    checkpoint = _load()
    path = usual_path(checkpoint) if _PATH.value is None else typing.cast(ScoringPath, _PATH.value)
    limit = checkpoint.config.max_position_embeddings
    data = []
    if _DATA.value:
        data = read_data(_DATA.value, require_tokenizer(checkpoint), limit, _PARSE_SPECIAL.value, _note)
    figures: dict[str, Any] = {"path": path}
    if _TEXT.value:
        with progress_bar("texts", "text") as on_progress:
            surprise = perplexity(checkpoint, texts, _WINDOW.value, _STRIDE.value, on_progress, path)
        print(f"{_TEXT.value}: {_tell_perplexity(surprise)}; {path} path", flush=True)
        figures["text"] = {"file": _TEXT.value, "measured": dataclasses.asdict(surprise)}
    if data:
        with progress_bar("data", "text") as on_progress:
            found = held_out_loss(checkpoint, data, on_progress, path)
        print(f"{_DATA.value}: {_tell_held_out_loss(found)}; {path} path", flush=True)
        figures["data"] = {"file": _DATA.value, "measured": dataclasses.asdict(found)}
    if questions:
        with progress_bar("questions", "answer") as on_progress:
            right = accuracy(checkpoint, questions, on_progress, path)
        print(f"{_QUESTIONS.value}: {_tell_accuracy(right)}; {path} path", flush=True)
        figures["questions"] = {"file": _QUESTIONS.value, "measured": dataclasses.asdict(right)}
    if _JSON.value:
        with new_file(Path(_JSON.value), overwrite=True) as partial:
            partial.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return 0


def _note(text: str) -> None:
    print(f"phi3-evaluate: {text}", file=sys.stderr, flush=True)


def _load() -> phi3_jax.Checkpoint:
    with progress_bar("loading") as on_progress:
        return phi3_jax.load(
            CHECKPOINT.value,
            _DTYPE.value,
            quantize=QUANTIZE.value,
            layout="rows" if _PATH.value == "exact" else "auto",
            adapter=ADAPTER.value,
            on_progress=on_progress,
        )


def _tell_perplexity(found: Perplexity) -> str:
    return (
        f"perplexity {found.perplexity:.4f}, loss {found.loss:.4f}, {found.bits_per_byte:.4f} bits per byte, "
        f"{found.tokens} tokens"
    )


def _tell_held_out_loss(found: HeldOutLoss) -> str:
    return f"loss {found.loss:.4f}, perplexity {found.perplexity:.4f}, {found.tokens} learned tokens"


def _tell_accuracy(found: Accuracy) -> str:
    return (
        f"accuracy {found.accuracy:.4f} +- {found.standard_error:.4f}, by character {found.accuracy_normalised:.4f}, "
        f"{found.questions} questions"
    )


def run() -> None:
    """The console script."""
    topics: dict[str, list[flags.FlagHolder[Any]]] = {
        "Model": [CHECKPOINT, ADAPTER, _DTYPE, QUANTIZE],
        "What is measured": [_TEXT, _WINDOW, _STRIDE, _DATA, _PARSE_SPECIAL, _QUESTIONS, _PATH, _JSON],
    }
    run_program("phi3-evaluate", main, topics)


if __name__ == "__main__":
    run()

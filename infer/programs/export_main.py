"""phi3-export: writes a checkpoint as a GGUF file for llama.cpp, or as a Hugging Face folder.

phi3-export --checkpoint demo --format gguf --type q8_0 --output demo-q8_0.gguf
phi3-export --checkpoint model.gguf --format safetensors --type bf16 --output model
phi3-export --checkpoint demo --adapter runs/train/adapter --format safetensors --output tuned
phi3-export --checkpoint phi-4 --quantize int4 --adapter runs/qlora/adapter --format safetensors --output tuned
phi3-export --checkpoint phi-4 --format safetensors --as llama --output phi-4-llama

With --quantize, or a checkpoint of integers, what these stand for is written as floats, with the adapter that was
trained on them. Quantising the result again gives other integers, to which the adapter does not belong.
"""

from __future__ import annotations

import dataclasses
import logging
import sys
import typing
from pathlib import Path

from absl import flags

import phi3_jax
from phi3_jax.checkpoint import as_floats, holds_integers, kind_of_weights, stored_dtype
from phi3_jax.checkpoint.atomic_write import reserved
from phi3_jax.checkpoint.gguf.writer import GgufType, save_gguf
from phi3_jax.command_line.model_flags import ADAPTER, CHECKPOINT, QUANTIZE
from phi3_jax.command_line.program import run_program
from phi3_jax.command_line.progress import progress_bar
from phi3_jax.config import Architecture

_FORMAT = flags.DEFINE_enum(
    "format", "gguf", ["gguf", "safetensors"], "One file for llama.cpp (needs the extra gguf), or a folder."
)
_TYPE = flags.DEFINE_enum(
    "type",
    "bf16",
    typing.get_args(GgufType),
    "What the weights become; q8_0 and q4_0, which are rounded to 8.5 and 4.5 bits, only in GGUF.",
)
_OUTPUT = flags.DEFINE_string("output", None, "The file or folder to write, which must not exist yet.", required=True)
_TOKENIZER = flags.DEFINE_bool("tokenizer", True, "--notokenizer: GGUF without the vocabulary; ids in, ids out.")
_AS = flags.DEFINE_enum(
    "as",
    "phi3",
    typing.get_args(Architecture),
    "What a folder is written as; llama: q, k, v, gate and up apart, as a LlamaForCausalLM, or as a MistralForCausalLM "
    "where there is a window.",
)
_DTYPES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}


def main() -> int:
    """Loads and writes; notes on standard error where other programs are known to read the file differently."""
    logging.getLogger("gguf").setLevel(logging.WARNING)  # it logs its plan at level INFO, which absl shows
    output, kind = Path(_OUTPUT.value), _TYPE.value
    if _FORMAT.value == "safetensors" and kind not in _DTYPES:
        raise ValueError(f"--type={kind} is a type of GGUF's; give --format gguf, or one of {', '.join(_DTYPES)}")
    if _FORMAT.value == "safetensors" and not _TOKENIZER.value:
        raise ValueError("--notokenizer is for --format gguf")
    if _FORMAT.value == "gguf" and _AS.value != "phi3":
        raise ValueError(f"--as={_AS.value} is for --format safetensors")
    with reserved(output):  # before the weights are loaded
        return _export(output, kind)


def _export(output: Path, kind: str) -> int:
    checkpoint = _load(kind)
    if _FORMAT.value == "safetensors":
        phi3_jax.save(checkpoint, output, architecture=typing.cast(Architecture, _AS.value))
        return 0
    if not _TOKENIZER.value:
        checkpoint = dataclasses.replace(checkpoint, tokenizer=None)
    with progress_bar("writing") as on_progress:
        remarks = save_gguf(checkpoint, output, typing.cast(GgufType, kind), on_progress=on_progress)
    for remark in remarks:
        print(f"note: {remark}", file=sys.stderr)
    return 0


def _load(kind: str) -> phi3_jax.Checkpoint:
    """The floats to write, and a line on what they are."""
    ours = holds_integers(CHECKPOINT.value)
    integers = QUANTIZE.value is not None or ours
    dtype = _DTYPES.get(kind) or ("float32" if integers else stored_dtype(CHECKPOINT.value))
    with progress_bar("loading") as on_progress:
        checkpoint = phi3_jax.load(
            CHECKPOINT.value,
            "auto" if ours else dtype,
            quantize=QUANTIZE.value,
            layout="rows",
            adapter=ADAPTER.value,
            on_progress=on_progress,
        )
    policy = QUANTIZE.value or kind_of_weights(checkpoint.params)
    if integers:
        checkpoint = dataclasses.replace(checkpoint, params=as_floats(checkpoint.params, dtype))
    if integers or ADAPTER.value:
        weights = f"the {policy} weights as floats," if integers else "the float weights"
        told = f"{weights} with the adapter merged" if ADAPTER.value else weights.rstrip(",")
        print(f"{_OUTPUT.value}: {told}", file=sys.stderr)
    return checkpoint


def run() -> None:
    """The console script."""
    run_program(
        "phi3-export",
        main,
        {"What to write": [CHECKPOINT, ADAPTER, QUANTIZE, _FORMAT, _TYPE, _AS, _OUTPUT, _TOKENIZER]},
    )


if __name__ == "__main__":
    run()

"""phi3-inspect: shows how a model turns a prompt into its next word; or what its weights are.

phi3-inspect --prompt "The capital of France is"
phi3-inspect --prompt "The capital of France is" --format html --format png --output france --generate 20
phi3-inspect --prompt "The capital of France is" --compare_quantize int4
phi3-inspect --weights --quantize int4
phi3-inspect --weights --preset phi-3-mini
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from absl import flags

import phi3_jax
from phi3_jax.checkpoint import holds_integers, require_tokenizer, resolve, stored_tensors
from phi3_jax.checkpoint.atomic_write import new_file
from phi3_jax.command_line.model_flags import ADAPTER, CHECKPOINT, QUANTIZE
from phi3_jax.command_line.program import run_program
from phi3_jax.command_line.progress import progress_bar

from ..engine.buckets import own_cache_dtype
from ..inspection import collect, compare, summary, texts, timeline, weigh, weigh_shapes
from ..inspection.html import html
from ..inspection.picture import save_png
from ..inspection.report import require_size, sampling_defaults
from ..sampling import Sampling
from . import flags as common

_FORMAT = flags.DEFINE_multi_enum(
    "format",
    ["html"],
    ["html", "png", "json"],
    "What to write: a page, a picture (needs the extra plot), or the numbers; may be given several times. With "
    "--weights only json, and by default nothing.",
)
_OUTPUT = flags.DEFINE_string(
    "output",
    None,
    "The files' name, by default inspect; .html, .png or .json is added where it does not end so.",
    allow_override=True,  # phi3-generate's goes beside it in the process of the tests
)
_GENERATE = flags.DEFINE_integer(
    "generate",
    None,
    "Go on for so many tokens, and show each step, of the likeliest tokens and of a run that draws them.",
    lower_bound=1,
    upper_bound=1024,
)
_COMPARE = flags.DEFINE_string(
    "compare", None, "Another checkpoint with the same vocabulary: show layer by layer where the two part."
)
_COMPARE_ADAPTER = flags.DEFINE_string(
    "compare_adapter", None, "The adapter of the other model; without --compare it is the same checkpoint."
)
_COMPARE_QUANTIZE = flags.DEFINE_string(
    "compare_quantize", None, "The integers of the other model; without --compare it is the same checkpoint."
)
_WEIGHTS = flags.DEFINE_bool("weights", False, "Without a prompt: a table of the model's weights.")
_PRESET = flags.DEFINE_enum(
    "preset", None, sorted(phi3_jax.PRESETS), "With --weights, in place of a checkpoint: the sizes of this model."
)
_CONTEXT = flags.DEFINE_integer(
    "context", 1024, "With --weights: how many tokens lie behind the one whose work is told.", lower_bound=0
)

_TOPICS: dict[str, list[flags.FlagHolder[Any]]] = {
    "Model": [CHECKPOINT, ADAPTER, common.DTYPE, QUANTIZE, common.VERBOSE],
    "Prompt": [common.PROMPT, common.PROMPT_FILE, common.CHAT, common.SYSTEM, common.PARSE_SPECIAL],
    "What is written": [_FORMAT, _OUTPUT],
    "How it goes on, by default at the temperature of generation_config.json, or 1": [
        _GENERATE,
        common.TEMPERATURE,
        common.SEED,
    ],
    "Beside another model": [_COMPARE, _COMPARE_ADAPTER, _COMPARE_QUANTIZE],
    "Weights": [_WEIGHTS, _PRESET, _CONTEXT, common.CACHE_DTYPE],
}


def main() -> int:
    """Prints a summary, and writes the files."""
    _check_flags()
    places = _places()
    if _WEIGHTS.value:
        table = _weigh()
        told, written = summary.weights_lines(table, _is_coloured()), table
    else:
        written = _inspect(common.prompt_text())
        told = summary.lines(written, _is_coloured())
    # Where a file goes to standard output, nothing else may be there.
    is_taken = any(map(_is_standard_output, places.values()))
    print("\n".join(told), file=sys.stderr if is_taken else sys.stdout, flush=True)
    for kind, place in places.items():
        _write(written, kind, place)
        if place.is_file() and not _is_standard_output(place):
            print(f"{place}: {place.stat().st_size / 1e6:.1f} MB", file=sys.stderr)
    return 0


def _inspect(text: str) -> dict[str, Any]:
    """The report on a prompt."""
    if not text and not common.CHAT.value:
        raise ValueError('the prompt is empty: give it some words, as in --prompt "The capital of France is"')
    if _COMPARE.value is not None:
        resolve(_COMPARE.value)  # raises before a model is loaded
    checkpoint = common.load_checkpoint()
    ids = _ids(checkpoint, text)
    require_size(checkpoint, len(ids))  # before another model is loaded
    sampling = sampling_defaults(checkpoint)
    if common.TEMPERATURE.present:
        sampling = dataclasses.replace(sampling, temperature=common.TEMPERATURE.value)
    comparison = _compared(checkpoint, ids)
    with progress_bar("reading", unit="") as on_progress:
        report = collect(
            checkpoint,
            ids,
            text,
            name=_name(CHECKPOINT.value, ADAPTER.value),
            sampling=sampling,
            on_progress=on_progress,
        )
    if _GENERATE.value is not None:
        _say("writing what follows, twice")
        report["generation"] = timeline(checkpoint, ids, _GENERATE.value, sampling.temperature, common.SEED.value)
    if comparison is not None:
        report["comparison"] = comparison
    texts.add_vocabulary(report, checkpoint.tokenizer)
    return report


def _weigh() -> dict[str, Any]:
    """The table of weights."""
    if _PRESET.value is not None:
        return weigh_shapes(
            phi3_jax.PRESETS[_PRESET.value],
            name=_PRESET.value,
            context=_CONTEXT.value,
            cache_dtype=common.CACHE_DTYPE.value or "bfloat16",
            dtype="bfloat16" if common.DTYPE.value == "auto" else common.DTYPE.value,
            quantize=QUANTIZE.value,
        )
    checkpoint = common.load_checkpoint()
    # Integers of a GGUF file that are kept have nothing to be compared with: as floats they are the same numbers.
    known = QUANTIZE.value not in (None, "stored") and not holds_integers(CHECKPOINT.value)
    with progress_bar("weighing", unit="") as on_progress:
        return weigh(
            checkpoint.config,
            checkpoint.params,
            name=_name(CHECKPOINT.value, ADAPTER.value),
            context=_CONTEXT.value,
            cache_dtype=jnp.dtype(common.CACHE_DTYPE.value or own_cache_dtype(checkpoint)),
            floats=stored_tensors(CHECKPOINT.value) if known else None,
            on_progress=on_progress,
        )


def _compared(checkpoint: phi3_jax.Checkpoint, ids: Sequence[int]) -> dict[str, Any] | None:
    """The comparison; before the report, which takes longer, so that what cannot be compared is told soon."""
    other = _load_other()
    if other is None:
        return None
    _say("comparing")
    return compare(checkpoint, other, ids, _other_name())


def _load_other() -> phi3_jax.Checkpoint | None:
    """The other model of the comparison: what its flags do not name is as it is with ours."""
    if not any(flag.value for flag in (_COMPARE, _COMPARE_ADAPTER, _COMPARE_QUANTIZE)):
        return None
    if _COMPARE.value is not None:
        return common.load_other(_COMPARE.value, _COMPARE_QUANTIZE.value, _COMPARE_ADAPTER.value)
    return common.load_other(
        CHECKPOINT.value, _COMPARE_QUANTIZE.value or QUANTIZE.value, _COMPARE_ADAPTER.value or ADAPTER.value
    )


def _other_name() -> str:
    adapter = _COMPARE_ADAPTER.value or (None if _COMPARE.value else ADAPTER.value)
    name = _name(_COMPARE.value or CHECKPOINT.value, adapter)
    quantize = _COMPARE_QUANTIZE.value or (None if _COMPARE.value else QUANTIZE.value)
    return f"{name}, {quantize}" if quantize else name


def _write(written: dict[str, Any], kind: str, place: Path) -> None:
    """Writes a report in one format; a file that is there is replaced as a whole."""
    if kind == "png":
        logging.getLogger("matplotlib").setLevel(logging.WARNING)  # absl shows messages from INFO on
        save_png(written, place)
        return
    if kind == "html":
        text = html(written)
    else:
        text = json.dumps(written, ensure_ascii=False, separators=(",", ":"), allow_nan=False) + "\n"
    with new_file(place, overwrite=True) as partial:
        partial.write_text(text, encoding="utf-8")


def _places() -> dict[str, Path]:
    """Where each format is written. Raises ValueError or ImportError, before a model is loaded, where it cannot be."""
    output, kinds = Path(_OUTPUT.value or "inspect"), list(dict.fromkeys(_FORMAT.value))
    if _WEIGHTS.value and not _FORMAT.present:
        return {}
    if not output.parent.is_dir():
        raise ValueError(f"--output={output}: there is no folder {output.parent}; make it first")
    if not os.access(output.parent, os.W_OK):
        raise ValueError(f"--output={output}: {output.parent} cannot be written to; name another folder")
    if output.is_dir():
        raise ValueError(f"--output={output}: that is a folder; name a file in it, such as {output / 'inspect'}")
    if "png" in kinds:
        try:
            import matplotlib  # noqa: F401 - before the time that the model takes
        except ImportError:
            raise ImportError("--format=png needs matplotlib: pip install 'phi3_jax[plot]'") from None
    stem = str(output)
    for kind in kinds:
        stem = stem.removesuffix(f".{kind}")
    if (output.exists() and not output.is_file()) or output.is_relative_to("/dev"):  # a pipe, or /dev/stdout
        if len(kinds) > 1:
            raise ValueError(f"--output={output} is no file: it takes one --format, not {len(kinds)}")
        return {kinds[0]: output}
    return {kind: Path(f"{stem}.{kind}") for kind in kinds}


def _ids(checkpoint: phi3_jax.Checkpoint, text: str) -> list[int]:
    tokenizer, most = require_tokenizer(checkpoint), checkpoint.config.max_position_embeddings
    if not common.CHAT.value:
        return tokenizer.encode(text, parse_special=common.PARSE_SPECIAL.value, add_eos=False, most=most)
    system = [] if common.SYSTEM.value is None else [{"role": "system", "content": common.SYSTEM.value}]
    return phi3_jax.encode_chat(tokenizer, [*system, {"role": "user", "content": text}], most=most)


def _name(checkpoint: str, adapter: str | None) -> str:
    """A model's name, for titles: the last part of a path or hub id."""
    name = checkpoint.rstrip("/").rsplit("/", 1)[-1].removesuffix(".gguf")
    return f"{name} with {Path(adapter).name}" if adapter else name


def _check_flags() -> None:
    """Raises ValueError for flags that contradict one another, or that would have no effect."""
    prompts = [flag for flag in (common.PROMPT, common.PROMPT_FILE) if flag.value is not None]
    about_prompts: list[flags.FlagHolder[Any]] = [
        common.CHAT,
        common.PARSE_SPECIAL,
        common.SYSTEM,
        _GENERATE,
        _COMPARE,
        _COMPARE_ADAPTER,
        _COMPARE_QUANTIZE,
    ]
    about_prompts += [common.TEMPERATURE, common.SEED]
    if _WEIGHTS.value:
        if given := [*prompts, *(flag for flag in about_prompts if flag.present)]:
            raise ValueError(f"--weights is about the model alone: leave --{given[0].name} out")
        if _FORMAT.present and set(_FORMAT.value) != {"json"}:
            raise ValueError("--weights prints its table, and writes --format=json; there is no page or picture of it")
        if _OUTPUT.present and not _FORMAT.present:
            raise ValueError("--weights prints its table: --output is for the file of --format=json, give both")
        if _PRESET.value and (CHECKPOINT.present or ADAPTER.present):
            raise ValueError("--preset is the sizes alone: leave --checkpoint and --adapter out")
        return
    if given := [flag for flag in (_PRESET, _CONTEXT, common.CACHE_DTYPE) if flag.present]:
        raise ValueError(f"--{given[0].name} needs --weights")
    if len(prompts) != 1:
        raise ValueError('give one of --prompt and --prompt_file, as in --prompt "The capital of France is"')
    if common.SYSTEM.value is not None and not common.CHAT.value:
        raise ValueError("--system needs --chat")
    if common.CHAT.value and common.PARSE_SPECIAL.value:
        raise ValueError("--parse_special is for a text as it is: leave it or --chat out")
    if common.SEED.present and _GENERATE.value is None:
        raise ValueError("--seed needs --generate")
    Sampling(temperature=common.TEMPERATURE.value, seed=common.SEED.value)  # raises for what cannot be


def _is_coloured() -> bool:
    """Whether standard output is a terminal that shows colours, and the user wants them (https://no-color.org)."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def _is_standard_output(place: Path) -> bool:
    """Whether /dev/stdout or the like is meant, or the same file or pipe by its own name."""
    try:
        return os.path.samestat(place.stat(), os.fstat(sys.stdout.fileno()))
    except (OSError, ValueError):  # there is no such file yet; or standard output is none
        return False


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def run() -> None:
    """The console script."""
    run_program("phi3-inspect", main, _TOPICS)


if __name__ == "__main__":
    run()

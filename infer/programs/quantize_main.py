"""phi3-quantize: writes a checkpoint whose weights are integers, which loads in seconds.

phi3-quantize --checkpoint microsoft/Phi-3-mini-4k-instruct --quantize int4 --output mini-int4
phi3-quantize --checkpoint microsoft/Phi-3-mini-4k-instruct --quantize int4 --calibration some.txt --output mini-int4
phi3-generate --checkpoint mini-int4 --prompt "Hello"

With --adapter, the adapter is merged into the floats and the sum is rounded. An adapter that was trained on integers
(QLoRA) loses by that: quantise without it, and give it to the programs that run what was written.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

import phi3_jax
from phi3_jax.checkpoint import Layout, require_tokenizer
from phi3_jax.checkpoint.atomic_write import reserved
from phi3_jax.command_line.model_flags import ADAPTER, CHECKPOINT, QUANTIZE
from phi3_jax.command_line.program import run_program
from phi3_jax.command_line.progress import progress_bar
from phi3_jax.kernels.linear.packed import pack
from phi3_jax.progress import OnProgress
from phi3_jax.quantization import calibrate
from phi3_jax.regular_file import read_text

_CALIBRATION = flags.DEFINE_string(
    "calibration",
    None,
    "A text like those that the model will see, for which weights are then rounded with least harm.",
)
_CALIBRATION_TOKENS = flags.DEFINE_integer("calibration_tokens", 16384, "How many of its tokens to use.", lower_bound=1)
_LAYOUT = flags.DEFINE_enum(
    "layout", "rows", ["rows", "packed"], "packed: in the order of the CPU kernels, which is mapped at the next start."
)
_OUTPUT = flags.DEFINE_string("output", None, "The folder to write, which must not exist yet.", required=True)
_WINDOW = 512  # tokens of a row of the calibration


def main() -> int:
    """Loads, quantises and writes."""
    with reserved(Path(_OUTPUT.value)):  # before the hours that this may take
        return _quantize()


def _quantize() -> int:
    layout: Layout = "packed" if _LAYOUT.value == "packed" else "rows"
    with progress_bar("quantising") as on_progress:
        checkpoint = (
            _calibrated(read_text(_CALIBRATION.value), on_progress)
            if _CALIBRATION.value
            else phi3_jax.load(
                CHECKPOINT.value,
                "bfloat16",
                quantize=_policy(),
                layout=layout,
                adapter=ADAPTER.value,
                merge_adapter=True,
                on_progress=on_progress,
            )
        )
    phi3_jax.save(checkpoint, _OUTPUT.value)
    leaves = jax.tree.leaves(checkpoint.params)
    print(f"{_OUTPUT.value}: {sum(leaf.nbytes for leaf in leaves) / 1e9:.2f} GB", file=sys.stderr)
    if ADAPTER.value:
        print(
            "note: the adapter was merged into the floats, and the sum rounded; if it was trained on integers "
            "(quantize=), quantise without it, and give it to the programs that run the result",
            file=sys.stderr,
        )
    return 0


def _policy() -> str:
    return QUANTIZE.value or "int4"


def _calibrated(text: str, on_progress: OnProgress) -> phi3_jax.Checkpoint:
    checkpoint = phi3_jax.load(CHECKPOINT.value, "float32", layout="rows", adapter=ADAPTER.value)
    ids = require_tokenizer(checkpoint).encode(text)[: _CALIBRATION_TOKENS.value]
    window = min(_WINDOW, len(ids))
    if window < 2:
        raise ValueError(f"{_CALIBRATION.value}: the text is too short to calibrate with")
    tokens = np.asarray(ids[: len(ids) // window * window], np.int32).reshape(-1, window)
    params = calibrate(checkpoint.config, checkpoint.params, jnp.asarray(tokens), _policy(), on_progress)
    if _LAYOUT.value == "packed":
        params = pack(params)
    return dataclasses.replace(checkpoint, params=params)


def run() -> None:
    """The console script."""
    topics = {"What to write": [CHECKPOINT, ADAPTER, QUANTIZE, _CALIBRATION, _CALIBRATION_TOKENS, _LAYOUT, _OUTPUT]}
    run_program("phi3-quantize", main, topics)


if __name__ == "__main__":
    run()

"""phi3-random-checkpoint: writes a checkpoint of a published size with random weights, to measure and test with.

phi3-random-checkpoint --preset phi-3-mini-4k --output random-mini --dtype bfloat16
"""

from __future__ import annotations

import dataclasses

from absl import flags

import phi3_jax
from phi3_jax.command_line.program import run_program

_PRESET = flags.DEFINE_enum("preset", "phi-3-mini-4k", sorted(phi3_jax.PRESETS), "Which size.")
_OUTPUT = flags.DEFINE_string("output", None, "The folder to write, which must not exist yet.", required=True)
_DTYPE = flags.DEFINE_enum("dtype", "bfloat16", ["float32", "bfloat16", "float16"], "What the weights are stored as.")
_LAYERS = flags.DEFINE_integer("layers", None, "Fewer layers than the preset has.", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "Of the random weights.")


def main() -> int:
    """Makes the weights and writes them."""
    config = phi3_jax.PRESETS[_PRESET.value]
    if _LAYERS.value is not None:
        config = dataclasses.replace(config, num_hidden_layers=_LAYERS.value)
    params = phi3_jax.random_params(config, _DTYPE.value, _SEED.value)
    phi3_jax.save(phi3_jax.Checkpoint(config, params, None, phi3_jax.GenerationSettings()), _OUTPUT.value)
    return 0


def run() -> None:
    """The console script."""
    run_program("phi3-random-checkpoint", main, {"What to write": [_PRESET, _OUTPUT, _DTYPE, _LAYERS, _SEED]})


if __name__ == "__main__":
    run()

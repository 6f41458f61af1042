"""Training on eight devices: XLA makes them of the CPU in a process of their own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

_SCRIPT = """
import json, sys
import jax, numpy as np
import phi3_jax
from phi3_jax.train.data.batch import Batch
from phi3_jax.train.settings import Settings
from phi3_jax.train.step import make_eval_step, make_train_step, start
sys.path.insert(0, sys.argv[1])
from training_batches import rows, stack

jax.config.update("jax_disable_most_optimizations", True)
config = phi3_jax.Phi3Config(
    vocab_size=96, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=6,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=64, rope_theta=1e4, initializer_range=0.3,
)
params = phi3_jax.random_params(config)
lengths = [[9, 4], [3], [17], [20], [2], [5, 5, 5], [8], [11]]
batch = stack(rows(lengths, 20, 96, 1), rows(lengths[::-1], 20, 96, 2))
for changes in json.loads(sys.argv[2]):
    s = Settings(batch_size=8, accumulation=2, warmup_steps=0, lr=1e-2, lora_rank=8, loss_chunk=48, **changes)
    state, frozen = start(s, config, params)
    step, losses = make_train_step(s, config), []
    for _ in range(3):
        state, metrics = step(state, frozen, batch)
        losses.append([float(metrics[name]) for name in ("loss", "grad_norm")])
    sums = make_eval_step(s, config)(state.trainable, frozen, jax.tree.map(lambda leaf: leaf[0], batch))
    leaves = jax.tree.leaves((state.trainable, state.opt_state, frozen))
    print(json.dumps({
        "devices": jax.device_count(),
        "curve": losses,
        "evaluation": float(sums["loss"]),
        "norm": [float(np.linalg.norm(leaf)) for leaf in jax.tree.leaves(state.trainable)],
        "bytes": sum(leaf.nbytes for leaf in leaves),
        "bytes_here": sum(leaf.addressable_shards[0].data.nbytes for leaf in leaves),
    }))
"""
CASES = [
    {"train": "all"},
    {"train": "all", "shard_weights": True},
    {"train": "all", "shard_weights": True, "dtype": "bfloat16"},  # its rounding draws the same numbers
    {"train": "lora", "shard_weights": True, "lora_dropout": 0.2, "neftune_alpha": 5.0, "optimizer": "adamw8bit"},
]


@pytest.fixture(scope="module")
def results():
    command = [sys.executable, "-c", _SCRIPT, str(Path(__file__).parents[1] / "helpers"), json.dumps(CASES)]
    runs = [subprocess.Popen(command, env=devices(count), stdout=subprocess.PIPE, text=True) for count in (8, 1)]
    said = [run.communicate()[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0]
    return [[json.loads(line) for line in lines.splitlines()] for lines in said]


def devices(count: int) -> dict[str, str]:
    flags = f"--xla_force_host_platform_device_count={count}"
    return {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(CASES)))
def test_eight_devices_equal_one(results, number):
    many, one = (result[number] for result in results)
    assert (many["devices"], one["devices"]) == (8, 1)
    for name in ("curve", "evaluation", "norm"):
        np.testing.assert_allclose(many[name], one[name], rtol=2e-5, atol=1e-6)


@pytest.mark.slow
def test_spread_weights_and_their_optimizer_state_take_an_eighth_on_each_device(results):
    whole, spread, _, adapter = results[0]
    assert whole["bytes_here"] == whole["bytes"]
    assert spread["bytes_here"] < 1.05 * spread["bytes"] / 8
    assert adapter["bytes_here"] < 0.5 * adapter["bytes"]


def test_rows_must_be_shared_out_evenly():
    script = (
        "from phi3_jax.train import sharding\n"
        "try: sharding.of_rows(sharding.make_mesh(), 6)\n"
        "except ValueError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", script], env=devices(4), check=True, capture_output=True, text=True)
    assert done.stdout == "batch_size=6: must be a multiple of the number of devices, 4\n"

"""What looking inside costs on the CPU: reading all hidden states, and a change at every layer and position.

    python benchmarks/inspection.py
    pip install transformer-lens && python benchmarks/inspection.py    # beside it, on the same weights

Rounds are interleaved, and what is compared is the median of each. Single runs of a loop are timed by a sample, of
which a whole loop takes a multiple. Limits: reading costs at most 1.3 of the plain run, and a sweep takes at most a
fifth of the loop.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import phi3_jax
from phi3_jax import inspection
from phi3_jax.inspection.running import compiled

LONG, SHORT, SAMPLE = 512, 20, 12
CAPTURE_LIMIT, SWEEP_LIMIT = 1.3, 5.0
RIGHT, WRONG = 7042, 8041  # any two ids
Work = dict[str, tuple[Callable[[], Any], int]]  # name -> (what is timed, how many of it make the whole)


def main() -> None:
    """Prints a table, and whether the limits are kept."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layout", default="rows", choices=["rows", "packed"])
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    prompt, tokens, other = (rng.integers(100, 40_000, (1, size)) for size in (LONG, SHORT, SHORT))
    checkpoint = phi3_jax.load("demo", "float32", layout=options.layout)
    works = ours(checkpoint, prompt, tokens, other)
    if importlib.util.find_spec("transformer_lens") is not None:
        works |= theirs(checkpoint, prompt, tokens, other)
    seconds: dict[str, list[float]] = {name: [] for name in works}
    busy: dict[str, list[float]] = {name: [] for name in works}  # of all cores: other programs hardly change it
    for each, _ in works.values():
        each()  # compiles
    for _ in range(options.rounds):
        for name, (each, times) in works.items():
            begin, begin_busy = time.perf_counter(), time.process_time()
            each()
            seconds[name].append((time.perf_counter() - begin) * times)
            busy[name].append((time.process_time() - begin_busy) * times)
    found = {name: statistics.median(each) for name, each in seconds.items()}
    print("| what | seconds, median | least | CPU seconds, median |\n|---|---|---|---|")
    for name, each in seconds.items():
        print(f"| {name} | {found[name]:.2f} | {min(each):.2f} | {statistics.median(busy[name]):.2f} |")
    reading, speed = found["all hidden states"] / found["plain run"], found["loop"] / found["sweep"]
    print(f"\nreading all hidden states: {reading:.2f} of the plain run (limit {CAPTURE_LIMIT})")
    print(f"the sweep: {speed:.1f} times as fast as the loop (limit {SWEEP_LIMIT})")
    for name in ("plain run", "all hidden states", "sweep"):
        if f"TransformerLens, {name}" in found:
            print(f"TransformerLens, {name}: {found[f'TransformerLens, {name}'] / found[name]:.1f} times our time")
    if reading > CAPTURE_LIMIT or speed < SWEEP_LIMIT:
        raise SystemExit("a limit is not kept")


def ours(checkpoint: phi3_jax.Checkpoint, prompt: Any, tokens: Any, other: Any) -> Work:
    """A run of all logits, one that also reads all hidden states, single runs with a patch, and the sweep."""
    config, params = checkpoint.config, checkpoint.params
    metric = inspection.logit_difference(RIGHT, WRONG)
    plain = jax.jit(lambda params, tokens: phi3_jax.Phi3(config).apply({"params": params}, tokens))
    values = inspection.run(config, params, other, ("resid_pre",))["resid_pre"]
    patch = inspection.replace(config, "resid_pre", values)

    @jax.jit
    def single(params: Any, patch: inspection.Edit, layer: Any, position: Any) -> jax.Array:
        here = dataclasses.replace(patch, value=jax.lax.dynamic_slice_in_dim(patch.value, position, 1, axis=2))
        edits = (inspection.moved(config, here, layer, position),)
        hooks = inspection.Hooks(("logits",), positions=jnp.array([SHORT - 1]), edits=edits)
        return metric(compiled(config, params, jnp.asarray(tokens), None, None, hooks)[0]["logits"][:, 0])

    def loop() -> None:
        for layer, position in sample(config.num_hidden_layers):
            float(single(params, patch, jnp.int32(layer), jnp.int32(position)))

    def sweep() -> jax.Array:
        return jax.block_until_ready(inspection.patch_sweep(config, params, tokens, other, metric))

    swept = sweep()
    for layer, position in sample(config.num_hidden_layers)[:9]:
        value = single(params, patch, jnp.int32(layer), jnp.int32(position))
        np.testing.assert_allclose(swept[layer, position], value, atol=1e-2 if has_integers(params) else 1e-3)
    return {
        "plain run": (lambda: jax.block_until_ready(plain(params, jnp.asarray(prompt))), 1),
        "all hidden states": (
            lambda: jax.block_until_ready(inspection.run(config, params, prompt, ("embed", "resid_post", "logits"))),
            1,
        ),
        "loop": (loop, config.num_hidden_layers * SHORT // SAMPLE),
        "sweep": (sweep, 1),
    }


def theirs(checkpoint: phi3_jax.Checkpoint, prompt: Any, tokens: Any, other: Any) -> Work:
    """The same by TransformerLens, whose sweep is a loop; its logits have to be ours."""
    import pandas
    import torch
    import transformers
    from transformer_lens import patching
    from transformer_lens.model_bridge import TransformerBridge

    with tempfile.TemporaryDirectory() as temporary:
        folder = f"{temporary}/llama"
        floats = phi3_jax.load("demo", "float32", layout="rows")
        phi3_jax.save(floats, folder, architecture="llama")
        hf = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        model: Any = TransformerBridge.boot_transformers(folder, hf_model=hf, tokenizer=tokenizer, device="cpu")
    model.eval()
    long, short, others = (torch.as_tensor(each) for each in (prompt, tokens, other))
    hidden = ["hook_embed"] + [
        f"blocks.{layer}.hook_resid_post" for layer in range(checkpoint.config.num_hidden_layers)
    ]
    rows = pandas.DataFrame(sample(checkpoint.config.num_hidden_layers), columns=["layer", "pos"])
    with torch.no_grad():
        logits = model(long).numpy()
        expected = phi3_jax.Phi3(floats.config).apply({"params": floats.params}, jnp.asarray(prompt))
        print("TransformerLens: largest difference of logits", float(np.abs(logits - np.asarray(expected)).max()))
        _, cache = model.run_with_cache(others)

    def without(run: Callable[[], Any]) -> Callable[[], Any]:
        return torch.no_grad()(run)

    def sweep() -> Any:
        def metric(logits: Any) -> Any:
            return logits[0, -1, RIGHT] - logits[0, -1, WRONG]

        return patching.get_act_patch_resid_pre(model, short, cache, metric, index_axis_names=None, index_df=rows)

    return {
        "TransformerLens, plain run": (without(lambda: model(long)), 1),
        "TransformerLens, all hidden states": (
            without(lambda: model.run_with_cache(long, names_filter=lambda name: name in hidden)),
            1,
        ),
        "TransformerLens, sweep": (without(sweep), checkpoint.config.num_hidden_layers * SHORT // SAMPLE),
    }


def sample(layers: int) -> list[tuple[int, int]]:
    """Pairs of a layer and a position, evenly over all of them."""
    every = layers * SHORT // SAMPLE
    return [divmod(every * i + i % every, SHORT) for i in range(SAMPLE)]


def has_integers(params: Any) -> bool:
    """Whether weights are not float32, so that rounding differs a little with the number of rows."""
    return any(leaf.dtype != jnp.float32 for leaf in jax.tree.leaves(params))


if __name__ == "__main__":
    main()

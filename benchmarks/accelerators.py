"""What XLA's compilers tell of accelerators that are not here: expected time per token, and memory.

    python benchmarks/accelerators.py time h100 a100 l4 v5e
    python benchmarks/accelerators.py memory h100

It takes the environment of `make test-accelerators`. Nothing is executed: all figures are computed. The time is the sum
over the kernels of a token, each of which takes as long as its bytes need at the maker's bandwidth, but no less than
starting it takes; the limit is the time of weights and used cache alone. Programs of 2 and of 4 layers are compiled,
and what is told of 32 is a line through both.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[1] / "tests" / "accelerators"
# Bytes per second, from the makers' data sheets; seconds to start a kernel, assumed: on a TPU one program runs through.
BANDWIDTH = {"h100": 3.35e12, "a100": 2.04e12, "l4": 0.3e12, "v5e": 0.819e12, "v6e": 1.64e12}
START = {"h100": 2e-6, "a100": 2e-6, "l4": 2e-6, "v5e": 0.0, "v6e": 0.0}
LAYERS = 32  # of Phi-3-mini
WEIGHTS, BATCHES = ("bfloat16", "int8", "int4"), (1, 8, 64)
COLUMNS = ("weights", "batch", "needed, GB", "moved, GB", "kernels", "a layer", "limit, ms", "bytes, ms")
COLUMNS += ("expected, ms", "of limit", "tokens/s")
MODELS = {
    "Phi-3-mini-4k": "phi-3-mini-4k",
    "Phi-3-mini-128k": "phi-3-mini-128k",
    "Phi-3-medium-4k": "phi-3-medium-4k",
    "Phi-4": "phi-4",
    "Phi-4-mini": "phi-4-mini",
}


def compiled(target: str, cases: list[str]) -> list[dict[str, Any]]:
    """What compile_target.py says of each case."""
    command = [sys.executable, str(FOLDER / "compile_target.py"), target, *cases]
    run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return [json.loads(line) for line in run.stdout.splitlines()]


def times(target: str) -> None:
    """Prints the table of expected times."""
    keys = [(weights, batch) for weights in WEIGHTS for batch in BATCHES]
    cases = [f"layers={n},weights={w},batch={b},programs=decode" for w, b in keys for n in (2, 4)]
    found = compiled(target, cases)
    print(
        f"\n{target}: {BANDWIDTH[target] / 1e12:.3g} TB/s, {START[target] * 1e6:.0f} us to start a kernel; computed\n"
    )
    print("| " + " | ".join(COLUMNS) + " |\n|" + "---|" * len(COLUMNS))
    for (weights, batch), few, more in zip(keys, found[::2], found[1::2], strict=True):
        if "error" in few or "error" in more:
            print(f"| {weights} | {batch} | {(few.get('error') or more['error'])[:80]} |")
            continue
        two, four = (_figures(target, each["sizes"]["decode"]) for each in (few, more))
        whole = {name: two[name] + (four[name] - two[name]) * (LAYERS - 2) / 2 for name in two}
        limit, moved = whole["needed"] / BANDWIDTH[target], whole["moved"] / BANDWIDTH[target]
        cells = [
            weights,
            str(batch),
            f"{whole['needed'] / 1e9:.2f}",
            f"{whole['moved'] / 1e9:.2f}",
            f"{whole['kernels']:.0f}",
            f"{(four['kernels'] - two['kernels']) / 2:.0f}",
            f"{1e3 * limit:.2f}",
            f"{1e3 * moved:.2f}",
            f"{1e3 * whole['seconds']:.2f}",
            f"{limit / whole['seconds']:.0%}",
            f"{batch / whole['seconds']:.0f}",
        ]
        print("| " + " | ".join(cells) + " |", flush=True)


def _figures(target: str, facts: dict[str, Any]) -> dict[str, float]:
    seconds = sum(max(each / BANDWIDTH[target], START[target]) for each in facts["kernels"])
    moved, kernels = facts["read"] + facts["written"], len(facts["kernels"])
    return {"needed": facts["needed"], "moved": moved, "kernels": kernels, "seconds": seconds}


def memory(target: str) -> None:
    """Prints the table of memory: weights and cache by arithmetic, temporaries of the prefill from two layers."""
    cases = [
        f"preset={preset},layers=2,weights={weights},prompt=3900,answer=100,programs=read"
        for preset in MODELS.values()
        for weights in WEIGHTS
    ]
    whole = "weights=int4,prompt=3900,answer=100,programs=read+decode"
    *found, checked = compiled(target, [*cases, whole])
    print(f"\n{target}: GB for one row of 4096 tokens: weights + cache + temporaries; computed\n")
    print("| model | " + " | ".join(WEIGHTS) + " |\n|" + "---|" * (1 + len(WEIGHTS)))
    reports = iter(found)
    for model in MODELS:
        cells = []
        for _ in WEIGHTS:
            parts = _memory(next(reports))
            cells.append(f"{sum(parts):.1f} ({' + '.join(f'{part:.1f}' for part in parts)})")
        print(f"| {model} | " + " | ".join(cells) + " |", flush=True)
    sizes = checked["sizes"].values()
    by_compiler = max(s["arguments"] + s["outputs"] - s["aliased"] + s["temporaries"] for s in sizes) / 1e9
    print(f"\nPhi-3-mini-4k in int4 with all layers, by the compiler: {by_compiler:.2f}", end="")
    print(f"; as in the table: {sum(_memory(checked)):.2f}")


def _memory(report: dict[str, Any]) -> tuple[float, float, float]:
    """Weights, cache and temporaries, in GB, of the model with all of its layers."""
    sys.path.insert(0, str(FOLDER))
    import compile_target
    import contract

    import phi3_jax

    case = report["case"]
    layers = phi3_jax.PRESETS[case["preset"]].num_hidden_layers
    params = compile_target.params_like(compile_target.Case(**(case | {"layers": 0})))
    weights = contract.size(params)
    cache = report["cache"] * layers / (case["layers"] or layers)
    temporaries = max(size["temporaries"] for size in report["sizes"].values())
    return weights / 1e9, cache / 1e9, temporaries / 1e9


def main() -> None:
    """The program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["time", "memory"])
    parser.add_argument("targets", nargs="+", choices=list(BANDWIDTH))
    arguments = parser.parse_args()
    for target in arguments.targets:
        (times if arguments.what == "time" else memory)(target)


if __name__ == "__main__":
    main()

"""How fast a checkpoint loads, and how much memory that takes, beside what the machine can do.

    phi3-random-checkpoint --preset phi-3-mini-4k --output random-mini
    python benchmarks/loading.py random-mini

Prints, in each round, the read speed of the files (cold: page cache dropped; warm: from the page cache), how fast fresh
memory of the model's size can be filled, the speed of `phi3_jax.load`, and the peak of the process's memory over the
model's size; at the end one forward pass. A load reads every byte once and writes it once into fresh memory, so the
slower of the two speeds limits it. (On a virtual machine the first touch of memory can be far slower than later ones:
that is why it is measured beside.)
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

_BLOCK = 1 << 24


def read_all(files: list[Path]) -> float:
    """Seconds to read the files once through one buffer."""
    buffer = bytearray(_BLOCK)
    begin = time.perf_counter()
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.perf_counter() - begin


def drop_from_cache(files: list[Path]) -> None:
    """Asks the kernel to forget the files' pages."""
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def fill_memory(size: int) -> None:
    """Child process: prints how fast fresh memory can be filled."""
    import numpy as np

    begin = time.perf_counter()
    np.empty(size, np.uint8).fill(1)
    print(f"fill {size / (time.perf_counter() - begin) / 1e9:.2f} GB/s, ", end="", flush=True)


def load_once(folder: str, forward: bool) -> None:
    """Child process: loads, prints the seconds and peak memory, and runs one forward pass of 8 tokens if asked."""
    import jax
    import jax.numpy as jnp

    import phi3_jax

    jax.devices()  # starting the backend is not loading
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    begin = time.perf_counter()
    checkpoint = phi3_jax.load(folder, "bfloat16", layout="rows")
    seconds = time.perf_counter() - begin
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    model = sum(leaf.nbytes for leaf in jax.tree.leaves(checkpoint.params))
    print(
        f"load {model / seconds / 1e9:.2f} GB/s ({seconds:.2f} s), peak / model = {(peak - before) / model:.3f}", end=""
    )
    print(f" ({peak / 1e9:.2f} GB whole process, model {model / 1e9:.2f} GB)")
    if forward:
        begin = time.perf_counter()
        tokens = jnp.arange(8)[None]
        logits = jax.jit(phi3_jax.Phi3(checkpoint.config, walk="index").apply)({"params": checkpoint.params}, tokens)
        finite = bool(jnp.isfinite(logits).all())
        print(f"forward of 8 tokens: {time.perf_counter() - begin:.1f} s with compilation, logits finite: {finite}")


def main() -> None:
    """Measures; see the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--child", choices=["fill", "load", "forward"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    files = sorted(Path(args.folder).glob("*.safetensors"))
    size = sum(path.stat().st_size for path in files)
    if args.child == "fill":
        fill_memory(size)
        return
    if args.child:
        load_once(args.folder, args.child == "forward")
        return
    print(f"{args.folder}: {size / 1e9:.2f} GB in {len(files)} files")
    child = [sys.executable, __file__, args.folder, "--child"]
    for number in range(args.rounds):
        for state in ("cold", "warm"):
            if state == "cold":
                drop_from_cache(files)
            print(f"round {number} {state}: read {size / read_all(files) / 1e9:.2f} GB/s, ", end="", flush=True)
            subprocess.run([*child, "fill"], check=True)
            if state == "cold":
                drop_from_cache(files)
            last = number == args.rounds - 1 and state == "warm"
            subprocess.run([*child, "forward" if last else "load"], check=True)


if __name__ == "__main__":
    main()

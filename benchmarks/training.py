"""How fast a step of training is on the demo model, beside torch with transformers and PEFT, and what memory it takes.

    python benchmarks/training.py --peer_python .venv-parity/bin/python
    python benchmarks/training.py --memory

Each side runs in a process of its own, and they take turns: a round is three steps of each, of which the first is not
counted, because on a virtual machine memory that another process had is slow at first. Both are given the same weights
and tokens, and their losses must agree. The other Python needs torch, transformers and PEFT. glibc is set to use large
pages: without them, both sides spend much of a step on allocating memory in small pages, ours more than the other.

A step computes 6 operations for each weight and token, or 4 where the weights are frozen, and attention: at this
machine's rate for float32 (phi3_jax/kernels/machine.py) that takes the time of the first limit. The second limit is
the time to read the numbers that the optimizer reads.

`--memory` prints the peak memory of our process, and the memory that the compiler gives a step beside its arguments, by
what the backward pass computes again (`remat`) and by how many tokens' logits are held (`loss_chunk`).
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

import phi3_jax
from phi3_jax.infer.benchmark.peer_process import serve
from phi3_jax.infer.benchmark.processes import Process
from phi3_jax.infer.benchmark.roofline import parameters
from phi3_jax.kernels import why_unavailable
from phi3_jax.kernels.machine import Machine, threads
from phi3_jax.kernels.native.build import library
from phi3_jax.train.data import Batch
from phi3_jax.train.settings import Settings
from phi3_jax.train.step import make_train_step, start

RANK, ALPHA, LR = 16, 32.0, 1e-4
LARGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
_MEMORY_CASES = [("none", 0), ("none", 512), ("dots", 0), ("dots", 512), ("full", 0), ("full", 512)]


class Ours:
    """Answers the requests of infer/benchmark/peer_process.py for phi3_jax."""

    def load(self, train: str, rows: list[list[int]], **changes: Any) -> dict[str, Any]:
        """Gets ready for steps on these rows and takes one, which compiles."""
        checkpoint = phi3_jax.load("demo")
        tokens = np.asarray(rows, np.int32)[None]
        self._batch = batch(tokens)
        settings = Settings(
            train=train,  # type: ignore[arg-type]
            batch_size=tokens.shape[1],
            sequence_length=tokens.shape[2],
            lora_rank=RANK,
            lora_alpha=ALPHA,
            lr=LR,
            schedule="constant",
            warmup_steps=0,
            **changes,
        )
        self._state, self._frozen = start(settings, checkpoint.config, checkpoint.params)
        lowered = make_train_step(settings, checkpoint.config).lower(self._state, self._frozen, self._batch)
        self._step = lowered.compile()
        memory = self._step.memory_analysis()
        return {"temporary_bytes": memory.temp_size_in_bytes, **self.measure()}

    def measure(self) -> dict[str, Any]:
        """A step."""
        begin = time.perf_counter()
        self._state, metrics = self._step(self._state, self._frozen, self._batch)
        loss = float(metrics["loss"])
        jax.block_until_ready(self._state)
        return {"seconds": time.perf_counter() - begin, "loss": loss}


def batch(tokens: np.ndarray) -> Batch:
    """Rows [A, B, T] of one text each, of which every token is learned."""
    weights = np.ones(tokens.shape, np.float32)
    weights[..., 0] = 0
    positions = np.broadcast_to(np.arange(tokens.shape[-1], dtype=np.int32), tokens.shape)
    return Batch(tokens, weights, positions, np.zeros_like(tokens))


def random_rows(count: int, length: int) -> list[list[int]]:
    """The same in every process."""
    return np.random.default_rng(0).integers(4, 49152, (count, length)).tolist()


def compare(peer_python: str, folder: str, train: str, shape: tuple[int, int], rounds: int, machine: Machine) -> None:
    """Prints one line of the table."""
    rows = random_rows(*shape)
    peer_script = str(Path(__file__).with_name("training_peer.py"))
    with (
        contextlib.closing(Process("phi3_jax", [sys.executable, __file__, "--serve"])) as ours,
        contextlib.closing(Process("torch", [peer_python, "-P", peer_script])) as peer,
    ):
        first = ours.ask("load", train=train, rows=rows, remat="dots")["loss"]
        arguments = {"train": train, "rows": rows, "rank": RANK, "alpha": ALPHA, "lr": LR, "threads": threads()}
        other = peer.ask("load", path=folder, **arguments)["loss"]
        if abs(first - other) > 1e-3:
            raise SystemExit(f"the losses differ: {first} and {other}")
        seconds: dict[str, list[float]] = {"ours": [], "peer": []}
        peer.ask("measure")  # its second step is slow, too
        for _ in range(rounds):
            for name, side in (("ours", ours), ("peer", peer)):
                time.sleep(0.3)  # threads of the other side may wait for work in a loop for a moment
                seconds[name] += [side.ask("measure")["seconds"] for _ in range(3)][1:]
    tokens = shape[0] * shape[1]
    columns = []
    for name in ("ours", "peer"):
        rates = sorted(tokens / s for s in seconds[name])
        columns.append(f"{tokens / statistics.median(seconds[name]):.0f} ({rates[0]:.0f}-{rates[-1]:.0f})")
    ratio = statistics.median(p / o for o, p in zip(seconds["ours"], seconds["peer"], strict=True))
    limits = " | ".join(f"{tokens / limit:.0f}" for limit in least_seconds(train, shape, machine))
    print(f"| {train} | {shape[0]} x {shape[1]} | {columns[0]} | {columns[1]} | {ratio:.2f} | {limits} |", flush=True)


def least_seconds(train: str, shape: tuple[int, int], machine: Machine) -> tuple[float, float]:
    """The two limits of a step of the demo model."""
    config = phi3_jax.load("demo").config
    layers, head = parameters(config)
    B, T = shape
    passes = 6 if train == "all" else 4
    attention = 6 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * T * T  # half are seen
    operations = B * (T * passes * (layers + head) + attention)
    read = 4 * (layers + head) * (4 if train == "all" else 1)  # weights; gradients and two moments
    return operations / machine.rates["float32"], read / machine.bandwidth()


def print_memory(shape: tuple[int, int], train: str) -> None:
    """The second table."""
    print("\n| what is trained | computed again | logits held | most memory | step's own |\n|---|---|---|---|---|")
    for remat, chunk in _MEMORY_CASES:
        with contextlib.closing(Process("phi3_jax", [sys.executable, __file__, "--serve"])) as ours:
            reply = ours.ask("load", train=train, rows=random_rows(*shape), remat=remat, loss_chunk=chunk)
            peak = ours.ask("memory")["peak_bytes"]
        held = f"{chunk} tokens" if chunk else f"all {shape[0] * shape[1]}"
        print(
            f"| {train} | {remat} | {held} | {peak / 1e9:.2f} GB | {reply['temporary_bytes'] / 1e9:.2f} GB |",
            flush=True,
        )


def main() -> None:
    """Prints the tables; see the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer_python", help="a Python with torch, transformers and peft")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--train", default="all,lora")
    parser.add_argument("--shapes", default="4x256,8x512", help="rows x tokens")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(Ours())
        return
    os.environ.update(LARGE_PAGES)  # of the processes that are started
    shapes = [tuple(map(int, text.split("x"))) for text in arguments.shapes.split(",")]
    kinds = arguments.train.split(",")
    if arguments.memory:
        for train in kinds:
            print_memory(shapes[-1], train)
    if arguments.peer_python:
        if reason := why_unavailable():
            raise SystemExit(f"the machine's rates cannot be measured: {reason}")
        machine = Machine(library())
        print("| trained | rows x tokens | tokens/s | torch | ratio | limit: arithmetic | limit: optimizer |")
        print("|---|---|---|---|---|---|---|")
        with tempfile.TemporaryDirectory() as folder:
            phi3_jax.save(phi3_jax.load("demo"), Path(folder) / "demo")
            for train in kinds:
                for shape in shapes:
                    compare(arguments.peer_python, f"{folder}/demo", train, shape, arguments.rounds, machine)


if __name__ == "__main__":
    main()

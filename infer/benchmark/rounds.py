"""Measures programs in turns (A B A B ...), so that changes of the machine's speed affect all of them alike.

A case is a piece of work: reading a prompt, or decoding after a context. Every side (processes.py) gets ready for it;
then each round measures the memory's bandwidth, and every side once.
"""

from __future__ import annotations

import dataclasses
import random
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol

from phi3_jax.config import Phi3Config
from phi3_jax.kernels.machine import Rate

from .roofline import decode_work, least_seconds, prefill_work

_SETTLE = 0.1  # seconds before each measurement, in which idle threads of the other sides stop spinning


class Asks(Protocol):
    """What answers requests: `processes.Process`."""

    def ask(self, do: str, **request: Any) -> dict[str, Any]:
        """Sends a request and waits for the reply."""


class Measures(Protocol):
    """What knows the machine's limits: `Machine` and `Published` of phi3_jax.kernels.machine."""

    @property
    def rates(self) -> dict[str, float]:
        """Operations per second of each kind of arithmetic."""

    def bandwidth(self) -> float:
        """Bytes per second."""


@dataclasses.dataclass(frozen=True)
class Case:
    """Reading a prompt of `context` tokens, or `new_tokens` decoding steps of `batch` rows after that many tokens."""

    kind: Literal["prefill", "decode"]
    context: int
    batch: int = 1
    new_tokens: int = 0

    @property
    def name(self) -> str:
        """The name to print."""
        if self.kind == "prefill":
            return f"prefill {self.context}"
        return f"decode at {self.context}" + (f", batch {self.batch}" if self.batch > 1 else "")

    @property
    def tokens(self) -> int:
        """How many tokens one measurement reads or writes."""
        return self.context if self.kind == "prefill" else self.batch * self.new_tokens

    def work_seconds(
        self, config: Phi3Config, side: Side, cache_bytes: float, bandwidth: float, rates: dict[str, float]
    ) -> float:
        """The least number of seconds that the side's work can take."""
        if self.kind == "prefill":
            work = prefill_work(config, self.context, side.weight_bytes)
        else:
            work = decode_work(config, self.context, self.batch, self.new_tokens, side.weight_bytes, cache_bytes)
        return least_seconds(work, bandwidth, rates, side.rate)


@dataclasses.dataclass(frozen=True)
class Side:
    """One of the programs.

    Attributes:
      name: with the form of its weights.
      process: answers the requests.
      weight_bytes: how many bytes of the weights a step reads.
      rate: the fastest kind of arithmetic that its matrix products could use.
      cache_bytes: bytes of one number in its cache, as far as is known before a case.
    """

    name: str
    process: Asks
    weight_bytes: float
    rate: Rate
    cache_bytes: float


@dataclasses.dataclass(frozen=True)
class Spread:
    """The median of some numbers, the least and the greatest."""

    median: float
    least: float
    greatest: float

    @classmethod
    def of(cls, numbers: Sequence[float]) -> Spread:
        """Raises ValueError if there are none."""
        if not numbers:
            raise ValueError("nothing was measured")
        return cls(statistics.median(numbers), min(numbers), max(numbers))


@dataclasses.dataclass(frozen=True)
class Result:
    """What one side did in one case.

    Attributes:
      seconds: of each round.
      tokens_per_second: over the rounds.
      of_limit: the least time that the work can take on this machine, divided by the time it took; None if the machine
        was not measured.
      ratio: the first side's tokens per second, divided by this side's, in the same round; None for the first side.
      compile_seconds: 0 where nothing is compiled.
      note: what the side says about how it works.
      token: the most likely token after a prompt; None for decoding.
    """

    case: Case
    side: str
    seconds: list[float]
    tokens_per_second: Spread
    of_limit: Spread | None
    ratio: Spread | None
    compile_seconds: float
    note: str
    token: int | None


def run_case(
    case: Case,
    sides: Sequence[Side],
    config: Phi3Config,
    rounds: int,
    machine: Measures | None = None,
    seed: int = 0,
    settle: float = _SETTLE,
    on_round: Callable[[int], None] | None = None,
) -> tuple[list[Result], list[float]]:
    """Measures all sides in turns -> (a result for each side, the bandwidth in each round).

    Args:
      sides: the ratios are those of the first one.
      seed: of the tokens, which are the same for all sides.
      on_round: called with the number of each round that is over.

    Raises:
      ValueError: a side cannot do the case.
    """
    draw = random.Random(seed)
    rows = [[draw.randrange(config.vocab_size) for _ in range(case.context)] for _ in range(case.batch)]
    ready: list[dict[str, Any]] = []
    measured: list[list[dict[str, Any]]] = []
    bandwidths: list[float] = []
    try:
        ready += [side.process.ask("prepare", kind=case.kind, rows=rows, new_tokens=case.new_tokens) for side in sides]
        for number in range(rounds):
            if machine is not None:
                bandwidths.append(machine.bandwidth())
            measured.append([_measure(side, settle) for side in sides])
            if on_round is not None:
                on_round(number)
    finally:
        for side in sides:
            side.process.ask("release")
    results = []
    for i, (side, about) in enumerate(zip(sides, ready, strict=True)):
        seconds = [one[i]["seconds"] for one in measured]
        of_limit = None
        if machine is not None:
            cache_bytes = about.get("cache_bytes", side.cache_bytes)
            of_limit = Spread.of(
                [
                    case.work_seconds(config, side, cache_bytes, bandwidth, machine.rates) / took
                    for bandwidth, took in zip(bandwidths, seconds, strict=True)
                ]
            )
        results.append(
            Result(
                case,
                side.name,
                seconds,
                Spread.of([case.tokens / took for took in seconds]),
                of_limit,
                Spread.of([one[i]["seconds"] / one[0]["seconds"] for one in measured]) if i else None,
                about.get("compile", 0.0),
                about.get("note", ""),
                measured[-1][i].get("token") if case.kind == "prefill" else None,
            )
        )
    return results, bandwidths


def memory_needed(case: Case, sides: Sequence[Side], config: Phi3Config) -> float:
    """Bytes of all sides' caches in a case."""
    numbers = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return sum(case.batch * (case.context + case.new_tokens) * numbers * side.cache_bytes for side in sides)


def available_memory() -> float:
    """Bytes that are available without swapping; infinite if the system does not say."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            return next(int(line.split()[1]) * 1024.0 for line in file if line.startswith("MemAvailable"))
    except FileNotFoundError:
        return float("inf")


def why_not(case: Case, sides: Sequence[Side], config: Phi3Config, device_free: float | None = None) -> str | None:
    """Why a case cannot be measured; None if it can.

    Args:
      device_free: bytes that are free on the accelerator that the first side computes on; None if it is the CPU.
    """
    if case.context + case.new_tokens >= config.max_position_embeddings:
        return f"the model's context is {config.max_position_embeddings} tokens"
    places = [(sides, available_memory())]
    if device_free is not None:
        places = [(sides[:1], device_free), (sides[1:], available_memory())]
    for there, free in places:
        if (needed := memory_needed(case, there, config)) > free:
            return f"the caches take {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free"
    return None


def _measure(side: Side, settle: float) -> dict[str, Any]:
    time.sleep(settle)
    return side.process.ask("measure")

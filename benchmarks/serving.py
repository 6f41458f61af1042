"""phi3-serve beside llama.cpp's server and OpenVINO GenAI: the same GGUF file, the same prompts, in turns.

    python benchmarks/serving.py --llama_server build/bin/llama-server --openvino venv/bin/python
    python benchmarks/serving.py --load                       200 requests at 16 at once, a tenth of them left; 3 rounds

Without a peer it measures ours alone. llama-server is built from the sources in llama-cpp-python's archive:
`cmake -B build -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON && cmake --build build --target llama-server`; --openvino is
a Python with `pip install openvino-genai`. All servers run at the same time, and only one has something to do.

Each round asks each server: for crowds of 1, 4, 8 and 16 at once; for four answers among which a prompt of 2,000 tokens
arrives; and for answers to questions behind 400 tokens that the server sees for the first, and for the second time.
Answers are greedy and streamed; ours are those of plain `generate`, or the program fails. Printed are medians over
rounds, the 99th percentile of the time to the first token over all requests, and what the memory's bandwidth and the
processors' arithmetic allow.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import math
import random
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

import phi3_jax
from phi3_jax.checkpoint import resolve
from phi3_jax.infer import Options, generate
from phi3_jax.infer.benchmark.roofline import decode_work
from phi3_jax.infer.engine.buckets import own_cache_dtype
from phi3_jax.kernels.machine import Machine
from phi3_jax.kernels.native.build import library

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tests" / "helpers" / "serving"))

from load import Load  # noqa: E402
from processes import Server, free_port, phi3_serve, running  # noqa: E402
from streaming import Reply, completion, crowd  # noqa: E402

AT_ONCE, MOST_AT_ONCE = (1, 4, 8, 16), 16
TOKENS, SHORT = 64, range(16, 129)  # of an answer; of a prompt
LONG, BESIDE, BEFORE = 2000, 4, 0.3  # tokens of the long prompt, answers that it meets, seconds that these are ahead
SHARED, QUESTION, TIMES = 400, 20, 5
CHUNK, ROOM = 128, 4096  # of phi3-serve on the CPU
OURS, LLAMA_CPP, OPENVINO = "phi3-serve", "llama.cpp", "OpenVINO"
LOAD_REQUESTS, LOAD_PROMPTS, LOAD_ANSWERS = 200, range(8, 513), range(16, 129)
TARGETS = ((LLAMA_CPP, 8, 1.5),)  # throughput beside whom, at how many at once, at least

Found = dict[str, list[float]]  # what was measured -> a value of each round, or of each request


class Prompts:
    """Pieces of our own documents, in the demo's token ids; each is another one."""

    def __init__(self, checkpoint: phi3_jax.Checkpoint):
        texts = [(HERE.parent / name).read_text() for name in ("README.md", "CONTRIBUTING.md", "BUILD_NOTES.md")]
        assert checkpoint.tokenizer is not None
        self._ids = checkpoint.tokenizer.encode("".join(texts), add_eos=False)

    def __call__(self, rng: random.Random, length: int) -> list[int]:
        """A piece of this many tokens."""
        begin = rng.randrange(len(self._ids) - length)
        return self._ids[begin : begin + length]


def main() -> None:
    """Prints tables; the exit code is 1 if an answer is wrong or a limit is not kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--llama_server", help="llama.cpp's server")
    parser.add_argument("--openvino", help="a Python with openvino-genai")
    parser.add_argument("--load", action="store_true", help="only a load, of phi3-serve")
    options = parser.parse_args()
    checkpoint = phi3_jax.load("demo", quantize="stored")
    prompts = Prompts(checkpoint)
    if options.load:
        load(checkpoint, prompts, options.rounds)
        return
    machine, found, bandwidths = Machine(library()), dict[str, Found](), list[float]()
    with servers(options) as sides:
        for name, server in sides.items():
            print(f"{name}: ready", file=sys.stderr, flush=True)
            asyncio.run(crowd(server.url, requests(prompts, "first", MOST_AT_ONCE, MOST_AT_ONCE), MOST_AT_ONCE))
            found[name] = {}
        for round_number in range(options.rounds):
            bandwidths.append(machine.bandwidth())
            for name, server in sides.items():
                replies = measure(server, prompts, round_number, found[name])
                if name == OURS and round_number == 0:
                    ours = replies
                print(f"round {round_number + 1}: {name}", file=sys.stderr, flush=True)
    print_table(found, limits(checkpoint, machine, statistics.median(bandwidths)))
    wrong = [text for request, reply in ours for text in [differs(checkpoint, request, reply)] if text]
    print(
        f"\nour answers that are those of plain generation: {len(ours) - len(wrong)} of {len(ours)}", *wrong, sep="\n"
    )
    missed = list(missed_limits(found))
    print(*missed, sep="\n")
    sys.exit(bool(wrong or missed))


@contextlib.contextmanager
def servers(options: argparse.Namespace) -> Any:
    """The servers that were asked for, ready, by name; all of them with 16 slots."""
    file = str(resolve("demo"))
    with contextlib.ExitStack() as stack:
        arguments = ["--checkpoint", "demo", "--quantize", "stored", "--slots", str(MOST_AT_ONCE)]
        sides: dict[str, Server] = {OURS: stack.enter_context(phi3_serve(*arguments))}
        if options.llama_server:
            port, room = free_port(), MOST_AT_ONCE * (LONG + 560)
            command = [options.llama_server, "-m", file, "--port", str(port), "-np", str(MOST_AT_ONCE), "-c", str(room)]
            sides[LLAMA_CPP] = stack.enter_context(running(command, port, "/health"))
        if options.openvino:
            port = free_port()
            command = [options.openvino, str(HERE / "serving_peer.py"), file, str(port), "1"]
            sides[OPENVINO] = stack.enter_context(running(command, port, "/"))
        yield sides


def requests(prompts: Prompts, seed: object, at_once: int, count: int) -> list[dict[str, Any]]:
    """Of a crowd; every server gets the same."""
    rng = random.Random(f"{seed} {at_once}")
    return [{"prompt": prompts(rng, rng.choice(SHORT)), "max_tokens": TOKENS} for _ in range(count)]


def measure(server: Server, prompts: Prompts, seed: int, found: Found) -> list[tuple[dict[str, Any], Reply]]:
    """One round of one server, whose values go to `found` -> the crowds' requests with their replies."""
    done = []
    for at_once in AT_ONCE:
        asked = requests(prompts, seed, at_once, max(4, 2 * at_once))
        replies = asyncio.run(crowd(server.url, asked, at_once))
        check(replies)
        seconds = max(reply.end for reply in replies) - min(reply.begin for reply in replies)
        note(found, f"tokens/s at {at_once}", sum(reply.tokens for reply in replies) / seconds)
        note(found, f"first token at {at_once}", *(reply.first for reply in replies))
        gaps = [(reply.end - reply.times[0]) / (reply.tokens - 1) for reply in replies if reply.tokens > 1]
        note(found, f"each token at {at_once}", statistics.median(gaps))
        done += zip(asked, replies, strict=True)
    rng = random.Random(f"long {seed}")
    for name, length in (("alone", 0), ("beside a long prompt", LONG)):
        beside = [{"prompt": prompts(rng, 32), "max_tokens": 2 * TOKENS} for _ in range(BESIDE)]
        others, long = asyncio.run(meeting(server.url, beside, prompts(rng, length)))
        pauses = [after - before for each in others for before, after in zip(each.times, each.times[1:], strict=False)]
        note(found, f"longest pause {name}", max(pauses))
        if long is not None:
            note(found, "first token of the long prompt", long.first)
    for _ in range(TIMES):
        shared = prompts(rng, SHARED)
        for name in ("first", "second"):
            asked = [{"prompt": [*shared, *prompts(rng, QUESTION)], "max_tokens": 4}]
            replies = asyncio.run(crowd(server.url, asked, 1))
            check(replies)
            note(found, f"shared prompt, {name} time", replies[0].first)
    return done


async def meeting(
    url: str, beside: Sequence[dict[str, Any]], prompt: Sequence[int]
) -> tuple[list[Reply], Reply | None]:
    """Answers while a long prompt arrives, if there is one."""
    others = [asyncio.create_task(completion(url, each)) for each in beside]
    long = None
    if prompt:
        await asyncio.sleep(BEFORE)
        long = await completion(url, {"prompt": list(prompt), "max_tokens": 8})
    replies = [await each for each in others]
    check([*replies, *([long] if long else [])])
    return replies, long


def check(replies: Sequence[Reply]) -> None:
    """Raises RuntimeError if one is not whole."""
    for reply in replies:
        if reply.status != 200 or not reply.complete or not reply.times:
            raise RuntimeError(f"status {reply.status}, whole: {reply.complete}: {reply.body[:300]!r}")


def note(found: Found, name: str, *values: float) -> None:
    """Adds values."""
    found.setdefault(name, []).extend(values)


def limits(checkpoint: phi3_jax.Checkpoint, machine: Machine, bandwidth: float) -> dict[str, tuple[float, float]]:
    """Tokens a second that the bandwidth, and the arithmetic, allow at most; the prompts not counted."""
    weight_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(checkpoint.params))
    found = {}
    for at_once in AT_ONCE:
        context = (SHORT.start + SHORT.stop + TOKENS) // 2
        cache_bytes = float(own_cache_dtype(checkpoint).itemsize)
        work = decode_work(checkpoint.config, context, at_once, 1, weight_bytes, cache_bytes)
        rate, floats = max(machine.rates["int8"], machine.rates["float32"]), machine.rates["float32"]
        seconds = work.bytes / bandwidth, work.linear / rate + work.attention / floats
        found[f"tokens/s at {at_once}"] = (at_once / seconds[0], at_once / seconds[1])
    return found


@dataclasses.dataclass(frozen=True)
class Line:
    """One of the table: what is measured, and how it is made of its values."""

    name: str
    percent: int = 50
    is_speed: bool = False

    def value(self, found: Found) -> float:
        """The median, or the percentile."""
        ordered = sorted(found[self.name])
        if self.percent == 50:
            return statistics.median(ordered)
        return ordered[min(len(ordered) - 1, math.ceil(self.percent / 100 * len(ordered)) - 1)]

    def ratio(self, ours: Found, theirs: Found) -> float:
        """How many times as fast ours is."""
        return self.value(ours) / self.value(theirs) if self.is_speed else self.value(theirs) / self.value(ours)


LINES = [
    *(Line(f"tokens/s at {at_once}", is_speed=True) for at_once in AT_ONCE),
    *(Line(f"first token at {at_once}", percent) for at_once in AT_ONCE for percent in (50, 99)),
    *(Line(f"each token at {at_once}") for at_once in AT_ONCE),
    Line("longest pause alone"),
    Line("longest pause beside a long prompt"),
    Line("first token of the long prompt"),
    Line("shared prompt, first time"),
    Line("shared prompt, second time"),
]


def print_table(found: dict[str, Found], limits: dict[str, tuple[float, float]]) -> None:
    """Values of all sides, and how many times as fast ours is."""
    peers = [name for name in found if name != OURS]
    heads = ["", OURS, *(head for name in peers for head in (name, "ratio")), "limit by bytes", "by operations"]
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    for line in LINES:
        name = line.name if line.percent == 50 else f"{line.name}, {line.percent}%"
        cells = [name if line.is_speed else f"{name}, ms", shown(line, found[OURS])]
        for peer in peers:
            cells += [shown(line, found[peer]), f"{line.ratio(found[OURS], found[peer]):.2f}"]
        cells += [f"{limit:.0f}" for limit in limits.get(line.name, ())] or ["", ""]
        print(f"| {' | '.join(cells)} |")
    value = {line.name: line.value(found[OURS]) for line in LINES if line.percent == 50}
    print(f"\n8 at once: {value['tokens/s at 8'] / value['tokens/s at 1']:.2f} times the throughput of one (limit 3)")
    part = value["shared prompt, second time"] / value["shared prompt, first time"]
    print(f"a shared prompt's second time: {part:.2f} of the first (limit 0.33)")


def shown(line: Line, found: Found) -> str:
    """A value, in tokens/s or milliseconds."""
    return f"{line.value(found):.0f}" if line.is_speed else f"{1e3 * line.value(found):.1f}"


def missed_limits(found: dict[str, Found]) -> Any:
    """A sentence for each limit of the table that is not kept."""
    ours = {line.name: line.value(found[OURS]) for line in LINES if line.percent == 50}
    if ours["tokens/s at 8"] < 3 * ours["tokens/s at 1"]:
        yield "8 at once have less than 3 times the throughput of one"
    if ours["shared prompt, second time"] > ours["shared prompt, first time"] / 3:
        yield "a shared prompt's second time takes more than a third of the first"
    for peer, at_once, least in TARGETS:
        line = Line(f"tokens/s at {at_once}", is_speed=True)
        if peer in found and (ratio := line.ratio(found[OURS], found[peer])) < least:
            yield f"{ratio:.2f} times {peer}'s throughput at {at_once}, not {least}"


def differs(checkpoint: phi3_jax.Checkpoint, request: dict[str, Any], reply: Reply) -> str:
    """What is not as plain generation has it; empty if nothing is."""
    expected = plainly(checkpoint, request)
    return "" if reply.text == expected else f"  {reply.text!r}\n  is not {expected!r}"


def plainly(checkpoint: phi3_jax.Checkpoint, request: dict[str, Any]) -> str:
    """The answer of `generate`, one row alone."""
    options = Options(room=ROOM, prefill_chunk=CHUNK)
    return generate(checkpoint, request["prompt"], request["max_tokens"], options=options)[0].text


def load(checkpoint: phi3_jax.Checkpoint, prompts: Prompts, rounds: int) -> None:
    """Runs the load; fails if an answer is lost or wrong, a slot is not free afterwards, or memory grows."""
    arguments = ["--checkpoint", "demo", "--quantize", "stored", "--slots", str(MOST_AT_ONCE)]
    with phi3_serve(*arguments) as server:
        Load.random(-1, 2 * MOST_AT_ONCE, prompts, LOAD_PROMPTS, LOAD_ANSWERS).run(server, MOST_AT_ONCE)
        memory = [server.memory()]
        done = []
        for number in range(rounds):
            work = Load.random(number, LOAD_REQUESTS, prompts, LOAD_PROMPTS, LOAD_ANSWERS)
            done.append((work, work.run(server, MOST_AT_ONCE)))
            memory.append(server.memory())
            print(f"round {number + 1}: {memory[-1] / 1e6:.0f} MB, {len(work.leaving)} clients left", flush=True)
    faults = []
    for work, replies in done:
        expected = {i: plainly(checkpoint, request) for i, request in enumerate(work.requests) if i not in work.leaving}
        faults += work.faults(replies, expected)
    grown = memory[-1] / memory[1] - 1
    print(*faults, f"faults: {len(faults)}; memory after the first round grew by {grown:.1%}", sep="\n")
    sys.exit(bool(faults) or grown > 0.03)


if __name__ == "__main__":
    main()

"""phi3-benchmark: how fast a model runs here, how fast it could at best, and how fast other programs run it.

phi3-benchmark --checkpoint demo
phi3-benchmark --random phi-3-mini-4k --quantize int4 --json int4.json --chart int4.png
phi3-benchmark --random phi-3-mini-4k --quantize int4 --peers llama_cpp --peer_python other/bin/python
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import logging
import os
import platform
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

import phi3_jax
from phi3_jax.checkpoint.atomic_write import new_file
from phi3_jax.command_line.model_flags import ADAPTER, CHECKPOINT, QUANTIZE
from phi3_jax.command_line.program import run_program
from phi3_jax.config import Phi3Config
from phi3_jax.kernels import why_unavailable
from phi3_jax.kernels.machine import Machine, Published, threads
from phi3_jax.kernels.native.build import library

from ..benchmark import processes
from ..benchmark.chart import save_chart
from ..benchmark.model import ModelSpec
from ..benchmark.peers import FLASH_ATTENTION, open_peer, parse_peers, rate_of
from ..benchmark.rounds import Case, Result, Side, run_case, why_not
from ..engine.options import MOST_TOKENS
from . import flags as common

_MOST_ROWS = 4096
_RANDOM = flags.DEFINE_enum(
    "random", None, sorted(phi3_jax.PRESETS), "In place of a checkpoint: random weights of this size."
)
_WINDOW = flags.DEFINE_bool(
    "window", True, "--nowindow leaves the model's sliding window out, as llama.cpp does for Phi-3."
)
_PROMPT_LENGTHS = flags.DEFINE_list("prompt_lengths", ["512"], "Lengths of the prompts whose reading is measured.")
_CONTEXTS = flags.DEFINE_list("contexts", ["480"], "How many tokens lie behind the ones whose writing is measured.")
_BATCHES = flags.DEFINE_list("batches", ["1"], "How many rows are written at the same time.")
_NEW_TOKENS = flags.DEFINE_integer(
    "new_tokens", 32, "How many tokens of each row are written.", lower_bound=1, upper_bound=MOST_TOKENS
)
_ROUNDS = flags.DEFINE_integer("rounds", 5, "How often everything is measured.", lower_bound=1, upper_bound=10_000)
_PEERS = flags.DEFINE_list(
    "peers",
    [],
    "Programs to measure in turns with ours, on the same weights: llama_cpp, transformers. With a type after a colon "
    "where it is not to be the nearest to ours: llama_cpp:q4_k_m, llama_cpp:own (the .gguf checkpoint as it is), "
    "transformers:float32.",
)
_PEER_PYTHON = flags.DEFINE_string(
    "peer_python", None, "The Python that has llama-cpp-python, or torch and transformers; by default this one."
)
_FLASH_ATTENTION = flags.DEFINE_enum(
    "flash_attention", "best", FLASH_ATTENTION, "Of llama.cpp; best: whichever is faster in each case."
)
_WORK_DIR = flags.DEFINE_string(
    "work_dir",
    None,
    "Where the peers' files are made, and found again by the next run; by default a folder that is removed.",
)
_JSON = flags.DEFINE_string("json", None, "A file for all figures.")
_CHART = flags.DEFINE_string("chart", None, "A PNG file for a chart (needs the extra plot).")

_TOPICS: dict[str, list[flags.FlagHolder[Any]]] = {
    "Model": [CHECKPOINT, _RANDOM, ADAPTER, common.DTYPE, QUANTIZE, common.CACHE_DTYPE, _WINDOW],
    "What is measured": [_PROMPT_LENGTHS, _CONTEXTS, _BATCHES, _NEW_TOKENS, _ROUNDS],
    "Other programs": [_PEERS, _PEER_PYTHON, _FLASH_ATTENTION, _WORK_DIR],
    "Figures": [_JSON, _CHART],
}


def main() -> int:
    """Loads all sides, measures case after case, and prints the results."""
    _check_flags()
    spec, cases, load = _spec(), _cases(), _load_average()
    if load > _BUSY:
        _say(f"note: other programs are running (load {load:.1f}); programs that share processors cannot be compared")
    with contextlib.ExitStack() as stack:
        sides, about, config = _open_sides(spec, stack)
        machine = _limits(about[0])
        title, subtitle = _title(spec, about), _subtitle(about, machine)
        print("\n".join([title, subtitle, *(f"{name}: {how}" for name, how in about[0]["status"].items())]), flush=True)
        print(_HEADER, flush=True)
        results: list[Result] = []
        figures: list[dict[str, Any]] = []
        for case in cases:
            if (reason := why_not(case, sides, config, about[0].get("free_bytes"))) is not None:
                print(f"| {case.name} | left out: {reason} |", flush=True)
                figures.append({"case": dataclasses.asdict(case), "left_out": reason})
                continue
            new, bandwidths = run_case(case, sides, config, _ROUNDS.value, machine, on_round=_progress(case))
            results += new
            figures.append({"case": dataclasses.asdict(case), "bandwidths": bandwidths, "sides": _as_json(new)})
            for result in new:
                print(_line(result), flush=True)
        for side, reply in zip(sides, about, strict=True):
            reply["peak_bytes"] = side.process.ask("memory")["peak_bytes"]
    print(_last_lines(sides, about, results))
    if _JSON.value:
        everything = _environment(spec, sides, about, machine) | {"load_before": load, "cases": figures}
        with new_file(Path(_JSON.value), overwrite=True) as partial:
            partial.write_text(json.dumps(everything, indent=1) + "\n", encoding="utf-8")
    if _CHART.value:
        logging.getLogger("matplotlib").setLevel(logging.WARNING)  # absl shows messages from INFO on
        save_chart(results, _CHART.value, title, subtitle, _ROUNDS.value)
    return 0


def _open_sides(spec: ModelSpec, stack: contextlib.ExitStack) -> tuple[list[Side], list[dict[str, Any]], Phi3Config]:
    """Starts and loads our side and the peers -> (the sides, what each said, the model's config)."""
    folder = Path(_WORK_DIR.value or stack.enter_context(tempfile.TemporaryDirectory()))
    folder.mkdir(parents=True, exist_ok=True)
    # This process asks no more of jax: it would take an accelerator's memory from the one that computes.
    process = stack.enter_context(processes.ours())
    where = process.ask("platform", spec=dataclasses.asdict(spec))
    dtype = where["dtype"]
    peers = parse_peers(_PEERS.value, dtype, spec.quantize)
    if peers and where["platform"] != "cpu":
        computes = f"--peers run on the CPU, and phi3_jax computes on the {where['platform']}"
        raise ValueError(f"{computes}: set JAX_PLATFORMS=cpu, or leave --peers out")
    _say("loading phi3_jax")
    reply = where | process.ask("load", spec=dataclasses.asdict(spec), cache_dtype=common.CACHE_DTYPE.value)
    config = Phi3Config.from_hf(reply["config"])
    name = f"phi3_jax {spec.quantize or dtype}"
    sides = [Side(name, process, reply["weight_bytes"], rate_of(dtype, spec.quantize), reply["cache_bytes"])]
    about = [reply]
    for peer in peers:
        side, reply = open_peer(peer, spec, folder, _PEER_PYTHON.value, _FLASH_ATTENTION.value, stack, _say)
        sides.append(side)
        about.append(reply)
    return sides, about, config


def _limits(about: dict[str, Any]) -> Machine | Published | None:
    """What limits our side: measured on the CPU, published of an accelerator; None if neither is to be had."""
    if about["platform"] != "cpu":
        return Published.of(about["device"])
    return None if why_unavailable() else Machine(library())


def _spec() -> ModelSpec:
    return ModelSpec(
        checkpoint=_RANDOM.value or CHECKPOINT.value,
        is_random=_RANDOM.value is not None,
        dtype=common.DTYPE.value,
        quantize=QUANTIZE.value,
        adapter=ADAPTER.value,
        window=_WINDOW.value,
    )


def _cases() -> list[Case]:
    cases = [Case("prefill", length) for length in _numbers(_PROMPT_LENGTHS)]
    for context in _numbers(_CONTEXTS):
        cases += [Case("decode", context, batch, _NEW_TOKENS.value) for batch in _numbers(_BATCHES)]
    return cases


def _numbers(holder: flags.FlagHolder[Any]) -> list[int]:
    most = _MOST_ROWS if holder is _BATCHES else MOST_TOKENS
    if wrong := [
        text for text in holder.value if not re.fullmatch(r"\s*\d{1,9}\s*", text) or not 1 <= int(text) <= most
    ]:
        raise ValueError(f"--{holder.name}: {wrong} are not numbers from 1 to {most}; give some with commas between")
    return [int(text) for text in holder.value]


def _check_flags() -> None:
    """Raises ValueError for flags that contradict one another, would have no effect, or would fail late."""
    if _RANDOM.value and CHECKPOINT.present:
        raise ValueError("give --checkpoint or --random, not both")
    if ADAPTER.value and (_RANDOM.value or _PEERS.value):
        raise ValueError("--adapter is for a checkpoint, and for our side alone: leave --random and --peers out")
    for flag in (_PEER_PYTHON, _FLASH_ATTENTION, _WORK_DIR):
        if flag.present and not _PEERS.value:
            raise ValueError(f"--{flag.name} needs --peers")
    for flag in (_JSON, _CHART):
        if flag.value and not (folder := Path(flag.value).parent).is_dir():
            raise ValueError(f"--{flag.name}={flag.value}: there is no folder {folder}; make it first")
    if _CHART.value:
        import matplotlib  # noqa: F401 - before minutes of measuring


_BUSY = 0.5  # a higher load average gives a warning
_HEADER = (
    "| case | program | tokens/s | least - greatest | of the limit | ours is | how |\n|---|---|---|---|---|---|---|"
)


def _line(result: Result) -> str:
    """A row of the table."""
    speed, limit, ratio = result.tokens_per_second, result.of_limit, result.ratio
    cells = [
        result.case.name,
        result.side,
        f"{speed.median:.2f}",
        f"{speed.least:.2f} - {speed.greatest:.2f}",
        "" if limit is None else f"{limit.median:.0%}",
        "" if ratio is None else f"{ratio.median:.2f}x ({ratio.least:.2f} - {ratio.greatest:.2f})",
        result.note,
    ]
    return "| " + " | ".join(cells) + " |"


def _title(spec: ModelSpec, about: Sequence[dict[str, Any]]) -> str:
    weights = f"{spec.quantize or about[0]['dtype']} weights{' with an adapter' if spec.adapter else ''}"
    return f"{spec.name}{' (random weights)' if spec.is_random else ''}, {weights}"


def _subtitle(about: Sequence[dict[str, Any]], machine: Machine | Published | None) -> str:
    device = about[0]["device"]
    if about[0]["platform"] != "cpu":
        if machine is None:
            return f"{device}; its limits are not known: phi3_jax/kernels/machine.py has no figures of it"
        rate = machine.rates["bfloat16"] / 1e12
        return f"{device}; by its data sheet memory {machine.bandwidth() / 1e9:.0f} GB/s; bfloat16 {rate:.0f} Top/s"
    if machine is None:
        return f"{device}: {_processor()}; its limits were not measured: there are no compiled kernels"
    rates = ", ".join(f"{name} {rate / 1e9:.0f}" for name, rate in machine.rates.items() if rate)
    return f"{_processor()}, {threads()} threads; memory {machine.bandwidth() / 1e9:.0f} GB/s; {rates} Gop/s"


def _last_lines(sides: Sequence[Side], about: Sequence[dict[str, Any]], results: Sequence[Result]) -> str:
    """The second table, one line for each side: loading, compiling, the first token, memory; and notes."""
    lines = ["", "| program | loading, s | compiling, s | first token, s | peak memory, GB |", "|---|---|---|---|---|"]
    for side, reply in zip(sides, about, strict=True):
        own = [result for result in results if result.side == side.name]
        compiling = sum(result.compile_seconds for result in own)
        first = [f"{_first_token(result):.2f} after {result.case.context}" for result in own if _is_prefill(result)]
        peak = reply["peak_bytes"] / 1e9
        lines.append(f"| {side.name} | {reply['seconds']:.1f} | {compiling:.1f} | {', '.join(first)} | {peak:.2f} |")
    tokens = [(result.case.context, result.side, result.token) for result in results if _is_prefill(result)]
    for context, name, token in tokens:
        if token != (ours := next(t for c, _, t in tokens if c == context)):
            lines.append(f"note: {name} has another most likely token ({token}) after {context} than ours ({ours})")
    where = "VmHWM" if about[0]["platform"] == "cpu" else "VmHWM; of phi3_jax it is the accelerator's"
    lines.append(f"(each program is a process of its own; its peak memory, mapped files included, is {where})")
    return "\n".join(lines)


def _is_prefill(result: Result) -> bool:
    return result.case.kind == "prefill"


def _first_token(result: Result) -> float:
    """Seconds from a prompt's ids to the next token, with everything compiled."""
    return result.case.tokens / result.tokens_per_second.median


def _as_json(results: Sequence[Result]) -> list[dict[str, Any]]:
    return [{k: v for k, v in dataclasses.asdict(result).items() if k != "case"} for result in results]


def _environment(
    spec: ModelSpec, sides: Sequence[Side], about: Sequence[dict[str, Any]], machine: Machine | Published | None
) -> dict[str, Any]:
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "model": dataclasses.asdict(spec),
        "rounds": _ROUNDS.value,
        "machine": {
            "processor": _processor(),
            "platform": platform.platform(),
            "python": platform.python_version(),
            "threads": threads(),
            "operations_per_second": machine and machine.rates,
        },
        "sides": [{"name": side.name, **reply} for side, reply in zip(sides, about, strict=True)],
    }


def _load_average() -> float:
    """How many programs were running in the last minute, on average."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0


def _processor() -> str:
    """The processor's name."""
    with contextlib.suppress(OSError, StopIteration), open("/proc/cpuinfo", encoding="utf-8") as file:
        return next(line for line in file if line.startswith("model name")).partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _progress(case: Case) -> Any:
    return lambda number: _say(f"{case.name}: round {number + 1} of {_ROUNDS.value}")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def run() -> None:
    """The console script."""
    run_program("phi3-benchmark", main, _TOPICS)


if __name__ == "__main__":
    run()

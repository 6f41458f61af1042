"""A process that reads one mutated input after the other. It is told which as lines of JSON, and answers so.

For each input it first says that it begins to read, from when on the time counts, and then what came of it.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import sys
import time
import traceback
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import verdicts
from .mutations import mutate, variant_of
from .reader import Read, Reader


def serve(readers: Mapping[str, Reader], work: Path) -> None:
    """Answers on standard output until standard input ends; what else is printed goes nowhere."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    nowhere, errors = os.open(os.devnull, os.O_WRONLY), os.dup(2)
    os.dup2(nowhere, 1)
    warnings.simplefilter("ignore")
    sys.set_int_max_str_digits(4300)  # Python's own limit, whatever the environment says
    valid: dict[Path, tuple[Read, float]] = {}
    for line in sys.stdin:
        asked = json.loads(line)
        reader, case = readers[asked["reader"]], Path(asked["case"])
        variant = variant_of(reader, asked["seed"])
        original = work / "valid" / f"{asked['reader']}-{variant}"
        if original not in valid:
            valid[original] = _make(reader, variant, original)
        _copy(original, case)
        mutation = mutate(case, asked["reader"], reader, asked["seed"])
        read, size = valid[original]
        bounds = {"seconds": reader.seconds, "memory": verdicts.most_memory(size) + reader.memory}
        print(json.dumps({"mutation": dataclasses.asdict(mutation), **bounds}), file=answers)
        os.dup2(nowhere, 2)
        outcome = _read(reader, variant, case)
        os.dup2(errors, 2)
        verdict, why = verdicts.judge(outcome, mutation, reader, read, size, str(case))
        told = {"verdict": verdict, "why": why, "outcome": verdicts.as_dict(outcome)}
        print(json.dumps(told), file=answers)


def _make(reader: Reader, variant: int, original: Path) -> tuple[Read, float]:
    """Makes the valid input, and reads a copy of it -> what was read, and its size."""
    if not original.exists():
        partial = original.with_name(f"{original.name}.{os.getpid()}")
        partial.mkdir(parents=True)
        reader.make(partial, variant)
        try:
            partial.rename(original)
        except OSError:  # another worker was faster
            shutil.rmtree(partial)
    copy = original.with_name(f"{original.name}-{os.getpid()}")
    _copy(original, copy)
    read = reader.read(copy, variant)
    shutil.rmtree(copy)
    _copy(original, copy)
    again = reader.read(copy, variant)
    shutil.rmtree(copy)
    assert json.loads(json.dumps(read)) == json.loads(json.dumps(again)), f"{original.name} reads differently each time"
    assert not read.get("told"), read
    return read, sum(path.stat().st_size for path in original.rglob("*") if path.is_file())


def _copy(original: Path, target: Path) -> None:
    shutil.copytree(original, target, symlinks=True, copy_function=shutil.copy2)


def _read(reader: Reader, variant: int, case: Path) -> verdicts.Outcome:
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before, begin = _memory("VmRSS"), time.monotonic()
    read: Read | None = None
    told: dict[str, Any] = {}
    try:
        read = reader.read(case, variant)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        told = {
            "error": type(error).__name__,
            "is_refusal": isinstance(error, verdicts.REFUSALS),
            "message": _text(error),
            "trace": "".join(traceback.format_exception(error))[-4000:],
        }
    return verdicts.Outcome(read, **told, seconds=time.monotonic() - begin, memory=max(0, _memory("VmHWM") - before))


def _text(error: BaseException) -> str:
    try:
        return str(error)
    except Exception as other:
        return f"its text cannot be told: {other!r}"


def _memory(field: str) -> float:
    status = Path("/proc/self/status").read_text()
    return float(next(line for line in status.splitlines() if line.startswith(field)).split()[1]) * 1024

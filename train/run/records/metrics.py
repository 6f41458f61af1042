"""The metrics of a run, written while it goes on: lines of JSON for steps and sample answers, and TensorBoard's events.

All can be cut off after a step and continued, so that a run that was killed and resumed has the metrics of one that
was not.
"""

from __future__ import annotations

import contextlib
import json
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from phi3_jax.checkpoint.atomic_write import new_file
from phi3_jax.json_files import parse

from ..observer import Record
from .tensorboard import EventFile

# Metrics that differ each time, because they depend on the machine's speed.
TIMES = frozenset({"seconds", "tokens_per_second", "mfu"})
_TEXTS = ("prompt", "answer")  # of samples


class MetricsWriter:
    """Appends to `metrics.jsonl`, `samples.jsonl` and `tensorboard/` in a run's folder. To be used in a `with`."""

    def __init__(self, folder: Path, step: int):
        """Opens them to continue after a step.

        Args:
          step: lines of later steps are removed, because these steps are done again; -1 removes all lines.

        Raises:
          OSError: the folder cannot be written.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / "metrics.jsonl"
        self._samples = folder / "samples.jsonl"
        for path in filter(Path.exists, (self._path, self._samples)):
            kept = [record for record in read(path) if record["step"] <= step]
            with new_file(path, overwrite=True) as partial:  # a kill leaves the old one
                partial.write_text("".join(_line(record) for record in kept), encoding="utf-8")
        self._file = self._path.open("a", encoding="utf-8")
        self._events = EventFile(folder / "tensorboard", step + 1)

    def write(self, record: Record) -> None:
        """Adds the record of a step, which has "step" and numbers; one that is not finite becomes null.

        Raises:
          OSError: there is no room.
        """
        try:
            self._file.write(_line(record))
            self._file.flush()
            finite = {name: value for name, value in record.items() if value is not None and math.isfinite(value)}
            self._events.write(finite.pop("step"), finite)
        except OSError as error:
            raise OSError(f"{self._path}: cannot be written ({error.strerror}); make room there") from error

    def write_samples(self, step: int, answers: Sequence[tuple[str, str]]) -> None:
        """Adds (prompt, answer) of each sample after a step; in the file they are "step", "prompt" and "answer".

        Raises:
          OSError: there is no room.
        """
        if not answers:
            return
        try:
            with self._samples.open("a", encoding="utf-8") as file:
                file.writelines(_line({"step": step, "prompt": p, "answer": a}) for p, a in answers)
            texts = [f"{prompt} **->** {answer}" for prompt, answer in answers]
            self._events.write_texts(step, {f"sample {number}": text for number, text in enumerate(texts, 1)})
        except OSError as error:
            raise OSError(f"{self._samples}: cannot be written ({error.strerror}); make room there") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):  # `write` has flushed every line, and raised its errors
            self._file.close()
        self._events.close()


def read(path: Path) -> list[Record]:
    """The records of a metrics file, or of one of samples, without lines that are damaged; none where there is no file.

    Of these it warns, but not of a last one that a kill has cut off.
    """
    records, damaged = [], []
    *lines, last = path.read_bytes().split(b"\n") if path.exists() else [b""]
    for number, line in enumerate([*lines, last] if last else lines, 1):
        try:
            record = parse(line)
            is_whole = type(record["step"]) is int and all(map(_is_plain, record, record.values()))
        except (ValueError, TypeError, KeyError, AttributeError):
            is_whole = False
        if is_whole:
            records.append(record)
        elif number <= len(lines):
            damaged.append(number)
    if damaged:
        shown = ", ".join(map(str, damaged[:5])) + (", ..." if damaged[5:] else "")
        warnings.warn(f"{path}: damaged, and left out: line {shown}", stacklevel=2)
    return records


def _is_plain(name: str, value: Any) -> bool:
    if isinstance(value, int):  # of any number of digits
        return abs(value) < 1 << 63
    return isinstance(value, str) if name in _TEXTS else value is None or isinstance(value, float)


def _line(record: Mapping[str, Any]) -> str:
    finite = {n: v if isinstance(v, str) or math.isfinite(v or 0) else None for n, v in record.items()}
    return json.dumps(finite, ensure_ascii=False) + "\n"

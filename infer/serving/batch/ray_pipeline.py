"""Many files of requests on many machines: a pipeline of Ray Data.

    files -> rows -> from_items -> map_batches(Worker), an actor for each device -> rows with answers -> AnswerFiles

Ray holds rows back while the workers are busy, starts a lost worker anew and hands its rows out again. Files are read
and written by the program that drives it, so they are as strictly checked, as whole and as resumable as on one machine.
"""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import io
import json
import logging
import os
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from .answer_file import AnswerFile, check_finished
from .json_lines import LineFile, open_file
from .openai_form import ApiRequest
from .requests import Request
from .workers import Plan, Worker

_AT_ONCE = 2  # blocks of a worker: the second fills the slots that the first leaves at its end
_BLOCK = 4  # rows of a block for each slot; what is lost with a worker are its blocks


def find_inputs(pattern: str) -> list[LineFile]:
    """The files that a pattern names: on this machine, or "s3://bucket/folder/*.jsonl" or another address of pyarrow's.

    Raises:
      FileNotFoundError: there are none.
    """
    if "://" not in pattern:
        files = [open_file(path) for path in sorted(glob.glob(pattern)) if os.path.isfile(path)]
    else:
        try:
            from pyarrow import fs
        except ImportError as error:
            raise ImportError(f"{pattern} needs the extra ray ({error}): pip install 'phi3_jax[ray]'") from None
        place, _, names = pattern.rpartition("/")
        system, folder = fs.FileSystem.from_uri(place)
        found = system.get_file_info(fs.FileSelector(folder, allow_not_found=True))
        paths = sorted(info.path for info in found if info.is_file and fnmatch(info.base_name, names))
        files = [LineFile(f"{place}/{Path(path).name}", _opener(system, path)) for path in paths]
    if not files:
        raise FileNotFoundError(f"{pattern}: no such files; name some with one JSON object per line")
    return files


def _opener(system: Any, path: str) -> Callable[[], Any]:
    return lambda: io.BufferedReader(system.open_input_file(path))


@dataclasses.dataclass
class _Part:
    """One input and its output."""

    path: Path
    requests: Sequence[Request] | Sequence[ApiRequest]
    settings: Mapping[str, Any]
    missing: Sequence[int] = ()
    failed: int = 0
    file: AnswerFile | None = None

    def open(self) -> AnswerFile:
        return AnswerFile(self.path, self.requests, self.settings)

    def look(self) -> None:
        """Finds what is missing; a file that is finished is compared with the requests."""
        if self.path.is_file() and not Path(f"{self.path}.partial").exists():
            self.failed = check_finished(self.path, self.requests)
            return
        with self.open() as file:
            self.missing, self.failed = file.missing, file.failed

    def write(self, index: int, answer: Mapping[str, Any]) -> None:
        """Writes an answer; with the last one the file gets its final name."""
        if self.file is None:
            self.file = self.open().__enter__()
        self.file.write(index, answer)
        self.failed = self.file.failed
        if self.file.done == len(self.requests):
            self.close()

    def close(self) -> None:
        if self.file is not None:
            file, self.file = self.file, None
            file.__exit__(None, None, None)


class FolderRun:
    """The requests of several files, and a folder of files of the same names with their answers.

    Attributes:
      total, done: how many requests there are, and had their answers before this run.
    """

    def __init__(
        self,
        inputs: Sequence[LineFile],
        output: Path,
        plan: Plan,
        settings: Mapping[str, Any],
        check: Callable[[Request | ApiRequest, str], None],
    ):
        """Reads and checks all requests, and what an earlier run has left.

        Args:
          settings: see `AnswerFile`.
          check: raises ValueError for a request, by its name, that cannot be answered.

        Raises:
          FileNotFoundError: there is no such folder.
          ValueError: requests cannot be used, two files have one name, or what is in the folder is of another run.
        """
        if not output.is_dir():
            raise FileNotFoundError(f"{output}: no such folder; make it first")
        names = [Path(each.name).name for each in inputs]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"{output}: would hold the answers of several files named {twice[0]}; rename one")
        self._plan, self._parts = plan, list[_Part]()
        for name, each in zip(names, inputs, strict=True):
            requests = plan.read(each)
            for request in requests:
                check(request, f"{each.name}:{request.line}")
            self._plan = self._plan.with_lists_of(requests)
            self._parts.append(_Part(output / name, requests, settings))
        for part in self._parts:
            part.look()
        self.total = sum(len(part.requests) for part in self._parts)

        self.done = self.total - sum(len(part.missing) for part in self._parts)

    @property
    def failed(self) -> int:
        """How many answers tell of an error."""
        return sum(part.failed for part in self._parts)

    def answer(self, address: str, actors: int | None) -> Iterator[None]:
        """Answers what is missing; yields after each answer that has been written.

        Args:
          address: of a cluster, "auto" for that of this machine, "local" for one that is made for it.
          actors: how many workers; None: one for each GPU or TPU, else for each machine.

        Raises:
          ImportError: the extra `ray` is not installed.
        """
        left = {(number, index) for number, part in enumerate(self._parts) for index in part.missing}
        rows = [self._row(*place) for place in sorted(left)]
        if not rows:
            return
        try:
            for number, index, answer in answers_of(rows, self._plan, address, actors):
                if (number, index) in left:  # once, whatever Ray does after a loss
                    left.remove((number, index))
                    self._parts[number].write(index, answer)
                    yield
        finally:
            with contextlib.ExitStack() as stack:
                for part in self._parts:
                    stack.callback(part.close)
        if left:
            raise RuntimeError(f"{len(left)} rows came back from Ray without an answer: the same command goes on")

    def _row(self, number: int, index: int) -> dict[str, Any]:
        request = self._parts[number].requests[index]
        text = json.dumps(request.fields, ensure_ascii=False)
        is_openai = isinstance(request, ApiRequest)
        return {"file": number, "index": index, "line": request.line, "request": text, "is_openai": is_openai}


def answers_of(
    rows: Sequence[Mapping[str, Any]], plan: Plan, address: str, actors: int | None
) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """Hands rows to the workers of a cluster -> file, index and answer of each, as they come."""
    with _cluster(address) as ray:
        resources = ray.cluster_resources()
        device = next((kind for kind in ("GPU", "TPU") if resources.get(kind, 0) >= 1), None)
        machines = sum(node["Alive"] and node["Resources"].get("CPU", 0) >= 1 for node in ray.nodes())
        if not machines:
            raise ValueError(f"--ray={address}: no machine of this cluster has a CPU for a worker: add one")
        size = actors or max(1, int(resources[device]) if device else machines)
        needs: dict[str, Any] = {"num_cpus": 1}
        if device is not None:
            needs |= {"num_gpus": 1} if device == "GPU" else {"resources": {"TPU": 1}}
        per_block = min(_BLOCK * plan.slots, -(-len(rows) // (_AT_ONCE * size)))
        blocks = ray.data.from_items(list(rows), override_num_blocks=-(-len(rows) // per_block))
        answered = blocks.map_batches(
            Worker,
            batch_size=None,
            compute=ray.data.ActorPoolStrategy(
                size=size,
                max_tasks_in_flight_per_actor=_AT_ONCE,
                max_concurrent_calls_per_actor=_AT_ONCE,
                enable_true_multi_threading=True,
            ),
            fn_constructor_args=[plan],
            **needs,
        )
        for block in answered.iter_batches(batch_size=None, prefetch_batches=0):
            for number, index, answer in zip(block["file"], block["index"], block["answer"], strict=True):
                yield int(number), int(index), json.loads(answer)


@contextlib.contextmanager
def _cluster(address: str) -> Iterator[Any]:
    """Connects to a cluster, quietly; signals stay what they were."""
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ImportError(f"--ray needs the extra ray ({error}): pip install 'phi3_jax[ray]'") from None
    before = signal.getsignal(signal.SIGTERM)
    was_connected = ray.is_initialized()
    if not was_connected:
        ray.init(address, logging_level="warning", log_to_driver=False)
    signal.signal(signal.SIGTERM, before)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # what fails is raised, too
    try:
        yield ray
    except ray.exceptions.RayError as error:
        reason = str(error).strip().splitlines()[-1].strip()  # before it stands a worker's whole traceback
        raise OSError(f"the cluster has failed, and the same command goes on: {reason}") from error
    finally:
        if not was_connected:
            ray.shutdown()

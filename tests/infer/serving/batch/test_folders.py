"""Many files: what is found, what is done already, and what is refused, before any cluster is asked."""

import importlib.util
import json
from pathlib import Path

import pytest
from batches import answer, names

from phi3_jax.infer import Sampling
from phi3_jax.infer.serving.batch import AnswerFile, Defaults
from phi3_jax.infer.serving.batch.ray_pipeline import FolderRun, find_inputs
from phi3_jax.infer.serving.batch.workers import Plan

PLAN = Plan({"path": "nowhere"}, Defaults(7), Sampling(seed=3))
SETTINGS = {"max_new_tokens": 7}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three files of four requests each, and a folder for their answers."""
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    for name in ("a", "b", "c"):
        lines = [json.dumps({"prompt": f"{name}{i}"}) + "\n" for i in range(4)]
        (tmp_path / "in" / f"{name}.jsonl").write_text("".join(lines))
    (tmp_path / "in" / "notes.txt").write_text("no requests")
    return tmp_path


def run(folder: Path, pattern: str = "in/*.jsonl") -> FolderRun:
    return FolderRun(find_inputs(f"{folder}/{pattern}"), folder / "out", PLAN, SETTINGS, lambda request, name: None)


def answered(folder: Path, name: str, count: int) -> None:
    requests = PLAN.read(find_inputs(str(folder / "in" / name))[0])
    with AnswerFile(folder / "out" / name, requests, SETTINGS) as file:
        for index in list(range(4))[:count]:
            file.write(index, answer(index))


@pytest.mark.parametrize("before", ["", "file://"])
def test_files_are_found_by_a_pattern(folder: Path, before: str) -> None:
    found = find_inputs(f"{before}{folder}/in/[ab].jsonl")
    assert [Path(each.name).name for each in found] == ["a.jsonl", "b.jsonl"]
    assert [request.fields for request in PLAN.read(found[1])] == [{"prompt": f"b{i}"} for i in range(4)]
    assert [request.sampling.seed for request in PLAN.read(found[1])] == [3, 4, 5, 6]
    for pattern in (f"{before}{folder}/in/d*.jsonl", f"{before}{folder}/absent/*.jsonl"):
        with pytest.raises(FileNotFoundError, match="no such files"):
            find_inputs(pattern)


def test_what_an_earlier_run_has_left_is_counted_and_compared(folder: Path) -> None:
    assert (run(folder).total, run(folder).done) == (12, 0)
    assert names(folder / "out") == {f"{name}.jsonl.partial" for name in "abc"}
    answered(folder, "a.jsonl", 4)
    answered(folder, "b.jsonl", 3)
    assert run(folder).done == 7
    (folder / "out" / "c.jsonl.partial").unlink()
    for change in (
        lambda lines: lines[:3],
        lambda lines: [*lines, lines[0]],
        lambda lines: [lines[1], lines[0], *lines[2:]],
        lambda lines: [*lines[:3], b"{}\n"],
        lambda lines: [],
    ):
        (folder / "out" / "c.jsonl").write_bytes(b"".join(change(c_lines())))
        with pytest.raises(ValueError, match=r"c\.jsonl: exists already, and line \d is not the answer to request \d"):
            run(folder)
    (folder / "out" / "c.jsonl").write_bytes(b"".join(c_lines()))
    assert (run(folder).done, run(folder).failed) == (11, 1)


def c_lines() -> list[bytes]:
    more = [{}, {"error": "x"}, {}, {"error": None}]
    return [json.dumps({"prompt": f"c{i}", **fields}).encode() + b"\n" for i, fields in enumerate(more)]


def test_a_run_that_is_finished_asks_no_cluster(folder: Path) -> None:
    answered(folder, "a.jsonl", 4)
    assert list(run(folder, "in/a.jsonl").answer("nowhere:1", None)) == []


@pytest.mark.skipif(importlib.util.find_spec("ray") is not None, reason="ray is installed")
def test_without_ray_it_says_what_to_install(folder: Path) -> None:
    with pytest.raises(ImportError, match=r"--ray needs the extra ray .*pip install 'phi3_jax\[ray\]'"):
        next(run(folder).answer("auto", None))
    answered(folder, "a.jsonl", 4)  # nothing is locked any more


def test_folders_that_do_not_fit(folder: Path) -> None:
    with pytest.raises(FileNotFoundError, match="absent: no such folder; make it first"):
        FolderRun(find_inputs(f"{folder}/in/a.jsonl"), folder / "absent", PLAN, {}, lambda request, name: None)
    (folder / "in" / "more").mkdir()
    (folder / "in" / "more" / "a.jsonl").write_text('{"prompt": "x"}\n')
    twice = find_inputs(f"{folder}/in/a.jsonl") + find_inputs(f"{folder}/in/more/*.jsonl")
    with pytest.raises(ValueError, match=r"would hold the answers of several files named a\.jsonl; rename one"):
        FolderRun(twice, folder / "out", PLAN, {}, lambda request, name: None)
    (folder / "in" / "b.jsonl").write_text('{"prompt": 1}\n')
    with pytest.raises(ValueError, match=r"b\.jsonl:1: prompt=1 must be a text"):
        run(folder)
    assert names(folder / "out") == set()

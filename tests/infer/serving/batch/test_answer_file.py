import contextlib
import dataclasses
import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
from batches import (
    SETTINGS,
    answer,
    expected,
    names,
    prompts,
    read,
    read_only,
    run,
)

from phi3_jax.infer.sampling import Sampling
from phi3_jax.infer.serving.batch import answer_file
from phi3_jax.infer.serving.batch.answer_file import AnswerFile
from phi3_jax.infer.serving.batch.requests import Request


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A file in a folder where nothing else is."""
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "answers.jsonl"


def test_answers_are_in_order_and_hold_the_fields(tmp_path: Path, out: Path) -> None:
    requests = read(tmp_path, '{"id": "é", "prompt": "a", "top_k": 2}', '{"messages": [{"role": "u", "content": "c"}]}')
    with AnswerFile(str(out), requests, SETTINGS) as answers:
        for i in range(2):
            assert answers.done == i
            assert names(out.parent) == {"answers.jsonl.partial"}
            answers.write(i, {"text": f"ü{i}", "logprobs": [-0.5]})
    assert (
        out.read_bytes()
        == (
            '{"id": "é", "prompt": "a", "top_k": 2, "text": "ü0", "logprobs": [-0.5]}\n'
            '{"messages": [{"role": "u", "content": "c"}], "text": "ü1", "logprobs": [-0.5]}\n'
        ).encode()
    )
    assert names(out.parent) == {"answers.jsonl"}


def test_answers_that_cannot_be_written(tmp_path: Path, out: Path) -> None:
    requests = prompts(tmp_path, 2)
    with AnswerFile(out, requests, SETTINGS) as answers:
        answers.write(0, answer(0))
        for bad, message in (
            ({"text": "a", "prompt": "b"}, r"\['prompt'\], which are keys of requests"),
            ({"text": "a", "seed": 1}, r"\['seed'\], which are keys of requests"),
            ({"logprobs": float("nan")}, r"partial: line 3 cannot be written"),
            ({"text": "\ud800"}, r"partial: line 3 cannot be written"),
        ):
            with pytest.raises(ValueError, match=message):
                answers.write(1, bad)
        answers.write(1, answer(1))
        for index in (-1, 0, 1, 2):
            with pytest.raises(ValueError, match=rf"request {index} of 2 has its answer, or is none"):
                answers.write(index, answer(0))
    assert out.read_bytes() == expected(requests)


def test_the_file_appears_whole(tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = prompts(tmp_path, 3)
    events: list[str] = []
    real_fsync, real_replace = os.fsync, answer_file.rename_new

    def fsync(descriptor: int) -> None:
        events.append(f"fsync of {os.fstat(descriptor).st_size} bytes")
        real_fsync(descriptor)

    def replace(source: Path, target: Path) -> None:
        events.append("replace")
        assert Path(source).read_bytes() == expected(requests)
        assert names(out.parent) == {"answers.jsonl.partial", Path(source).name}
        real_replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(answer_file, "rename_new", replace)
    (out.parent / "answers.jsonl.partial.copy").write_bytes(b"left over from a kill" * 100)
    run(out, requests)
    assert events == [f"fsync of {len(expected(requests))} bytes", "replace"]
    assert out.read_bytes() == expected(requests)
    assert names(out.parent) == {"answers.jsonl"}


def test_a_partial_file_that_is_a_pipe_does_not_block(tmp_path: Path, out: Path) -> None:
    os.mkfifo(f"{out}.partial")
    with pytest.raises(ValueError, match=r"answers\.jsonl\.partial: is a named pipe"):
        AnswerFile(out, prompts(tmp_path, 2), SETTINGS)
    assert names(out.parent) == {"answers.jsonl.partial"}


def test_a_file_that_exists_is_never_overwritten(tmp_path: Path, out: Path) -> None:
    requests = prompts(tmp_path, 2)
    out.write_text("precious")
    with pytest.raises(ValueError, match=r"answers\.jsonl: exists already; choose another name or delete it"):
        AnswerFile(out, requests, SETTINGS)
    assert names(out.parent) == {"answers.jsonl"}
    out.unlink()
    out.symlink_to("nowhere")
    with pytest.raises(ValueError, match="exists already"):
        AnswerFile(out, requests, SETTINGS)
    out.unlink()
    answers = AnswerFile(out, requests, SETTINGS)
    answers.write(0, answer(0))
    answers.write(1, answer(1))
    out.write_text("came up meanwhile")
    with pytest.raises(ValueError, match="exists already"):
        answers.__exit__()
    assert out.read_text() == "came up meanwhile"
    assert names(out.parent) == {"answers.jsonl", "answers.jsonl.partial"}
    out.unlink()
    run(out, requests)
    assert out.read_bytes() == expected(requests)


def test_folders_that_cannot_be_written_to(tmp_path: Path, out: Path) -> None:
    requests = prompts(tmp_path, 1)
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*absent; make it first"):
        AnswerFile(tmp_path / "absent" / "a.jsonl", requests, SETTINGS)
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        AnswerFile(tmp_path / "requests.jsonl" / "a.jsonl", requests, SETTINGS)
    Path(f"{out}.partial").mkdir()
    with pytest.raises(IsADirectoryError, match=r"choose an output.*answers\.jsonl\.partial"):
        AnswerFile(out, requests, SETTINGS)
    with read_only(out.parent), pytest.raises(PermissionError, match=r"b\.jsonl: the folder cannot be written to"):
        AnswerFile(out.parent / "b.jsonl", requests, SETTINGS)


# ---- going on ----


def test_a_run_that_was_interrupted_goes_on(tmp_path: Path, out: Path) -> None:
    requests = prompts(tmp_path, 5)
    run(out, requests, stop_at=2)  # left without an exception, as a program may do after Ctrl-C
    assert names(out.parent) == {"answers.jsonl.partial"}
    with contextlib.suppress(KeyboardInterrupt), AnswerFile(out, requests, SETTINGS) as answers:
        assert answers.done == 2
        answers.write(2, answer(2))
        raise KeyboardInterrupt
    assert names(out.parent) == {"answers.jsonl.partial"}
    settings = dict(reversed(SETTINGS.items()))
    with contextlib.suppress(KeyboardInterrupt), AnswerFile(out, requests, settings) as answers:
        assert answers.done == 3
        answers.write(3, answer(3))
        answers.write(4, answer(4))
        raise KeyboardInterrupt
    assert out.read_bytes() == expected(requests)
    assert names(out.parent) == {"answers.jsonl"}


def test_answers_come_in_any_order(tmp_path: Path, out: Path) -> None:
    requests = prompts(tmp_path, 23)
    order = random.Random(5).sample(range(23), 23)
    for begin, end in ((0, 9), (9, 10), (10, 23)):
        with AnswerFile(out, requests, SETTINGS) as answers:
            assert (answers.done, answers.missing) == (begin, sorted(order[begin:]))
            for index in order[begin:end]:
                answers.write(index, answer(index))
                with pytest.raises(ValueError, match=f"request {index} of 23 has its answer"):
                    answers.write(index, answer(index))
        assert out.exists() == (end == 23)
    assert out.read_bytes() == expected(requests)


def test_answers_that_tell_of_errors_are_counted(tmp_path: Path, out: Path) -> None:
    requests = prompts(tmp_path, 5)
    told = [{"error": "x"}, {"error": None}, {"response": {"status_code": 400}}, {"response": {"status_code": 200}}]
    with AnswerFile(out, requests, SETTINGS) as answers:
        for index, fields in enumerate(told):
            answers.write(index, fields)
        assert answers.failed == 2
    with AnswerFile(out, requests, SETTINGS) as answers:
        assert answers.failed == 2


def test_cuts_of_the_partial_file(tmp_path: Path, out: Path) -> None:
    requests = prompts(tmp_path, 3)
    partial = Path(f"{out}.partial")
    with AnswerFile(out, requests, SETTINGS) as answers:
        for i in (2, 0, 1):
            answers.write(i, answer(i))
        whole = partial.read_bytes()
    header = json.loads(whole.split(b"\n")[0])
    assert header.keys() == {"phi3_jax_batch", "settings", "requests_sha256"}
    assert (header["phi3_jax_batch"], header["settings"]) == (2, SETTINGS)
    assert [json.loads(line)["index"] for line in whole.splitlines()[1:]] == [2, 0, 1]
    assert sorted(whole.splitlines()[1:]) == [
        b'{"index": %d, "answer": %s}' % pair for pair in enumerate(out.read_bytes().splitlines())
    ]
    ends = [place for place, byte in enumerate(whole) if byte == ord("\n")]
    cuts = {*range(0, len(whole) + 1, 11), *(end + near for end in ends for near in (-1, 0, 1))}
    for cut in sorted(cuts):
        out.unlink()
        partial.write_bytes(whole[:cut])
        with AnswerFile(out, requests, SETTINGS) as answers:
            assert answers.done == max(whole[:cut].count(b"\n") - 1, 0)
            assert answers.missing == sorted([2, 0, 1][answers.done :])
            # The half line is gone even if this run is killed before it writes.
            assert partial.read_bytes() == whole[: max(whole.rfind(b"\n", 0, cut), whole.find(b"\n")) + 1]
            for index in answers.missing:
                answers.write(index, answer(index))
        assert out.read_bytes() == expected(requests)
        assert names(out.parent) == {"answers.jsonl"}


def test_other_settings_or_requests_are_refused(tmp_path: Path, out: Path) -> None:
    requests = prompts(tmp_path, 3)
    run(out, requests, stop_at=1)
    before = Path(f"{out}.partial").read_bytes()

    def refused(message: str, requests: list[Request], settings: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match=rf"partial: begun with {message}.*[Uu]se the same .*delete") as caught:
            AnswerFile(out, requests, settings)
        assert "checkpoint" not in str(caught.value)
        assert Path(f"{out}.partial").read_bytes() == before

    refused("other settings: max_new_tokens was 7 and is 8.", requests, {**SETTINGS, "max_new_tokens": 8})
    changed = {"checkpoint": "demo", "max_new_tokens": 7, "stop": ["a"], "top": 1}
    refused(r'other settings: stop was \["a", "b"\] and is \["a"\]; top was absent and is 1', requests, changed)
    refused("other settings: max_new_tokens was 7 and is absent", requests, {"checkpoint": "demo", "stop": ["a", "b"]})
    refused("other requests", requests[:2], SETTINGS)
    refused("other requests", requests[::-1], SETTINGS)
    sampled = [*requests[:2], dataclasses.replace(requests[2], sampling=Sampling(temperature=0.25))]
    refused("other requests, or with other sampling", sampled, SETTINGS)
    run(out, requests)
    assert out.read_bytes() == expected(requests)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: [b"my notes"], "not the beginning of a batch"),
        (lambda lines: [b"my notes\n", *lines[1:]], "not the beginning of a batch"),
        (lambda lines: [b'{"phi3_jax_batch": 1, }\n', *lines[1:]], "header is damaged"),
        (lambda lines: [lines[0].replace(b": 2,", b": 1,"), *lines[1:]], "header is damaged, or of another version"),
        (lambda lines: [*lines[:2], b"\x00" * 20 + b"\n"], "line 3 is damaged"),
        (lambda lines: [*lines[:2], b"[]\n"], "line 3 is damaged"),
        (lambda lines: [*lines[:2], lines[2][: len(lines[2]) // 2] + b"\n"], "line 3 is damaged"),
        (lambda lines: [*lines, b'{"index": 3, "answer": {"prompt": "p3 \xc3\xa9"}}\n'], "line 5 is damaged"),
        (lambda lines: [*lines[:3], lines[2]], "line 4 is damaged"),  # an answer twice
        (lambda lines: [lines[0], lines[1].replace(b'"index": 0', b'"index": 1')], "line 2 is damaged"),
        (lambda lines: [*lines[:3], lines[3].replace(b'"index": 2', b'"index": 02')], "line 4 is damaged"),
        (lambda lines: [*lines[:3], lines[3].replace(b'"answer"', b'"answers"')], "line 4 is damaged"),
        (lambda lines: [lines[0], lines[1].partition(b'"answer": ')[2].replace(b"}}", b"}")], "line 2 is damaged"),
    ],
)
def test_damaged_and_foreign_files_are_left_alone(tmp_path: Path, out: Path, change: Any, message: str) -> None:
    requests = prompts(tmp_path, 3)
    partial = Path(f"{out}.partial")
    with AnswerFile(out, requests, SETTINGS) as answers:
        for i in range(3):
            answers.write(i, answer(i))
        lines = partial.read_bytes().splitlines(keepends=True)
    out.unlink()
    partial.write_bytes(b"".join(change(lines)))
    before = partial.read_bytes()
    with pytest.raises(ValueError, match=rf"answers\.jsonl\.partial: .*{message}.*delete"):
        AnswerFile(out, requests, SETTINGS)
    assert partial.read_bytes() == before

import contextlib
import dataclasses
import errno
import fcntl
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from phi3_jax.infer.batch_files import AnswerFile, Request, read_requests
from phi3_jax.infer.sampling import Sampling

SETTINGS = {"checkpoint": "demo", "max_new_tokens": 7, "stop": ["a", "b"]}
PROGRAM = Sampling(temperature=0.5, top_k=11, seed=2**32 - 2)


def read(folder: Path, *lines: str | bytes, sampling: Sampling = PROGRAM) -> list[Request]:
    path = folder / "requests.jsonl"
    path.write_bytes(b"".join((line.encode() if isinstance(line, str) else line) + b"\n" for line in lines))
    return read_requests(path, sampling)


def prompts(folder: Path, count: int) -> list[Request]:
    return read(folder, *(json.dumps({"prompt": f"p{i} é", "id": i}, ensure_ascii=False) for i in range(count)))


def answer(index: int) -> dict[str, Any]:
    return {"text": f"a{index}: \n\u2028 ü 😀", "token_ids": [index, 3], "finish_reason": "stop"}


def run(path: Path, requests: list[Request], settings: Any = SETTINGS, stop_at: int | None = None) -> None:
    with AnswerFile(path, requests, settings) as answers:
        while answers.done < (len(requests) if stop_at is None else stop_at):
            answers.write(answer(answers.done))


def expected(requests: list[Request]) -> bytes:
    lines = [json.dumps({**r.fields, **answer(i)}, ensure_ascii=False) for i, r in enumerate(requests)]
    return "".join(line + "\n" for line in lines).encode()


def names(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()}


# ---- reading ----


def test_lines_are_read(tmp_path: Path) -> None:
    messages = [{"role": "system", "content": ""}, {"role": "user", "content": "Hi é"}]
    requests = read(
        tmp_path,
        b"\xef\xbb\xbf" + '{"prompt": "ä\\n😀"}'.encode(),
        "",
        '{"id": 3.5, "messages": ' + json.dumps(messages) + ', "max_new_tokens": 1}\r',
        " \t",
        '{"prompt": "c", "seed": 5, "top_k": null, "temperature": 1, "id": ""}',
        '{"prompt": "d"}',
    )
    assert [r.line for r in requests] == [1, 3, 5, 6]
    assert [r.prompt for r in requests] == ["ä\n😀", None, "c", "d"]
    assert [r.messages for r in requests] == [None, messages, None, None]
    assert [r.max_new_tokens for r in requests] == [None, 1, None, None]
    assert requests[1].fields == {"id": 3.5, "messages": messages, "max_new_tokens": 1}
    # The seeds run on by the index of the request, not the line, and wrap.
    assert [r.sampling for r in requests] == [
        PROGRAM,
        dataclasses.replace(PROGRAM, seed=2**32 - 1),
        dataclasses.replace(PROGRAM, seed=5, top_k=None, temperature=1.0),
        dataclasses.replace(PROGRAM, seed=1),
    ]


def test_every_field_of_sampling_can_be_given(tmp_path: Path) -> None:
    own = {
        "temperature": 0.25,
        "top_k": 3,
        "top_p": 0.5,
        "min_p": 0.125,
        "typical_p": 1,
        "repetition_penalty": 1.5,
        "presence_penalty": -1,
        "frequency_penalty": 0.75,
        "logit_bias": {"123": 1.5, "0": -2},
        "banned_tokens": [5, 7],
        "forced_tokens": [],
        "no_repeat_ngram_size": 2,
        "min_new_tokens": 4,
        "seed": 9,
    }
    assert own.keys() == {field.name for field in dataclasses.fields(Sampling)}
    (request,) = read(tmp_path, json.dumps({"prompt": "a", **own}))
    assert request.sampling == Sampling(**{**own, "logit_bias": {123: 1.5, 0: -2}})
    assert request.fields["logit_bias"] == own["logit_bias"]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{}", 'exactly one of "prompt" and "messages"'),
        ('{"id": 1}', 'exactly one of "prompt" and "messages"'),
        ('{"prompt": "a", "messages": [{"role": "user", "content": "a"}]}', 'exactly one of "prompt" and "messages"'),
        ('{"prompt": "a", "temprature": 1}', r"unknown keys \['temprature'\]"),
        ('{"prompt": "a", "text": "b", "line": 2}', r"unknown keys \['line', 'text'\]"),
        ('{"prompt": ""}', 'prompt="" must be a text that is not empty'),
        ('{"prompt": ["a"]}', "must be a text that is not empty"),
        ('{"prompt": null}', "prompt=null must be a text"),
        ('{"messages": []}', "must be a list, not empty"),
        ('{"messages": {"role": "user", "content": "a"}}', "must be a list, not empty"),
        ('{"messages": ["a"]}', "must be a list, not empty"),
        ('{"messages": [{"role": "user"}]}', "must be a list, not empty"),
        ('{"messages": [{"role": "user", "content": 1}]}', "must be a list, not empty"),
        ('{"messages": [{"role": "user", "content": "a", "name": "b"}]}', "must be a list, not empty"),
        ('{"prompt": "a", "id": null}', "id=null must be a text or a number"),
        ('{"prompt": "a", "id": true}', "id=true must be a text or a number"),
        ('{"prompt": "a", "id": [1]}', r"id=\[1\] must be a text or a number"),
        ('{"prompt": "a", "max_new_tokens": 0}', "max_new_tokens=0 must be a whole number of at least 1"),
        ('{"prompt": "a", "max_new_tokens": null}', "max_new_tokens=null must be a whole number"),
        ('{"prompt": "a", "max_new_tokens": 2.0}', r"max_new_tokens=2\.0 must be a whole number"),
        ('{"prompt": "a", "top_k": true}', "top_k=true must be a whole number or null"),
        ('{"prompt": "a", "top_k": 0}', "top_k=0 must be a whole number of at least 1"),
        ('{"prompt": "a", "temperature": "1"}', 'temperature="1" must be a number'),
        ('{"prompt": "a", "temperature": null}', "temperature=null must be a number"),
        ('{"prompt": "a", "temperature": -1}', "temperature=-1 must be 0"),
        ('{"prompt": "a", "temperature": 1' + 400 * "0" + "}", r"temperature=10*\.\.\. must be a number"),
        ('{"prompt": "a", "top_p": false}', "top_p=false must be a number or null"),
        ('{"prompt": "a", "seed": 4294967296}', r"seed=4294967296 must be .*\[0, 2\*\*32\)"),
        ('{"prompt": "a", "seed": null}', "seed=null must be a whole number"),
        ('{"prompt": "a", "banned_tokens": 5}', "banned_tokens=5 must be a list of token ids"),
        ('{"prompt": "a", "banned_tokens": ["5"]}', "must be a list of token ids"),
        ('{"prompt": "a", "forced_tokens": [-5]}', "forced_tokens.* token ids of at least 0"),
        ('{"prompt": "a", "logit_bias": [1]}', r"logit_bias=\[1\] must be an object"),
        ('{"prompt": "a", "logit_bias": {"x": 1}}', "must be an object"),
        ('{"prompt": "a", "logit_bias": {"1_0": 1}}', "must be an object"),
        ('{"prompt": "a", "logit_bias": {"05": 1}}', "must be an object"),
        ('{"prompt": "a", "logit_bias": {"１": 1}}', "must be an object"),
        ('{"prompt": "a", "logit_bias": {"-1": 1}}', "must be an object"),
        ('{"prompt": "a", "logit_bias": {"1": "2"}}', "must be an object"),
        ('{"prompt": "a", "logit_bias": {"1": 1, "1": 2}}', "the key '1' is there twice"),
        ('{"prompt": "a", "prompt": "b"}', "the key 'prompt' is there twice"),
        ('{"messages": [{"role": "user", "role": "x", "content": "a"}]}', "the key 'role' is there twice"),
        ('{"prompt": "a", "temperature": NaN}', "NaN is not a finite number"),
        ('{"prompt": "a", "id": -Infinity}', "-Infinity is not a finite number"),
        ('{"prompt": "a", "id": 1e999}', "1e999 is not a finite number"),
        ('{"prompt": "a\\ud83d"}', "half of a surrogate pair"),
        ('{"prompt": "a"} {"prompt": "b"}', "not JSON: Extra data at column 17"),
        ('{"prompt": "a",}', "not JSON: .* at column 1[56]"),
        ("{'prompt': 'a'}", "not JSON"),
        ('["a"]', r'not a JSON object but \["a"\]'),
        (b'{"prompt": "\xff"}', "not UTF-8 at byte 13"),
        (100_000 * "[", "nested too deeply"),
    ],
)
def test_lines_are_refused(tmp_path: Path, line: str | bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=rf"\A[^\n]*requests\.jsonl:3: [^\n]*{reason}.*\n.*banned_tokens, .*top_k"):
        read(tmp_path, '{"prompt": "good"}', "", line)


def test_equal_ids_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r'requests\.jsonl:4: id="a" is the id of line 1, too'):
        read(tmp_path, '{"prompt": "x", "id": "a"}', '{"prompt": "x"}', '{"prompt": "x"}', '{"prompt": "y", "id": "a"}')
    assert len(read(tmp_path, '{"prompt": "x", "id": "1"}', '{"prompt": "x", "id": 1}')) == 2


def test_bad_lines_are_reported_together(tmp_path: Path) -> None:
    lines = ['{"prompt": "a"}', *['{"prompt": 1}'] * 10]
    with pytest.raises(ValueError, match="prompt=1") as caught:
        read(tmp_path, *lines)
    *reasons, advice = str(caught.value).split("\n")
    assert reasons == [
        f"{tmp_path}/requests.jsonl:{i}: prompt=1 must be a text that is not empty" for i in range(2, 12)
    ]
    assert '"messages"' in advice
    with pytest.raises(ValueError, match="prompt=1") as caught:
        read(tmp_path, *lines, "[]", "[]", "[]")
    assert str(caught.value).split("\n")[:-1] == [*reasons, "and 3 more"]


def test_no_requests(tmp_path: Path) -> None:
    for lines in ([], ["", " \r"]):
        with pytest.raises(ValueError, match=r"requests\.jsonl: holds no requests"):
            read(tmp_path, *lines)
    with pytest.raises(FileNotFoundError, match=r"absent\.jsonl: no such file"):
        read_requests(tmp_path / "absent.jsonl", PROGRAM)


# ---- writing ----


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
            answers.write({"text": f"ü{i}", "logprobs": [-0.5]})
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
        answers.write(answer(0))
        for bad, message in (
            ({"text": "a", "prompt": "b"}, r"\['prompt'\], which are keys of requests"),
            ({"text": "a", "seed": 1}, r"\['seed'\], which are keys of requests"),
            ({"logprobs": float("nan")}, r"partial: line 3 cannot be written"),
            ({"text": "\ud800"}, r"partial: line 3 cannot be written"),
        ):
            with pytest.raises(ValueError, match=message):
                answers.write(bad)
        answers.write(answer(1))
        with pytest.raises(ValueError, match="all 2 requests have their answers"):
            answers.write(answer(2))
    assert out.read_bytes() == expected(requests)


def test_the_file_appears_whole(tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = prompts(tmp_path, 3)
    events: list[str] = []
    real_fsync, real_replace = os.fsync, os.replace

    def fsync(descriptor: int) -> None:
        events.append(f"fsync of {os.fstat(descriptor).st_size} bytes")
        real_fsync(descriptor)

    def replace(source: Path, target: Path) -> None:
        events.append("replace")
        assert Path(source).read_bytes() == expected(requests)
        assert names(out.parent) == {"answers.jsonl.partial", Path(source).name}
        real_replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    (out.parent / "answers.jsonl.partial.copy").write_bytes(b"left over from a kill" * 100)
    run(out, requests)
    assert events == [f"fsync of {len(expected(requests))} bytes", "replace"]
    assert out.read_bytes() == expected(requests)
    assert names(out.parent) == {"answers.jsonl"}


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
    answers.write(answer(0))
    answers.write(answer(1))
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
        answers.write(answer(2))
        raise KeyboardInterrupt
    assert names(out.parent) == {"answers.jsonl.partial"}
    settings = dict(reversed(SETTINGS.items()))
    with contextlib.suppress(KeyboardInterrupt), AnswerFile(out, requests, settings) as answers:
        assert answers.done == 3
        answers.write(answer(3))
        answers.write(answer(4))
        raise KeyboardInterrupt
    assert out.read_bytes() == expected(requests)
    assert names(out.parent) == {"answers.jsonl"}


def test_every_cut_of_the_partial_file(tmp_path: Path, out: Path) -> None:
    requests = prompts(tmp_path, 3)
    partial = Path(f"{out}.partial")
    with AnswerFile(out, requests, SETTINGS) as answers:
        for i in range(3):
            answers.write(answer(i))
        whole = partial.read_bytes()
    header = json.loads(whole.split(b"\n")[0])
    assert header.keys() == {"phi3_jax_batch", "settings", "requests_sha256"}
    assert (header["phi3_jax_batch"], header["settings"]) == (1, SETTINGS)
    assert whole.endswith(out.read_bytes())
    for cut in range(len(whole) + 1):
        out.unlink()
        partial.write_bytes(whole[:cut])
        with AnswerFile(out, requests, SETTINGS) as answers:
            assert answers.done == max(whole[:cut].count(b"\n") - 1, 0)
            # The half line is gone even if this run is killed before it writes.
            assert partial.read_bytes() == whole[: max(whole.rfind(b"\n", 0, cut), whole.find(b"\n")) + 1]
            while answers.done < 3:
                answers.write(answer(answers.done))
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
        (lambda lines: [lines[0].replace(b": 1,", b": 2,"), *lines[1:]], "header is damaged, or of another version"),
        (lambda lines: [lines[0], lines[2]], "line 2 is damaged"),
        (lambda lines: [*lines[:2], b"\x00" * 20 + b"\n"], "line 3 is damaged"),
        (lambda lines: [*lines[:2], b"[]\n"], "line 3 is damaged"),
        (lambda lines: [*lines[:2], lines[2][: len(lines[2]) // 2] + b"\n"], "line 3 is damaged"),
        (lambda lines: [*lines, b'{"prompt": "p3 \xc3\xa9"}\n'], "line 5 is damaged"),
    ],
)
def test_damaged_and_foreign_files_are_left_alone(tmp_path: Path, out: Path, change: Any, message: str) -> None:
    requests = prompts(tmp_path, 3)
    partial = Path(f"{out}.partial")
    with AnswerFile(out, requests, SETTINGS) as answers:
        for i in range(3):
            answers.write(answer(i))
        lines = partial.read_bytes().splitlines(keepends=True)
    out.unlink()
    partial.write_bytes(b"".join(change(lines)))
    before = partial.read_bytes()
    with pytest.raises(ValueError, match=rf"answers\.jsonl\.partial: .*{message}.*delete"):
        AnswerFile(out, requests, SETTINGS)
    assert partial.read_bytes() == before


# ---- several processes, kills ----

# Says what it has written after each answer, so that the parent knows what has to survive.
WRITER = """
import random, sys, time
from phi3_jax.infer.batch_files import AnswerFile, read_requests
from phi3_jax.infer.sampling import Sampling
requests = read_requests(sys.argv[1], Sampling())
with AnswerFile(sys.argv[2], requests, {"seconds": sys.argv[3]}) as answers:
    print(answers.done, flush=True)
    while answers.done < len(requests):
        rng = random.Random(answers.done)
        answers.write({"text": rng.choice("aé€😀") * rng.randrange(20_000), "token_ids": [answers.done]})
        print(answers.done, flush=True)
        time.sleep(float(sys.argv[3]))
"""


@contextlib.contextmanager
def writer(source: Path, target: Path, seconds: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", WRITER, str(source), str(target), seconds]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def test_kills_at_random_moments(tmp_path: Path, out: Path) -> None:
    count, kills, longest = 503, 12, 0.08
    source = tmp_path / "requests.jsonl"
    prompts(tmp_path, count)
    rng = random.Random(3)
    done = 0
    for _ in range(kills):
        with writer(source, out, "0.002") as process:
            assert process.stdout is not None
            assert int(process.stdout.readline()) == done
            time.sleep(rng.uniform(0, longest))
            process.send_signal(signal.SIGKILL)
            said = process.stdout.read().split("\n")[:-1]
        assert process.returncode == -signal.SIGKILL
        assert names(out.parent) == {"answers.jsonl.partial"}
        before, done = done, Path(f"{out}.partial").read_bytes().count(b"\n") - 1
        # A write may have happened without a word on it, but not the other way round.
        assert done - max(map(int, said), default=before) in (0, 1)
    assert 0 < done < count
    for target in (out, tmp_path / "uninterrupted.jsonl"):
        with writer(source, target, "0.002") as process:
            process.communicate()
        assert process.returncode == 0
    assert out.read_bytes() == (tmp_path / "uninterrupted.jsonl").read_bytes()
    assert out.read_bytes().count(b"\n") == count
    assert names(out.parent) == {"answers.jsonl"}


def test_a_second_process_is_refused_and_a_kill_leaves_no_lock(tmp_path: Path, out: Path) -> None:
    requests = prompts(tmp_path, 5)
    with writer(tmp_path / "requests.jsonl", out, "1000") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "0\n"
        assert process.stdout.readline() == "1\n"
        before = Path(f"{out}.partial").read_bytes()
        with pytest.raises(ValueError, match=r"answers\.jsonl\.partial: another process is writing it"):
            AnswerFile(out, requests, SETTINGS)
        assert Path(f"{out}.partial").read_bytes() == before
        process.kill()
    Path(f"{out}.partial").unlink()
    with AnswerFile(out, requests, SETTINGS):
        with pytest.raises(ValueError, match="another process is writing it"):
            AnswerFile(out, requests, SETTINGS)
        AnswerFile(out.parent / "b.jsonl", requests, SETTINGS).__exit__()
    run(out, requests)
    assert out.read_bytes() == expected(requests)


@pytest.mark.parametrize("finished", [True, False])
def test_the_other_process_ends_between_open_and_lock(
    tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch, finished: bool
) -> None:
    requests = prompts(tmp_path, 2)
    real, calls = fcntl.flock, 0

    def flock(file: Any, operation: int) -> None:
        nonlocal calls
        if (calls := calls + 1) == 1:
            Path(f"{out}.partial").unlink()
            if finished:
                out.write_text("of the other process")
        real(file, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    if finished:
        with pytest.raises(ValueError, match="exists already"):
            AnswerFile(out, requests, SETTINGS)
        assert names(out.parent) == {"answers.jsonl"}
        assert out.read_text() == "of the other process"
    else:
        run(out, requests, stop_at=1)
        assert calls == 2
        assert names(out.parent) == {"answers.jsonl.partial"}


def test_the_partial_file_is_removed_while_it_is_written(tmp_path: Path, out: Path) -> None:
    requests = prompts(tmp_path, 2)
    with AnswerFile(out, requests, SETTINGS) as first:
        first.write(answer(0))
        Path(f"{out}.partial").unlink()
        second = AnswerFile(out, requests, SETTINGS)
        first.write(answer(1))
    assert out.read_bytes() == expected(requests)
    assert names(out.parent) == {"answers.jsonl", "answers.jsonl.partial"}
    second.__exit__()


# ---- full disks ----


def test_a_write_that_breaks_off(tmp_path: Path, out: Path) -> None:
    requests = prompts(tmp_path, 3)
    partial = Path(f"{out}.partial")
    with file_size_limit(50), pytest.raises(OSError, match=r"make room.*answers\.jsonl\.partial") as caught:
        AnswerFile(out, requests, SETTINGS)
    assert caught.value.errno == errno.EFBIG
    assert names(out.parent) == set()
    with AnswerFile(out, requests, SETTINGS) as answers:
        answers.write(answer(0))
        before = partial.read_bytes()
        with file_size_limit(len(before) + 10), pytest.raises(OSError, match=r"make room.*answers\.jsonl\.partial"):
            answers.write(answer(1))
        assert (answers.done, partial.read_bytes()) == (1, before)
        answers.write(answer(1))
    assert names(out.parent) == {"answers.jsonl.partial"}
    run(out, requests)
    assert out.read_bytes() == expected(requests)


def test_a_full_disk(tmp_path: Path) -> None:
    requests = prompts(tmp_path, 5)
    page = os.sysconf("SC_PAGE_SIZE")
    long = {"text": "é" * (page * 5 // 4)}  # 2.5 pages
    with small_disk(tmp_path / "disk", 8 * page) as disk:
        out = disk / "answers.jsonl"
        partial = Path(f"{out}.partial")

        def write_all(done: int) -> None:
            with AnswerFile(out, requests, SETTINGS) as answers:
                assert answers.done == done
                while answers.done < len(requests):
                    answers.write(long)

        for done in (0, 3):
            with pytest.raises(OSError, match=r"No space left.*make room.*answers\.jsonl\.partial") as caught:
                write_all(done)
            assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(partial))
            assert partial.read_bytes().count(b"\n") == 1 + 3
            assert partial.read_bytes().endswith(b"\n")
        # Room for all answers, but not for the copy.
        subprocess.run(["mount", "-o", f"remount,size={14 * page}", disk], check=True)
        for done in (3, 5):
            with pytest.raises(OSError, match=r"No space left.*all answers are in .*partial: run the same") as caught:
                write_all(done)
            assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(out))
            assert names(disk) == {"answers.jsonl.partial"}
        subprocess.run(["mount", "-o", f"remount,size={40 * page}", disk], check=True)
        write_all(5)
        lines = [json.loads(line) for line in out.read_bytes().splitlines()]
        assert lines == [{**request.fields, **long} for request in requests]
        assert names(disk) == {"answers.jsonl"}


@contextlib.contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Files cannot grow beyond it: the write that would gets half of its way, and the next fails (EFBIG)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextlib.contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Path]:
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if sys.platform != "linux" or os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("mounting a small disk takes root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


@contextlib.contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Root may write to every folder, but not to a disk that is mounted for reading."""
    if os.geteuid() == 0:
        command = ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(folder)]
        if sys.platform != "linux" or subprocess.run(command, capture_output=True).returncode != 0:
            pytest.skip("this root cannot mount")
        try:
            yield
        finally:
            subprocess.run(["umount", folder], check=True)
    else:
        folder.chmod(0o555)
        try:
            yield
        finally:
            folder.chmod(0o755)

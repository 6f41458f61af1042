"""phi3-generate's --input and --output: files of requests in both forms, and what becomes of an interrupted run."""

import dataclasses
import json
import math
import os
import random
import signal
import subprocess
import sys

import pytest
from absl import flags
from absl.testing import flagsaver
from cache_folders import own_cache
from generate_program import in_process
from spoiled import spoiled, with_bytes

import phi3_jax
from phi3_jax.infer import Options, generate
from phi3_jax.infer.programs import generate_main
from phi3_jax.infer.serving.batch import AnswerFile

PROMPT = "The capital of France is"


@pytest.fixture(scope="module", autouse=True)
def own_compilation_cache(tmp_path_factory):
    """The programs' compilation cache, apart from the user's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", own_cache(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def program(demo, monkeypatch, capfd):
    """Runs the program's `main` with the weights that are loaded already -> standard output."""
    return in_process(demo, monkeypatch, capfd)


LINES = [
    {"prompt": PROMPT, "id": "a"},
    {"messages": [{"role": "user", "content": "What is the capital of France?"}], "max_new_tokens": 20},
    {"prompt": "Once upon a time", "temperature": 1.0, "seed": 5},
    {"prompt": "Once upon a time", "temperature": 1.0},
    {"prompt": "Water boils at", "max_new_tokens": 3},
]


@pytest.fixture
def batch(tmp_path):
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    return ["--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out.jsonl"), "--max_new_tokens", "8"]


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_a_file_of_prompts(program, demo, batch, tmp_path):
    assert program(*batch, "--batch_size", "2", "--logprobs", "2", "--echo") == ""
    lines = lines_of(tmp_path / "out.jsonl")
    assert [{name: line[name] for name in original} for line, original in zip(lines, LINES, strict=True)] == LINES
    assert [line["text"] for line in lines[:2]] == [" Paris.\n\nThe answer is:", "The capital of France is Paris."]
    assert [line["finish_reason"] for line in lines] == ["length", "stop", "length", "length", "length"]
    (drawn,) = generate(demo, "Once upon a time", 8, temperature=1.0, seed=5, options=Options(logprobs=2, echo=True))
    assert lines[2]["token_ids"] == drawn.token_ids != lines[3]["token_ids"]
    assert [entry["logprob"] for entry in lines[2]["logprobs"]] == pytest.approx(
        [entry.logprob for entry in drawn.logprobs], abs=1e-3
    )
    assert [entry["token_id"] for entry in lines[2]["prompt_logprobs"]] == demo.tokenizer.encode("Once upon a time")
    assert len(lines[4]["token_ids"]) == 3


@pytest.mark.slow
def test_an_interrupted_file_goes_on(program, batch, tmp_path, monkeypatch):
    """Short answers end first, so what is there after the interrupt is not the file's beginning."""
    program(*batch)
    whole = (tmp_path / "out.jsonl").read_text()
    (tmp_path / "out.jsonl").unlink()
    real, answered = AnswerFile.write, []

    def second_answer_is_the_last(file, index, answer):
        real(file, index, answer)
        answered.append(index)
        if len(answered) == 2:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(AnswerFile, "write", second_answer_is_the_last)
    assert program(*batch, code=1) == ""
    assert len(lines_of(tmp_path / "out.jsonl.partial")) == 3  # a header and two answers
    program(*batch, "--batch_size", "2")
    assert (tmp_path / "out.jsonl").read_text() == whole
    assert sorted(answered) == [0, 1, 2, 3, 4]  # each once
    assert answered[0] == 4


API_LINES = [
    {
        "custom_id": "a",
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {
            "model": "demo",
            "messages": [{"role": "user", "content": "What is the capital of France?"}],
            "max_tokens": 20,
            "temperature": 0,
        },
    },
    {"custom_id": "b", "method": "POST", "url": "/v1/completions", "body": {"model": "demo", "max_tokens": 4}},
]


@pytest.mark.slow
def test_a_file_in_openais_form(program, tmp_path, capfd):
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in API_LINES))
    program("--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out.jsonl"), code=1)
    chat, bad = lines_of(tmp_path / "out.jsonl")
    assert (chat["custom_id"], bad["custom_id"]) == ("a", "b")
    assert chat["response"]["body"]["choices"][0]["message"]["content"] == "The capital of France is Paris."
    assert bad["response"]["status_code"] == 400
    with pytest.raises(ValueError, match=r"in\.jsonl:1: in OpenAI's form a line's body says this: leave --chat and --"):
        program("--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "o"), "--chat", "--temperature", "1")


def test_beam_search_refuses_lines_that_want_to_draw(program, batch):
    with pytest.raises(ValueError, match=r"in\.jsonl:3: beam search has no seed, temperature"):
        program(*batch, "--beams", "2")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"prompt": "x", "banned_tokens": [49152]}, "in.jsonl:6: row 0 names tokens"),
        ({"prompt": "word " * 9000}, r"in.jsonl:6 has 9\d+ tokens, which leaves no room"),
        ({"prompt": "x", "temprature": 1}, "in.jsonl:6: "),
    ],
)
def test_a_bad_line_is_found_before_anything_runs(program, batch, tmp_path, line, message):
    with open(tmp_path / "in.jsonl", "a") as file:
        file.write(json.dumps(line) + "\n")
    with pytest.raises(ValueError, match=message):
        program(*batch)
    assert not list(tmp_path.glob("out*"))


@pytest.mark.slow
def test_answers_that_end_with_an_error(tiny, program, monkeypatch, tmp_path, capfd):
    """One prompt: an error, so exit code 1. A file: its line says so, the others are answered, and exit code 1."""
    small = with_bytes(tiny, tmp_path)
    (dog,) = set(small.tokenizer.encode("dog")) - set(small.tokenizer.encode("the cat"))
    monkeypatch.setattr(phi3_jax, "load", lambda *_, **__: spoiled(small, "embed_tokens", (dog, 0), math.nan))
    with pytest.raises(ValueError, match="not finite numbers: the weights may be damaged"):
        program("--prompt", "the dog")
    lines = [{"prompt": "the cat"}, {"prompt": "the dog"}, {"prompt": "cat", "banned_tokens": list(range(311))}]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    batch = ["--input", str(tmp_path / "in.jsonl"), "--max_new_tokens", "2", "--logprobs", "0"]
    for beams in ([], ["--beams", "2"]):
        if beams:
            (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines[:2]))
            batch = batch[:4]
        with flagsaver.flagsaver():
            flags.FLAGS(["phi3-generate", *batch, "--output", str(tmp_path / f"out{len(beams)}.jsonl"), *beams])
            assert generate_main.main() == 1
        assert f"{1 if beams else 2} of {2 if beams else 3} answers ended with an error" in capfd.readouterr().err
        written = lines_of(tmp_path / f"out{len(beams)}.jsonl")
        assert [line["finish_reason"] for line in written] == ["length", "error", "error"][: len(written)]
        assert "error" not in written[0]
        assert "not finite" in written[1]["error"]
        assert [line["token_ids"] for line in written[1:]] == [[]] * (len(written) - 1)
        assert "null" not in (tmp_path / f"out{len(beams)}.jsonl").read_text()
    assert "no token to pick" in lines_of(tmp_path / "out0.jsonl")[2]["error"]


def run_program(*args: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "phi3_jax.infer.programs.generate_main", *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=240)


@pytest.mark.slow
def test_a_file_of_mixed_prompts_compiles_nine_programs(tiny, tmp_path, monkeypatch):
    """A hundred ragged lines, drawn and greedy, with a stop string; at the end fewer are written at a time."""
    small, rng = with_bytes(tiny, tmp_path), random.Random(3)
    config = dataclasses.replace(small.config, max_position_embeddings=4096, num_hidden_layers=1)
    small = dataclasses.replace(small, config=config, params=phi3_jax.random_params(config))
    phi3_jax.save(small, tmp_path / "model")
    lines = [
        {
            "prompt": "".join(rng.choices("abcdefgh ", k=min(2000, int(rng.lognormvariate(4, 1.7)) + 1))),
            "max_new_tokens": min(500, int(rng.lognormvariate(3, 1.3)) + 1),
            "temperature": rng.choice((0, 0.8)),
        }
        for _ in range(100)
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.setenv("JAX_LOG_COMPILES", "1")
    files = ["--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out.jsonl"), "--batch_size", "8"]
    done = run_program("--checkpoint", str(tmp_path / "model"), *files, "--stop", "\n", "--cache_dtype", "float32")
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(lines_of(tmp_path / "out.jsonl")) == 100
    counts = {name: done.stderr.count(f"Compiling jit({name})") for name in ("read", "answer", "decode")}
    assert counts["answer"] == 1
    assert counts["decode"] == 4  # for 8, 4, 2 and 1 rows
    assert 3 <= counts["read"] <= 4

"""phi3-generate's --input and --output: files of requests in both forms, and what becomes of an interrupted run."""

import json
import math
import os
import random
import signal
from collections import Counter

import jax
import pytest
from absl import flags
from absl.testing import flagsaver
from chats import small_chat
from generate_program import in_process
from spoiled import spoiled, with_bytes

import phi3_jax
from phi3_jax import encode_chat
from phi3_jax.infer import Options, Sampling, generate
from phi3_jax.infer.programs import generate_main
from phi3_jax.infer.serving.batch import AnswerFile

PROMPT = "The capital of France is"
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def small(tiny, tmp_path_factory):
    """A tiny model with a token for each character, and a template for chats."""
    return small_chat(tiny, tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def program(small, monkeypatch, capfd):
    """Runs the program's `main` with the weights that are loaded already -> standard output."""
    return in_process(small, monkeypatch, capfd)


LINES = [
    {"prompt": PROMPT, "id": "a"},
    {"messages": QUESTION, "max_new_tokens": 20},
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
def test_a_file_of_prompts(program, small, batch, tmp_path):
    """Each answer is that of its line alone."""
    assert program(*batch, "--batch_size", "2", "--logprobs", "2", "--echo") == ""
    lines = lines_of(tmp_path / "out.jsonl")
    assert [{name: line[name] for name in original} for line, original in zip(lines, LINES, strict=True)] == LINES
    options = Options(logprobs=2, echo=True, prefill_chunk=128)
    for index, line in enumerate(lines):
        ids = small.tokenizer.encode(line["prompt"]) if "prompt" in line else encode_chat(small.tokenizer, QUESTION)
        sampling = Sampling(temperature=line.get("temperature", 0), seed=line.get("seed", index))
        (alone,) = generate(small, ids, line.get("max_new_tokens", 8), sampling=sampling, options=options)
        assert (line["text"], line["token_ids"]) == (alone.text, alone.token_ids)
        assert line["finish_reason"] == alone.finish_reason
        for name in ("logprobs", "prompt_logprobs"):
            found, expected = line[name], getattr(alone, name)
            assert [entry["token_id"] for entry in found] == [entry.token_id for entry in expected]
            numbers = [entry.logprob for entry in expected if entry.logprob is not None]
            assert [each for entry in found if (each := entry["logprob"]) is not None] == pytest.approx(
                numbers, abs=1e-3
            )
    assert lines[2]["token_ids"] != lines[3]["token_ids"]
    assert len(lines[4]["token_ids"]) == 3


@pytest.mark.slow
def test_an_interrupted_file_goes_on(program, batch, tmp_path, monkeypatch):
    """Short answers end first, so what is there after the interrupt is not the file's beginning."""
    batch = [*batch, "--max_new_tokens", "100", "--min_new_tokens", "100"]  # more than a call of the loop writes
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
    assert sorted(answered[:2]) == [1, 4]


API_LINES = [
    {
        "custom_id": "a",
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {
            "model": "demo",
            "messages": QUESTION,
            "max_tokens": 20,
            "temperature": 0,
        },
    },
    {"custom_id": "b", "method": "POST", "url": "/v1/completions", "body": {"model": "demo", "max_tokens": 4}},
]


@pytest.mark.slow
def test_a_file_in_openais_form(program, small, tmp_path):
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in API_LINES))
    program("--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out.jsonl"), code=1)
    chat, bad = lines_of(tmp_path / "out.jsonl")
    assert (chat["custom_id"], bad["custom_id"]) == ("a", "b")
    (alone,) = generate(small, encode_chat(small.tokenizer, QUESTION), 20, options=Options(prefill_chunk=128))
    assert chat["response"]["body"]["choices"][0]["message"]["content"] == alone.text
    assert bad["response"]["status_code"] == 400
    with pytest.raises(ValueError, match=r"in\.jsonl:1: in OpenAI's form a line's body says this: leave --chat and --"):
        program("--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "o"), "--chat", "--temperature", "1")


@pytest.mark.filterwarnings("ignore:.*drops tools")
def test_a_grammar_that_cannot_be_used_is_found_before_anything_runs(program, batch, tmp_path):
    with pytest.raises(ValueError, match=r"in\.jsonl:1: .*regex"):
        program(*batch, "--regex", "(")
    function = {"name": "f", "parameters": {"type": "object", "properties": {"a": {"type": "string", "pattern": "("}}}}
    line = {"messages": QUESTION, "tools": [{"type": "function", "function": function}]}
    (tmp_path / "in.jsonl").write_text(json.dumps(line))
    with pytest.raises(ValueError, match=r"in\.jsonl:1: "):
        program(*batch, "--tool_choice", "required")
    assert not list(tmp_path.glob("out*"))


def test_flags_that_contradict_one_another_are_refused(program, batch, tmp_path):
    with pytest.raises(ValueError, match="give only one of --regex, --tool_choice"):
        program(*batch, "--regex", "a+", "--tool_choice", "required")
    with pytest.raises(ValueError, match="--ray= names no cluster"):
        program(*batch, "--ray", "")
    assert not list(tmp_path.glob("out*"))


def test_beam_search_refuses_lines_that_want_to_draw(program, batch):
    with pytest.raises(ValueError, match=r"in\.jsonl:3: beam search has no seed, temperature"):
        program(*batch, "--beams", "2")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"prompt": "x", "banned_tokens": [97]}, r"in.jsonl:6: it names tokens \[97\] outside of the vocabulary of 97"),
        ({"prompt": "word " * 120}, r"in.jsonl:6 has 600 tokens, which leaves no room"),
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
def test_answers_that_end_with_an_error(small, program, monkeypatch, tmp_path, capfd):
    """One prompt: an error, so exit code 1. A file: its line says so, the others are answered, and exit code 1."""
    dog = small.tokenizer.encode("d")[-1]
    monkeypatch.setattr(phi3_jax, "load", lambda *_, **__: spoiled(small, "embed_tokens", (dog, 0), math.nan))
    with pytest.raises(ValueError, match="not finite numbers: the weights may be damaged"):
        program("--prompt", "the dog")
    lines = [{"prompt": "the cat"}, {"prompt": "the dog"}, {"prompt": "cat", "banned_tokens": list(range(97))}]
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


@pytest.mark.slow
def test_a_file_of_mixed_prompts_compiles_eight_programs(tiny, tmp_path, monkeypatch, capfd, caplog):
    """Ragged lines, drawn and greedy, with a stop string; at the end fewer are written at a time."""
    rng = random.Random(3)
    model = with_bytes(tiny, tmp_path, max_position_embeddings=4096, num_hidden_layers=1)
    lines = [
        {
            "prompt": "".join(rng.choices("abcdefgh ", k=min(2000, int(rng.lognormvariate(4, 1.7)) + 1))),
            "max_new_tokens": min(500, int(rng.lognormvariate(3, 1.3)) + 1),
            "temperature": rng.choice((0, 0.8)),
        }
        for _ in range(24)
    ]
    lines += [{"prompt": "last", "max_new_tokens": 2000, "min_new_tokens": 2000, "banned_tokens": [3 + 0x0A]}]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    files = ["--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out.jsonl"), "--batch_size", "8"]
    with jax.log_compiles():
        in_process(model, monkeypatch, capfd)(*files, "--stop", "\n", "--cache_dtype", "float32")
    assert len(lines_of(tmp_path / "out.jsonl")) == len(lines)
    counts = Counter(record.getMessage().partition(" with ")[0] for record in caplog.records)
    assert counts["Compiling jit(answer)"] == 1
    assert counts["Compiling jit(decode)"] == 3  # for 8, 4 and 2 rows; packed weights have one for 1, too
    assert 3 <= counts["Compiling jit(read)"] <= 4

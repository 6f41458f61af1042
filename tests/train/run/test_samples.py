"""Sample answers of a run: what the model says, without a change of the run."""

import csv
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import without_cache
from templates import DROPS_SYSTEM, PHI4, PHI4_MINI, SPECIALS, small_tokenizer
from training_runs import tensors, write_model, write_run

import phi3_jax
from phi3_jax import infer
from phi3_jax.train.data import prepare
from phi3_jax.train.run.loop import train
from phi3_jax.train.run.observer import Observer
from phi3_jax.train.run.records.metrics import TIMES, read
from phi3_jax.train.run.samples import Sampler, asked, encode_prompts, read_prompts
from phi3_jax.train.settings import Settings
from phi3_jax.train.step import start


@pytest.fixture(scope="module", autouse=True)
def _quick_compilation() -> Iterator[None]:
    """For all of the file: runs are compared bit for bit, and have to be compiled in one way."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> phi3_jax.Checkpoint:
    return phi3_jax.load(write_model(tmp_path_factory.mktemp("model") / "small"))


class Heard(Observer):
    """Keeps the samples and notes, counts what is compiled for samples, and interrupts after some steps."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.samples: list[tuple[int, str, str]] = []
        self.notes: list[str] = []
        self.compiled: list[int] = []
        self._count, self._before, self._left = 0, 0, stop_after

    def __enter__(self) -> "Heard":
        jax.monitoring.register_event_duration_secs_listener(self._listen)
        return self

    def __exit__(self, *_: object) -> None:
        jax.monitoring.unregister_event_duration_listener(self._listen)

    def _listen(self, name: str, seconds: float, **_: Any) -> None:
        self._count += name == "/jax/core/compile/backend_compile_duration"

    def progress(self, what: str, done: int, total: int) -> None:
        if what == "answering sample prompts":
            if done == 0:
                self._before = self._count
            else:
                self.compiled.append(self._count - self._before)

    def note(self, text: str) -> None:
        self.notes.append(text)

    def sample(self, step: int, prompt: str, answer: str) -> None:
        self.samples.append((step, prompt, answer))

    def interrupt(self) -> bool:
        if self._left is not None:
            self._left -= 1
        return self._left == 0


def untimed(folder: Path) -> list[dict[str, Any]]:
    records = read(folder / "metrics.jsonl")
    return [{name: value for name, value in record.items() if name not in TIMES} for record in records]


def greedy_text(checkpoint: phi3_jax.Checkpoint, question: str) -> str:
    """Token after token through the whole model, up to the end token."""
    prompt = phi3_jax.encode_chat(checkpoint.tokenizer, [{"role": "user", "content": question}])
    ids: list[int] = []
    while len(ids) < 48 and not {*ids} & {*checkpoint.generation.eos_token_ids}:
        ids.append(int(without_cache.logits(checkpoint, prompt + ids)[-1].argmax()))
    return checkpoint.tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.slow
def test_a_run_shows_what_it_does_at_each_evaluation(tmp_path, monkeypatch):
    """Also where nothing is held out; the curve is there before the end."""
    (tmp_path / "ask.txt").write_text("1+2\n3+4\n")
    settings = write_run(
        tmp_path, samples=1, sample_prompts=str(tmp_path / "ask.txt"), steps=3, eval_every=2, trackers=("csv",)
    )
    settings = dataclasses.replace(settings, eval_file="")
    drawn: list[int] = []

    def generate(_: Any, prompts: Any, count: int) -> list[infer.Generation]:
        path = tmp_path / "run" / "loss.png"
        drawn.append(path.stat().st_mtime_ns if path.exists() else 0)
        return [infer.Generation(f"the answer to {len(prompt)} tokens", [5], "stop") for prompt in prompts]

    monkeypatch.setattr(infer, "generate", generate)
    with Heard() as heard:
        train(settings, heard)
    assert heard.samples == [(step, q, "the answer to 6 tokens") for step in (0, 2, 3) for q in ("1+2", "3+4")]
    lines = read(tmp_path / "run" / "samples.jsonl")
    assert [tuple(line.values()) for line in lines] == heard.samples
    assert 0 == drawn[0] < drawn[1] < drawn[2] < (tmp_path / "run" / "loss.png").stat().st_mtime_ns
    records = read(tmp_path / "run" / "metrics.jsonl")
    assert [record["passes"] for record in records] == [step * 4 / 20 for step in (1, 2, 3)]
    with (tmp_path / "run" / "metrics.csv").open(newline="") as file:
        rows = [{name: float(cell) for name, cell in row.items()} for row in csv.DictReader(file)]
    assert rows == records


@pytest.fixture(scope="module")
def with_samples(tmp_path_factory: pytest.TempPathFactory) -> tuple[Settings, Heard]:
    """A run that is interrupted after step 3, whose next steps are done again."""
    folder = tmp_path_factory.mktemp("samples")
    settings = write_run(folder, samples=2, trackers=("csv",), save_every=3)
    with Heard(stop_after=3) as heard:
        assert train(settings, heard, heard.interrupt).step == 3
        assert (folder / "run" / "loss.png").exists()
        with (folder / "run" / "samples.jsonl").open("a") as file:
            file.write('{"step": 6, "prompt": "of a run", "answer": "that was killed"}\n{"step": 6, "pro')
        train(settings, heard)
    return settings, heard


@pytest.mark.slow
def test_answers_are_those_of_the_model_after_the_step(with_samples):
    settings, heard = with_samples
    questions = []
    for line in Path(settings.eval_file).read_text().splitlines():
        question = json.loads(line)["messages"][0]["content"]
        questions += [] if question in questions else [question]
    lines = read(Path(settings.output) / "samples.jsonl")
    assert [(each["step"], each["prompt"]) for each in lines] == [(s, q) for s in (0, 3, 6, 7) for q in questions[:2]]
    assert [tuple(each.values()) for each in lines] == heard.samples
    before = phi3_jax.load(settings.checkpoint)
    after = phi3_jax.load(settings.checkpoint, adapter=Path(settings.output) / "adapter")
    told = {(step, prompt): answer for step, prompt, answer in heard.samples}
    for question in questions[:2]:
        assert told[0, question] == greedy_text(before, question)
        assert told[7, question] == greedy_text(after, question)
    assert any(told[0, question] != told[7, question] for question in questions[:2])


@pytest.mark.slow
def test_samples_and_trackers_change_nothing(with_samples, tmp_path):
    settings, heard = with_samples
    plain = dataclasses.replace(settings, samples=0, trackers=(), output=str(tmp_path / "run"))
    train(plain)
    ours, theirs = (tensors(Path(each.output) / "adapter") for each in (settings, plain))
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)
    assert untimed(Path(settings.output)) == untimed(tmp_path / "run")
    assert not (tmp_path / "run" / "samples.jsonl").exists()
    # Each of the two processes' runs compiles at its first samples; what lengths need is there after the second.
    assert heard.compiled[0] > 0
    assert heard.compiled[2:] == [0, 0]


@pytest.mark.parametrize(
    "changes",
    [
        {"train": "all"},
        {"quantize": "int4", "lora_targets": ("down_proj",)},
        pytest.param({"dtype": "bfloat16", "dora": True}, marks=pytest.mark.slow),
        pytest.param({"train": "all", "method": "dpo", "pack": False}, marks=pytest.mark.slow),
    ],
)
def test_no_weights_are_copied(changes, checkpoint, monkeypatch):
    """What is generated with are the arrays of the state and of the base themselves."""
    settings = Settings(compute_dtype="bfloat16", lora_rank=3, **changes)
    if settings.quantize:
        checkpoint = phi3_jax.load(checkpoint.folder, quantize=settings.quantize, layout="rows")
    state, frozen = start(settings, checkpoint.config, checkpoint.params)
    seen: list[Any] = []

    def generate(checkpoint: phi3_jax.Checkpoint, prompts: Any, count: int) -> list[infer.Generation]:
        seen.append(checkpoint.params)
        assert prompts == [[1, 2]]
        return [infer.Generation("an answer", [5], "stop")]

    monkeypatch.setattr(infer, "generate", generate)
    sampler = Sampler(settings, checkpoint, [[1, 2]], None, Observer())
    assert sampler.answer(frozen, state) == [(checkpoint.tokenizer.decode([1, 2]), "an answer")]
    same = {id(leaf) for leaf in jax.tree.leaves((state.trainable, frozen))}
    large = [leaf for leaf in jax.tree.leaves(seen[0]) if leaf.size > 1000]
    others = [leaf for leaf in large if id(leaf) not in same]
    # An adapter of bfloat16 weights is converted as it is in the step.
    assert all(leaf.size < 3 * 3 * 80 for leaf in others)
    assert len(large) > 3


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (ValueError("prompt 0 fills the context\nand more"), "prompt 0 fills the context"),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 9 GB"), "RESOURCE_EXHAUSTED: 9 GB"),
    ],
)
def test_a_run_goes_on_without_what_is_impossible(error, told, checkpoint, monkeypatch):
    state, frozen = start(Settings(), checkpoint.config, checkpoint.params)

    def generate(*_: Any) -> None:
        raise error

    monkeypatch.setattr(infer, "generate", generate)
    with Heard() as heard:
        sampler = Sampler(Settings(), checkpoint, [[1, 2]], None, heard)
        assert sampler.answer(frozen, state) == sampler.answer(frozen, state) == []
    assert heard.notes == [f"no sample answers, and the run goes on without them: {told}"]


# ---------------------------------------------------------------- prompts

TEXT = {"text": "Once upon a time"}
CHAT = {"messages": [{"role": "user", "content": "2+2"}, {"role": "assistant", "content": "4"}]}
PLAIN = {"prompt": "2+2=", "completion": "4"}


def encoded(
    checkpoint: phi3_jax.Checkpoint, folder: Path, name: str, content: str, trained: dict[str, Any]
) -> list[list[int]]:
    (folder / name).write_text(content)
    (folder / "train.jsonl").write_text("not JSON\n" + json.dumps(trained) + "\n")
    settings = Settings(train_file=str(folder / "train.jsonl"), sample_prompts=str(folder / name), samples=1)
    return encode_prompts(read_prompts(settings), checkpoint, settings)


@pytest.mark.parametrize(
    ("name", "content", "trained", "expected"),
    [
        ("a.txt", "3+4\n\n 5+6 \n", CHAT, ["<|user|>3+4<|end|><|assistant|>", "<|user|>5+6<|end|><|assistant|>"]),
        ("a.txt", "3+4\n5+6", PLAIN, ["<s>3+4", "<s>5+6"]),
        ("a.txt", "{x} is\n", TEXT, ["<s>{x} is"]),
        ("a.txt", json.dumps({"prompt": "3+4"}), CHAT, ["<s>3+4"]),
        (
            "a.json",
            json.dumps([CHAT, {"prompt": "3+4"}], indent=1),
            TEXT,
            ["<|user|>2+2<|end|><|assistant|>", "<s>3+4"],
        ),
        ("a.csv", "prompt\n3+4\n", CHAT, ["<s>3+4"]),
        ("a.jsonl", json.dumps({"prompt": CHAT["messages"][:1]}), TEXT, ["<|user|>2+2<|end|><|assistant|>"]),
        (
            "a.txt",
            f"{json.dumps(CHAT)}\n{json.dumps(PLAIN)}\n{json.dumps({'instruction': 'Add', 'output': '4'})}",
            TEXT,
            ["<|user|>2+2<|end|><|assistant|>", "<s>2+2=", "<|user|>Add<|end|><|assistant|>"],
        ),
    ],
)
def test_a_file_of_prompts(name, content, trained, expected, checkpoint, tmp_path):
    found = encoded(checkpoint, tmp_path, name, content, trained)
    assert [checkpoint.tokenizer.decode(ids) for ids in found] == expected


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "\n \n", r"a\.txt: it has 0 prompts; give 1 to 64, one in each line$"),
        ("a.txt", "x\n" * 65, r"a\.txt: it has 65 prompts; give 1 to 64"),
        ("a.jsonl", '{"prompt": "x"\n', r"a\.jsonl, line 1: it is not JSON "),
        ("a.txt", '{"prompt": "x"}\n\ny\n', r"a\.txt, line 3: it is not JSON .*write one whole object on each"),
        ("a.jsonl", "[1]", r"a\.jsonl, line 1: it is JSON but not an object"),
        ("a.jsonl", "", r"a\.jsonl: it has 0 prompts"),
        ("a.jsonl", json.dumps(TEXT), r"a\.jsonl, line 1: it has no prompt, only a text$"),
        ("a.jsonl", json.dumps({"messages": CHAT["messages"][1:]}), r"line 1: it has no message that could be answer"),
        ("a.jsonl", json.dumps({"question": "x"}), r"line 1: it has the fields \['question'\]; method=sft needs "),
        ("a.txt", "x" * 70, r"a\.txt: a prompt has \d\d tokens, which leaves no room .* context of 64; shorten it$"),
    ],
)
def test_prompts_that_cannot_be_asked(name, content, message, checkpoint, tmp_path):
    with pytest.raises(ValueError, match=message):
        encoded(checkpoint, tmp_path, name, content, TEXT)


@pytest.mark.parametrize(
    ("lines", "changes", "expected"),
    [
        ([CHAT, CHAT, {"messages": [{"role": "user", "content": "7+1"}, CHAT["messages"][1]]}], {}, ["2+2", "7+1"]),
        ([TEXT, PLAIN, {"text": "x" * 60}], {"sequence_length": 40}, ["2+2="]),
        ([CHAT], {"loss_on": "all"}, []),
        (
            [{"prompt": "a b", "chosen": " c", "rejected": " d"}, {"prompt": "e", "chosen": "f g", "rejected": "h"}],
            {"method": "dpo", "pack": False},
            ["a b", "e"],
        ),
    ],
)
def test_prompts_of_held_out_data(lines, changes, expected, checkpoint, tmp_path):
    settings = Settings(**{"samples": 2, "sequence_length": 30, **changes})
    path = tmp_path / "eval.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    held_out = prepare(path, checkpoint.tokenizer, settings, tmp_path / "data")
    assert Sampler(settings, checkpoint, [], held_out, Observer())._asked == expected


@pytest.mark.parametrize("template", [PHI4_MINI, PHI4, DROPS_SYSTEM])
def test_what_is_asked_is_shown_without_the_template(template):
    tokenizer = small_tokenizer(template, *SPECIALS[:-1], "<|im_sep|>", "<|im_end|>")
    messages = [
        {"role": "user", "content": "1+1"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "3+4\n5"},
    ]
    assert asked(tokenizer, phi3_jax.encode_chat(tokenizer, messages)) == "3+4\n5"
    assert asked(tokenizer, tokenizer.encode("plain text")) == "plain text"

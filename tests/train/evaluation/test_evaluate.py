"""Evaluation against the obvious computation: every token by a run of the model on what stands before it."""

import dataclasses
import functools
import json
import math
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import without_cache
from spoiled import spoiled
from templates import PHI4_MINI, small_tokenizer
from training_runs import CONFIG, write_data, write_model, write_run

import phi3_jax
from phi3_jax.infer import Options, generate
from phi3_jax.kernels import why_unavailable
from phi3_jax.train.data import Text
from phi3_jax.train.evaluation import score as scoring
from phi3_jax.train.evaluation.evaluate import (
    Accuracy,
    HeldOutLoss,
    Perplexity,
    accuracy,
    continuation,
    held_out_loss,
    perplexity,
    windows,
)
from phi3_jax.train.evaluation.files import Question, read_data, read_questions, read_texts
from phi3_jax.train.evaluation.score import Request, score
from phi3_jax.train.run.loop import train
from phi3_jax.train.run.observer import Observer

pytestmark = pytest.mark.usefixtures("quick_compilation")
TEXT = (
    "Es war einmal ein kleines Mädchen, dem war Vater und Mutter gestorben, und es war so arm, daß es kein Kämmerchen"
)
QUESTIONS = [
    Question("2+2 is", ("4", "five", "so much that nobody knows it"), 0),
    Question("", ("yes", "no"), 1),
    Question("Who said so? ", ("he", "she", "they all", "nobody"), 2),
]


@pytest.fixture(scope="module")
def model() -> phi3_jax.Checkpoint:
    return phi3_jax.Checkpoint(
        CONFIG, phi3_jax.random_params(CONFIG), small_tokenizer(PHI4_MINI), phi3_jax.GenerationSettings()
    )


def logprob(model: phi3_jax.Checkpoint, ids: list[int], place: int) -> float:
    """Of the token at a place, after all those before it. LongRoPE goes by the length of the whole text."""
    row = np.asarray(without_cache.logits(model, ids)[place - 1], np.float64)
    return float(row[ids[place]] - math.log(np.exp(row).sum()))


def test_scores_of_many_lengths(model, monkeypatch):
    monkeypatch.setattr(scoring, "_LOGITS", 32)  # so that there are several chunks
    monkeypatch.setattr(scoring, "_BATCH_TOKENS", 64)
    rng = np.random.default_rng(0)
    requests = [
        Request(rng.integers(0, 263, n).tolist(), begin) for n, begin in [(5, 2), (40, 0), (17, 16), (1, 0), (33, 9)]
    ]
    told: list[tuple[int, int]] = []
    scores = score(model, requests, lambda done, total: told.append((done, total)))
    for request, found in zip(requests, scores, strict=True):
        places = range(max(1, request.begin), len(request.ids))
        expected = [logprob(model, list(request.ids), place) for place in places]
        np.testing.assert_allclose(found.logprobs, expected, atol=2e-4)
        best = [int(without_cache.logits(model, request.ids)[place - 1].argmax()) for place in places]
        assert found.greedy == (best == [request.ids[place] for place in places])
    assert told[-1] == (5, 5)
    # An answer that the model would give itself.
    ids = [5, 9, 100]
    ids += without_cache.greedy(model, ids, 4, lambda n: 7)
    assert score(model, [Request(ids, 3), Request([*ids[:-1], (ids[-1] + 1) % 263], 3)])[0].greedy


def test_windows_are_those_of_transformers_guide():
    """The loop of https://huggingface.co/docs/transformers/perplexity, in words of its own."""
    for count, window, stride in ((50, 16, 5), (16, 16, 3), (3, 16, 8), (47, 10, 9), (1, 4, 2)):
        found = list(windows(range(count), window, stride))
        reached = 0
        for number, request in enumerate(found):
            first, last = number * stride, min(number * stride + window, count)
            assert list(request.ids) == list(range(first, last))
            assert first + request.begin == reached
            reached = last
        assert reached == count
        # Only the last one ends at the end.
        assert all(request.ids[-1] < count - 1 for request in found[:-1])


def test_perplexity(model):
    window, stride = 20, 7
    texts = [TEXT, "kurz", "", TEXT[:19]]
    total, count = 0.0, 0
    for text in texts[:2] + texts[3:]:
        ids = model.tokenizer.encode(text)
        for place in range(1, len(ids)):
            # The first window that has the token.
            begin = 0 if place < window else stride * math.ceil((place - window + 1) / stride)
            total -= logprob(model, ids[begin : begin + window], place - begin)
            count += 1
    size = sum(len(text.encode()) for text in texts)
    found = perplexity(model, texts, window, stride)
    assert found.tokens == count
    assert found.loss == pytest.approx(total / count, abs=1e-5)
    assert found.perplexity == pytest.approx(math.exp(total / count), rel=1e-5)
    assert found.bits_per_byte == pytest.approx(total / size / math.log(2), abs=1e-5)
    # By default the whole context of 64, and half of it.
    assert perplexity(model, texts) == perplexity(model, texts, 64, 32)


def test_learned_tokens_of_data_as_for_training(model, tmp_path):
    """Two answers of a chat, and a completion: each token by a run on what stands before it."""
    asked, said = [{"role": "user", "content": "ab"}], {"role": "assistant", "content": "cde"}
    more = [*asked, said, {"role": "user", "content": "f"}]
    path = tmp_path / "data.jsonl"
    lines = [{"messages": [*more, {"role": "assistant", "content": "gh"}]}, {"prompt": "2+2=", "completion": "4"}]
    path.write_text("\n".join(map(json.dumps, lines)))
    tokenizer = model.tokenizer
    chat, end = phi3_jax.encode_chat(tokenizer, more), 261  # <|end|>
    first, prompt = phi3_jax.encode_chat(tokenizer, asked), tokenizer.encode("2+2=")
    # The template ends with eos, which is not learned; the 17th token, it takes the text across LongRoPE's border.
    ids = [*chat, *tokenizer.encode("gh", add_bos=False), end, tokenizer.eos_id]
    assert len(ids) == CONFIG.long_rope.original_max_position_embeddings + 1
    places = [*range(len(first), len(first) + 4), *range(len(chat), len(ids) - 1)]
    assert ids[len(first) + 3] == end
    other = [*prompt, *tokenizer.encode("4", add_bos=False), tokenizer.eos_id]
    expected = [logprob(model, ids, place) for place in places]
    expected += [logprob(model, other, place) for place in range(len(prompt), len(other))]
    found = held_out_loss(model, read_data(path, tokenizer, 64))
    assert found.tokens == len(expected) == 9
    assert found.loss == pytest.approx(-np.mean(expected), abs=1e-5)
    assert found.perplexity == math.exp(found.loss)
    for text, message in (("\n{}", r"line 2: it has the fields \[\]"), ("\n", "there are no lines in it")):
        path.write_text(text)
        with pytest.raises(ValueError, match=rf"data\.jsonl[,:] {message}"):
            read_data(path, tokenizer, 64)
    with pytest.raises(ValueError, match="no text has tokens that training would learn"):
        held_out_loss(model, [])


def test_accuracy(model):
    right = right_normalised = 0
    for question in QUESTIONS:
        sums, means = [], []
        for choice in question.choices:
            stem = question.context.rstrip()
            ids = model.tokenizer.encode(stem + question.context[len(stem) :] + " " + choice)
            begin = len(model.tokenizer.encode(stem))
            sums.append(sum(logprob(model, ids, place) for place in range(begin, len(ids))))
            means.append(sums[-1] / len(choice))
        right += sums.index(max(sums)) == question.answer
        right_normalised += means.index(max(means)) == question.answer
    found = accuracy(model, QUESTIONS)
    assert (found.questions, found.accuracy, found.accuracy_normalised) == (3, right / 3, right_normalised / 3)
    assert found.standard_error == pytest.approx(math.sqrt(right / 3 * (1 - right / 3) / 2))
    # Every choice in its turn as the answer: exactly one is the likeliest.
    turns = [Question(QUESTIONS[2].context, QUESTIONS[2].choices, i) for i in range(4)]
    assert accuracy(model, turns).accuracy == 0.25


def test_continuations(model):
    tokenizer = model.tokenizer
    ids = tokenizer.encode("ab  cd")
    assert continuation(tokenizer, "ab ", " cd", 64) == Request(ids, 3)
    assert continuation(tokenizer, "", "cd", 64) == Request(tokenizer.encode("cd"), 1)
    assert continuation(tokenizer, "ab ", " cd", 5) == Request(ids[-5:], 1)
    with pytest.raises(ValueError, match="a text to be scored has 4 tokens; the model's context is 4"):
        continuation(tokenizer, "ab ", " cd", 4)


@pytest.fixture(scope="module")
def integers(model, tmp_path_factory) -> dict[str, phi3_jax.Checkpoint]:
    """int8 as the kernels read it, and in rows; without LongRoPE, so that texts may be scored piece by piece."""
    folder, config = tmp_path_factory.mktemp("integers") / "model", dataclasses.replace(CONFIG, long_rope=None)
    phi3_jax.save(phi3_jax.Checkpoint(config, model.params, None, phi3_jax.GenerationSettings()), folder)
    return {layout: phi3_jax.load(folder, quantize="int8", layout=layout) for layout in ("packed", "rows")}


@pytest.mark.slow
@pytest.mark.skipif(why_unavailable() is not None, reason=f"no kernels: {why_unavailable()}")
def test_the_path_of_generation_is_what_generation_runs(model, integers, monkeypatch):
    monkeypatch.setattr(scoring, "_LOGITS", 128)  # two rows of 64 tokens
    rng = np.random.default_rng(3)
    prompts, wanted = [rng.integers(0, 263, n).tolist() for n in (51, 33)], Options(logprobs=1, echo=True, room=192)
    # Of floats, also what is reported while an answer is written, one token after another.
    floats = dataclasses.replace(integers["rows"], params=model.params)
    answers = generate(floats, prompts, 13, options=wanted)
    texts = [prompt + answer.token_ids for prompt, answer in zip(prompts, answers, strict=True)]
    assert len(texts[0]) == CONFIG.max_position_embeddings  # all that a model can read
    requests = [Request(text, len(prompt)) for text, prompt in zip(texts, prompts, strict=True)]
    found = score(floats, requests, path="generation")
    assert [each.greedy for each in found] == [True, True]
    for each, answer in zip(found, answers, strict=True):
        np.testing.assert_allclose(each.logprobs, [entry.logprob for entry in answer.logprobs], atol=2e-4)
    # Integers, read as a prompt: the very same numbers, and not those of exact activations.
    packed, rows = integers["packed"], integers["rows"]
    whole = [Request(text[:63], 0) for text in texts]
    echoed = [answer.prompt_logprobs for answer in generate(packed, [each.ids for each in whole], 1, options=wanted)]
    for read, each, exact in zip(echoed, score(packed, whole), score(rows, whole), strict=True):
        assert each.logprobs.tolist() == [entry.logprob for entry in read[1:]]
        assert 1e-3 < np.abs(each.logprobs - exact.logprobs).mean() < 0.2


@pytest.mark.slow
@pytest.mark.skipif(why_unavailable() is not None, reason=f"no kernels: {why_unavailable()}")
def test_every_figure_is_of_the_path_that_is_asked_for(model, integers):
    """Floats have the same figures by each path, integers others."""
    tokenizer = model.tokenizer
    packed, rows = (dataclasses.replace(integers[layout], tokenizer=tokenizer) for layout in ("packed", "rows"))
    ids = np.array(tokenizer.encode(TEXT[:50]))
    texts = [Text(ids, np.arange(len(ids)) > 20)]
    measures = (
        lambda model, path: perplexity(model, [TEXT[:50]], 48, 30, path=path).loss,
        lambda model, path: held_out_loss(model, texts, path=path).loss,
        lambda model, path: score(model, [Request(ids, 30)], path=path)[0].logprobs.mean(),
    )
    for measure in measures:
        exact, kernels = measure(rows, None), measure(packed, None)
        assert measure(rows, "exact") == exact
        assert measure(packed, "generation") == kernels
        assert 1e-3 < abs(exact - kernels) < 0.2
        floats = dataclasses.replace(rows, params=model.params)
        assert measure(floats, "generation") == pytest.approx(measure(floats, None), abs=1e-5)
    with pytest.raises(ValueError, match="packed weights have no exact path: load them with layout='rows'"):
        accuracy(packed, QUESTIONS, path="exact")
    with pytest.raises(ValueError, match="path='fast' is not one of exact, generation"):
        accuracy(packed, QUESTIONS, path="fast")


def test_what_cannot_be_computed(model):
    with pytest.raises(ValueError, match="there are no questions to answer"):
        accuracy(model, [])
    with pytest.raises(ValueError, match=r"no tokenizer\.json or tokenizer\.model there; put one of them beside the w"):
        accuracy(dataclasses.replace(model, tokenizer=None), QUESTIONS)
    for window, stride in ((65, 3), (1, 1), (8, 8), (8, 0)):
        with pytest.raises(ValueError, match=f"window={window}, stride={stride}: needs 1 <= stride < window <= 64"):
            perplexity(model, [TEXT], window, stride)
    with pytest.raises(ValueError, match="nothing to predict"):
        perplexity(model, ["", ""])
    with pytest.raises(ValueError, match="a text has 65 tokens, more than the model's 64"):
        score(model, [Request([1] * 65, 1)])
    with pytest.raises(ValueError, match="outside of the vocabulary of 263"):
        score(model, [Request([1, 263], 1)])


@pytest.mark.parametrize(("name", "where"), [("embed_tokens", (0x68 - 0x21, 0)), ("norm", (3,))])  # of "h"
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_numbers_that_are_none_are_no_result(model, name, where, value):
    damaged = spoiled(model, name, where, value)
    for measure in (
        lambda: perplexity(damaged, ["ab", TEXT]),
        lambda: perplexity(damaged, ["ab", TEXT], path="generation"),
        lambda: accuracy(damaged, QUESTIONS),
    ):
        with pytest.raises(ValueError, match=r"text \d+ has log-probabilities that are not finite: the weights may"):
            measure()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"line 2: it is not JSON"),
        ("[]", r"line 2: it is JSON but not an object"),
        ('{"choices": ["a", "b"], "answer": 0}', r'needs one string "question" or "context"'),
        ('{"question": "q", "context": "c", "choices": ["a", "b"], "answer": 0}', r'needs one string "question"'),
        ('{"question": "q", "choices": ["a"], "answer": 0}', r'"choices" must be a list of at least two texts'),
        ('{"question": "q", "choices": ["a", ""], "answer": 0}', r'"choices" must be'),
        ('{"question": "q", "choices": ["a", "b"], "answer": 2}', r'"answer" must be one of the choices'),
        ('{"question": "q", "choices": ["a", "b"], "answer": true}', r'"answer" must be'),
        ('{"question": "q", "choices": ["a", "a"], "answer": "a"}', r'"answer" must be'),
    ],
)
def test_lines_that_are_no_questions(tmp_path, line, message):
    path = tmp_path / "q.jsonl"
    path.write_text('{"context": "c", "choices": ["a", "b"], "answer": "b"}\n' + line)
    with pytest.raises(ValueError, match=rf"q\.jsonl, line 2: .*{message}|q\.jsonl, {message}"):
        read_questions(path)


def test_files(tmp_path):
    (tmp_path / "q.jsonl").write_text('\n{"context": "c", "choices": ["a", "b"], "answer": "b"}\n\n')
    assert read_questions(tmp_path / "q.jsonl") == [Question("c", ("a", "b"), 1)]
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match=r"empty\.jsonl: there are no questions"):
        read_questions(tmp_path / "empty.jsonl")
    (tmp_path / "t.txt").write_text("a\nb\u2028", encoding="utf-8")
    assert read_texts(tmp_path / "t.txt") == ["a\nb\u2028"]
    (tmp_path / "t.jsonl").write_text('{"text": "a\u2028"}\n{"text": "", "more": 1}\n', encoding="utf-8")
    assert read_texts(tmp_path / "t.jsonl") == ["a\u2028", ""]
    (tmp_path / "t.jsonl").write_text('{"text": 1}\n')
    with pytest.raises(ValueError, match=r't\.jsonl, line 1: has no string "text"; --data measures chats'):
        read_texts(tmp_path / "t.jsonl")
    (tmp_path / "t.txt").write_bytes(b"ab\xff")
    with pytest.raises(ValueError, match=r"t\.txt: not a text in UTF-8 .* at byte 2"):
        read_texts(tmp_path / "t.txt")


@pytest.mark.slow
def test_the_program(model, tmp_path):
    folder = write_model(tmp_path / "model")
    (tmp_path / "t.txt").write_text(TEXT, encoding="utf-8")
    lines = [{"question": q.context, "choices": q.choices, "answer": q.answer} for q in QUESTIONS]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = [sys.executable, "-m", "phi3_jax.train.programs.evaluate_main", "--checkpoint", str(folder)]
    command += ["--compilation_cache_dir", str(tmp_path / "compiled")]
    write_data(tmp_path / "d.jsonl", 7, 2)
    files = ["--text", "t.txt", "--stride", "7", "--window", "20", "--data", "d.jsonl", "--questions", "q.jsonl"]
    files += ["--json", "figures.json"]
    done = subprocess.run([*command, *files], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())
    surprise, right = Perplexity(**figures["text"]["measured"]), Accuracy(**figures["questions"]["measured"])
    answers = HeldOutLoss(**figures["data"]["measured"])
    assert done.stdout.splitlines() == [
        f"t.txt: perplexity {surprise.perplexity:.4f}, loss {surprise.loss:.4f}, {surprise.bits_per_byte:.4f} bits per "
        f"byte, {surprise.tokens} tokens; exact path",
        f"d.jsonl: loss {answers.loss:.4f}, perplexity {answers.perplexity:.4f}, {answers.tokens} learned tokens; "
        "exact path",
        f"q.jsonl: accuracy {right.accuracy:.4f} +- {right.standard_error:.4f}, by character "
        f"{right.accuracy_normalised:.4f}, 3 questions; exact path",
    ]
    # Compiled with all optimisations, which round otherwise.
    assert dataclasses.astuple(surprise) == pytest.approx(
        dataclasses.astuple(perplexity(model, [TEXT], 20, 7)), rel=1e-5
    )
    data = read_data(tmp_path / "d.jsonl", model.tokenizer, 64)
    assert answers.loss == pytest.approx(held_out_loss(model, data).loss)
    assert right == accuracy(model, QUESTIONS)
    assert [path.name for path in tmp_path.iterdir() if "figures" in path.name] == ["figures.json"]
    for more, message in (
        ([], "give --text, --data or --questions, or several of them"),
        (["--data", "nowhere.jsonl"], "nowhere.jsonl: no such file; give one of JSON lines"),
        (["--text", "nowhere.txt"], "[Errno 2] No such file or directory: 'nowhere.txt'"),
    ):
        done = subprocess.run([*command, *more], capture_output=True, text=True, cwd=tmp_path, check=False)
        assert (done.returncode, done.stderr) == (1, f"phi3-evaluate: {message}\n")


@pytest.mark.slow
@pytest.mark.skipif(why_unavailable() is not None, reason=f"no kernels: {why_unavailable()}")
def test_the_program_measures_what_generation_runs(tmp_path):
    """Where weights are packed integers, unless the exact path is asked for; and it says which one it was."""
    folder = write_model(tmp_path / "model")
    (tmp_path / "t.txt").write_text(TEXT, encoding="utf-8")
    command = [sys.executable, "-m", "phi3_jax.train.programs.evaluate_main", "--checkpoint", str(folder)]
    command += ["--quantize", "int8", "--text", "t.txt", "--window", "40", "--json", "figures.json"]
    losses = []
    for more, path in (([], "generation"), (["--path", "exact"], "exact")):
        done = subprocess.run([*command, *more], capture_output=True, text=True, cwd=tmp_path, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout.endswith(f"; {path} path\n")
        figures = json.loads((tmp_path / "figures.json").read_text())
        assert figures["path"] == path
        losses.append(figures["text"]["measured"]["loss"])
    layouts = (phi3_jax.load(folder, quantize="int8", layout=layout) for layout in ("packed", "rows"))
    # Rounded activations are not rounded alike by programs that were compiled otherwise.
    for found, model in zip(losses, layouts, strict=True):
        assert found == pytest.approx(perplexity(model, [TEXT], 40).loss, abs=5e-3)
    assert abs(losses[0] - losses[1]) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"quantize": "int4"}, {"quantize": "int8", "lora_rslora": True}])
def test_an_adapter_over_integers_has_the_held_out_loss_of_its_run(changes, tmp_path):
    """What is served is what was trained; the sum, rounded, is not."""
    settings = write_run(tmp_path, steps=12, lr=3e-2, **changes)
    records: list[Any] = []

    class Heard(Observer):
        def record(self, record: Any) -> None:
            records.append(record)

    train(settings, Heard())
    load = functools.partial(phi3_jax.load, settings.checkpoint, adapter=tmp_path / "run" / "adapter")
    served = load(quantize=settings.quantize, layout="rows")
    data = read_data(settings.eval_file, served.tokenizer, served.config.max_position_embeddings)
    ours = held_out_loss(served, data, path="exact").loss
    assert ours == pytest.approx(records[-1]["eval_loss"], abs=1e-4)
    assert ours < records[0]["eval_loss"] - 0.5
    with pytest.warns(UserWarning, match=f"was trained on {settings.quantize} weights"):
        rounded = load(quantize=settings.quantize, layout="rows", merge_adapter=True)
    assert abs(held_out_loss(rounded, data, path="exact").loss - ours) > 1e-3

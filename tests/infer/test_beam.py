"""Beam search against what transformers found (goldens_beam/record.py), and against searches that anyone can follow."""

import dataclasses
import functools
import itertools
import json
import math
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from spoiled import spoiled

import phi3_jax
from phi3_jax.infer import DraftModel, Options, PromptCache, PromptLookup, generate
from phi3_jax.infer.beam import beam_search, search_on
from phi3_jax.inspection import zero
from phi3_jax.model import KVCache, slots_needed

pytestmark = pytest.mark.usefixtures("quick_compilation")

HERE = Path(__file__).parents[1]
RECORDED = json.loads((HERE / "goldens_beam" / "expected.json").read_text(encoding="utf-8"))
# The first and the third prompt cross LongRoPE's border at 16 tokens, and end with the model's context, which is 21.
PROMPTS = [[5, 17, 40, 8, 9, 61, 2, 33, 12, 90, 7], [11, 4, 50], [88] * 9 + [1, 20], [30, 31, 32, 33, 34]]
NEW, CONTEXT, W = 11, 21, 3
ENDS = (74, 66)  # the second prompt's search is over early


@pytest.fixture(scope="module")
def model(tiny) -> phi3_jax.Checkpoint:
    config = dataclasses.replace(tiny.config, sliding_window=7, max_position_embeddings=CONTEXT)
    return dataclasses.replace(tiny, config=config, generation=phi3_jax.GenerationSettings(ENDS))


@pytest.fixture(scope="module")
def searched(model):
    return beam_search(model, PROMPTS, NEW, W, answers=W)


def token_ids(found):
    return [[beam.token_ids for beam in beams] for beams in found]


def same(found, others):
    """Asserts that the same answers were found, in the same order, with about the same scores."""
    assert token_ids(found) == token_ids(others)
    for beam, other in zip(itertools.chain(*found), itertools.chain(*others), strict=True):
        assert beam.score == pytest.approx(other.score, rel=1e-6, abs=1e-4)
        assert beam.finish_reason == other.finish_reason


# ------------------------------------------------------------------------------------------ what transformers found


@functools.cache
def recorded_model(name: str, window: int | None) -> phi3_jax.Checkpoint:
    model = phi3_jax.load(HERE / "goldens" / name, dtype="float32")
    config = dataclasses.replace(model.config, sliding_window=window) if window else model.config
    # As record.py does; it says why.
    norm = {"weight": model.params["norm"]["weight"] * 1.5}
    return dataclasses.replace(model, config=config, params=model.params | {"norm": norm})


def name_of(case) -> str:
    return "{model}-{beams}-{length_penalty}-{early_stopping}-{end_ids}".format(**case)


@pytest.mark.parametrize("case", RECORDED, ids=name_of)
def test_finds_what_transformers_finds(case):
    model = recorded_model(case["model"], case["sliding_window"])
    model = dataclasses.replace(model, generation=phi3_jax.GenerationSettings(tuple(case["end_ids"])))
    found = beam_search(
        model,
        case["prompts"],
        case["max_new_tokens"],
        case["beams"],
        length_penalty=case["length_penalty"],
        early_stopping=case["early_stopping"],
        answers=case["beams"],
    )
    assert token_ids(found) == [[beam["token_ids"] for beam in beams] for beams in case["found"]]
    for beam, expected in zip(itertools.chain(*found), itertools.chain(*case["found"]), strict=True):
        assert beam.score == pytest.approx(expected["score"], rel=1e-6, abs=1e-4)
        assert beam.finish_reason == ("stop" if beam.token_ids[-1] in case["end_ids"] else "length")
        assert beam.text == ""  # there is no tokenizer


def test_the_recorded_searches_are_of_all_kinds():
    assert {case["model"] for case in RECORDED} == {"theta", "gqa", "partial_tied"}
    assert {(case["beams"], len(case["end_ids"])) for case in RECORDED} == {
        *[(1, 1), (3, 1), (3, 2), (4, 0), (4, 1), (4, 2)]
    }
    greedy = [beams[0]["token_ids"] for beams in RECORDED[0]["found"]]
    others = [[beams[0]["token_ids"] for beams in case["found"]] for case in RECORDED[1:] if case["model"] == "theta"]
    assert RECORDED[0]["beams"] == 1
    assert any(all(a != b for a, b in zip(greedy, other, strict=True)) for other in others)


# ------------------------------------------------------------------------------------------ searches without a cache


@functools.partial(jax.jit, static_argnames="config")
def forward(config, params, tokens, positions, rope_length):
    lengths = jnp.full((1, 1), rope_length)
    return phi3_jax.Phi3(config).apply({"params": params}, tokens, positions=positions, rope_lengths=lengths)[0]


def all_logprobs(model, tokens, rope_length, size=32) -> np.ndarray:
    """float64 [T, V]: the log-probabilities of what comes after each of T tokens."""
    padded = np.zeros((1, size), np.int32)
    padded[0, : len(tokens)] = tokens
    positions = np.where(np.arange(size) < len(tokens), np.arange(size), -1)[None]
    logits = np.asarray(forward(model.config, model.params, padded, positions, rope_length), np.float64)[: len(tokens)]
    logits -= logits.max(axis=1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


class SlowSearch:
    """Beam search on lists, which runs everything again for each token."""

    def __init__(self, model, capacity=None):
        self.model, self.capacity, self.known = model, capacity, {}

    def next_logprobs(self, tokens) -> list[float]:
        if tokens not in self.known:
            self.known[tokens] = all_logprobs(self.model, tokens, self.capacity or len(tokens))[-1].tolist()
        return self.known[tokens]

    def search(self, prompt, new, beams, ends, penalty, early):
        """-> [(score, token ids)], best first."""
        alive, finished = [(0.0, ())], []
        for count in range(1, new + 1):
            longer = []
            for total, answer in alive:
                logprobs = self.next_logprobs((*prompt, *answer))
                longer += [(total + logprob, (*answer, token)) for token, logprob in enumerate(logprobs)]
            longer = sorted(longer, reverse=True)[: (1 + len(ends)) * beams]
            over = [each for each in longer if each[1][-1] in ends or count == new]
            finished += [
                (total / count**penalty, answer) for total, answer in over if (total, answer) in longer[:beams]
            ]
            finished = sorted(finished, reverse=True)[:beams]
            alive = [each for each in longer if each not in over][:beams]
            if len(finished) == beams and (early or not alive or alive[0][0] / count**penalty <= finished[-1][0]):
                break
        return finished


@pytest.mark.parametrize("policy", ["length", "capacity"])
def test_equals_a_slow_search_also_across_the_longrope_border(model, policy):
    limits = [min(NEW, CONTEXT - len(prompt)) for prompt in PROMPTS]
    slow = [
        SlowSearch(model, len(p) + n if policy == "capacity" else None) for p, n in zip(PROMPTS, limits, strict=True)
    ]
    seen = set()
    for penalty, early in [(1.0, False), (0.3, True), (-0.7, False), (2.5, True)]:
        rules = {"length_penalty": penalty, "early_stopping": early}
        found = beam_search(model, PROMPTS, NEW, W, **rules, answers=W, options=Options(rope_policy=policy))
        for i, beams in enumerate(found):
            expected = slow[i].search(PROMPTS[i], limits[i], W, ENDS, penalty, early)
            assert [beam.token_ids for beam in beams] == [list(answer) for _, answer in expected]
            np.testing.assert_allclose([beam.score for beam in beams], [score for score, _ in expected], atol=1e-4)
        seen.add(str(token_ids(found)))
    assert len(seen) > 2


@pytest.mark.parametrize("penalty", [0.0, 1.0, 3.0])
def test_with_room_for_everything_finds_the_best_of_all_answers(tiny, penalty):
    config = dataclasses.replace(tiny.config, vocab_size=5, pad_token_id=None)
    end, new, prompt = 2, 3, (1, 3)
    model = phi3_jax.Checkpoint(config, phi3_jax.random_params(config), None, phi3_jax.GenerationSettings((end,)))
    everything = {
        answer[: answer.index(end) + 1] if end in answer else answer
        for answer in itertools.product(range(5), repeat=new)
    }
    assert len(everything) == 1 + 4 + 16 * 5
    slow = SlowSearch(model)
    scores = {}
    for answer in everything:
        steps = [slow.next_logprobs((*prompt, *answer[:i]))[token] for i, token in enumerate(answer)]
        scores[answer] = sum(steps) / len(answer) ** penalty
    expected = sorted(scores.items(), key=lambda each: -each[1])
    found = beam_search(model, prompt, new, 131, length_penalty=penalty, answers=131)[0]
    assert len(found) == len(everything)  # fewer than asked for: there are no more
    np.testing.assert_allclose([beam.score for beam in found], [score for _, score in expected], atol=1e-5)
    assert [tuple(beam.token_ids) for beam in found[:9]] == [answer for answer, _ in expected[:9]]


def test_a_row_that_outgrew_its_padded_prompt_is_read_again(tiny):
    """Read again at 141 tokens, with memory for 160, which is less than the next power of two."""
    border, prompt, new = 140, [7] * 20, 125
    rope = dataclasses.replace(tiny.config.long_rope, original_max_position_embeddings=border)
    config = dataclasses.replace(tiny.config, long_rope=rope, max_position_embeddings=300)
    model = phi3_jax.Checkpoint(config, tiny.params, None, phi3_jax.GenerationSettings())
    beam = beam_search(model, prompt, new, 2, length_penalty=0.0)[0][0]
    tokens = prompt + beam.token_ids
    short, long = (all_logprobs(model, tokens, length, size=160) for length in (border, border + 1))
    chosen = [(short if place <= border else long)[place - 1, tokens[place]] for place in range(20, len(tokens))]
    assert len(chosen) == new
    assert beam.score == pytest.approx(sum(chosen), abs=1e-3)


# ------------------------------------------------------------------------------------------ rows, chunks, caches


def test_a_ragged_batch_is_each_alone_and_ends_at_the_models_context(model, searched):
    for i, prompt in enumerate(PROMPTS):
        same([searched[i]], beam_search(model, prompt, NEW, W, answers=W))
    lengths = [[len(beam.token_ids) for beam in beams] for beams in searched]
    assert max(lengths[1]) < NEW  # all over, while the others went on
    assert [max(each) for each in lengths[::2]] == [CONTEXT - 11] * 2
    assert lengths[3][1:] == [NEW] * 2


def test_each_prompt_has_its_own_limit(model, searched):
    found = beam_search(model, PROMPTS, [NEW, NEW, 3, NEW], W, answers=W)
    assert [len(beam.token_ids) for beam in found.pop(2)] == [3] * W
    same(found, searched[:2] + searched[3:])


def test_fewer_answers_are_the_first_ones(model, searched):
    same(beam_search(model, PROMPTS, NEW, W), [beams[:1] for beams in searched])


@pytest.mark.slow
def test_one_beam_is_greedy(model):
    greedy = generate(model, PROMPTS, NEW)
    assert {answer.finish_reason for answer in greedy} == {"stop", "length"}
    found = beam_search(model, PROMPTS, NEW, 1)
    assert [(beam.token_ids, beam.finish_reason) for (beam,) in found] == [
        (answer.token_ids, answer.finish_reason) for answer in greedy
    ]


@pytest.mark.parametrize("chunk", [1, 5, 16])
def test_chunks_and_a_ring_change_nothing(model, searched, chunk):
    assert slots_needed(model.config, CONTEXT, chunk) == {1: 7, 5: 11, 16: CONTEXT}[chunk]
    same(beam_search(model, PROMPTS, NEW, W, answers=W, options=Options(prefill_chunk=chunk)), searched)


def test_the_cache_takes_the_dtype_that_is_asked_for(model, searched):
    found = beam_search(model, PROMPTS[1], 4, W, length_penalty=0.0, options=Options(cache_dtype="int8"))
    exact = beam_search(model, PROMPTS[1], 4, W, length_penalty=0.0)
    assert token_ids(found) == token_ids(exact)
    assert 1e-4 < abs(found[0][0].score - exact[0][0].score) < 0.1


def test_searches_of_one_size_share_a_program(model, searched):
    before = search_on._cache_size()
    beam_search(model, PROMPTS, NEW - 2, W, length_penalty=0.5, early_stopping=True, answers=2)
    assert search_on._cache_size() == before


# ------------------------------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"beams": 0}, "beams=0 must be at least 1"),
        ({"beams": 10**9}, "beams=1000000000 must be at least 1 and at most 256"),
        ({"answers": 0}, "answers=0 must be at least 1 and at most beams=4"),
        ({"answers": 5}, "answers=5 must be at least 1 and at most beams=4"),
        ({"length_penalty": float("nan")}, "length_penalty=nan"),
        ({"length_penalty": float("inf")}, "length_penalty=inf"),
        ({"length_penalty": -40.0}, "length_penalty=-40.0 is too large for max_new_tokens=32"),
        ({"early_stopping": "never"}, "early_stopping='never' must be True or False"),
        ({"options": Options(logprobs=0)}, "options.logprobs"),
        ({"options": Options(logprobs=0, echo=True)}, "options.logprobs"),
        ({"options": Options(deadline=9.0)}, "options.deadline"),
        ({"options": Options(speculation=PromptLookup())}, "options.speculation"),
        ({"options": Options(rope_policy="batch")}, "rope_policy must be 'length' or 'capacity'"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"max_new_tokens": [1, 2]}, "max_new_tokens has 2 entries for 1 prompts"),
        ({"prompts": [[5], []]}, "prompt 1 is empty"),
        ({"prompts": [[1] * 64]}, "prompt 0 has 64 tokens, which leaves no room"),
        ({"prompts": [[97]]}, r"ids \[97\] outside of the vocabulary of 97"),
        ({"prompts": "text"}, "the checkpoint has no tokenizer"),
    ],
)
def test_bad_input(tiny, arguments, message):
    with pytest.raises(ValueError, match=message):
        beam_search(tiny, **{"prompts": [[5, 6]]} | arguments)


def test_other_models_and_caches_are_refused(tiny):
    cache = PromptCache((5,), KVCache.create(tiny.config, 1, 4), is_long=False, fingerprint="")
    for options, name in [
        (Options(prompt_cache=cache), "prompt_cache"),
        (Options(speculation=DraftModel(tiny)), "speculation"),
        (Options(edits=(zero(tiny.config, "embed"),)), "edits: leave it out"),
    ]:
        with pytest.raises(ValueError, match=f"options.{name}"):
            beam_search(tiny, [[5, 6]], options=options)


def test_no_prompts_give_no_answers(tiny):
    assert beam_search(tiny, []) == []


# ------------------------------------------------------------------------------------------ real words


@pytest.mark.slow
def test_finds_a_more_likely_answer_than_greedy_decoding(demo):
    prompt = "The best thing about the sea is"
    greedy = generate(demo, prompt, 12, options=Options(logprobs=0))[0]
    found = beam_search(demo, prompt, 12, 4, length_penalty=0.0, answers=4)[0]
    assert found[0].score > sum(each.logprob for each in greedy.logprobs) + 0.05
    assert [beam.score for beam in found] == sorted((beam.score for beam in found), reverse=True)
    assert len({tuple(beam.token_ids) for beam in found}) == 4
    for beam in found:
        assert demo.tokenizer.encode(prompt + beam.text) == demo.tokenizer.encode(prompt) + beam.token_ids


@pytest.mark.slow
def test_numbers_that_are_none_end_the_search_of_their_prompt_only(tiny):
    """At once, for a prompt that has token 5; and where a beam has come to a token that the model cannot read."""
    prompts = [[5, 1, 7], [11] * 4 + [2, 31, 8, 8]]
    sound = beam_search(tiny, prompts, 6, beams=3)
    for token, steps in ((5, 0), (sound[0][0].token_ids[2], 3)):
        (failed,), (other, *_) = beam_search(spoiled(tiny, "embed_tokens", (token, 0), math.nan), prompts, 6, beams=3)
        assert (failed.text, failed.token_ids, failed.finish_reason, failed.score) == ("", [], "error", -math.inf)
        count = int(re.search("for token ([0-9]+) of the answer are not finite", failed.error)[1])
        assert count == 1 if steps == 0 else 2 <= count <= steps + 1
        if steps == 0:
            assert other == sound[1][0]

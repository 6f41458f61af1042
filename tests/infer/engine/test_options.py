import dataclasses

import jax
import numpy as np
import pytest
from without_cache import greedy, logits

from phi3_jax.infer import DraftModel, Options, PromptLookup, Run, Sampling, generate

pytestmark = pytest.mark.usefixtures("quick_compilation")
PROMPTS = [[5, 1, 7], [11] * 4 + [2, 31, 8, 8], [90, 4, 77, 15, 60, 3, 22, 9, 41, 13, 58, 6, 70]]


def token_ids(results):
    return [result.token_ids for result in results]


@pytest.mark.slow
def test_capacity_decides_by_what_a_row_may_grow_to(tiny, monkeypatch):
    """Rows of 3 + 9, 8 + 9 and 13 + 9 tokens: the first stays short, the others are long from the first token on."""
    expected = [greedy(tiny, p, 9, lambda n, p=p: len(p) + 9) for p in PROMPTS]
    assert expected != [greedy(tiny, p, 9) for p in PROMPTS]
    from phi3_jax.infer.engine import decoding

    monkeypatch.setattr(decoding, "restart", None)  # nothing is read again
    assert token_ids(generate(tiny, PROMPTS, 9, options=Options(rope_policy="capacity"))) == expected


@pytest.mark.slow
def test_batch_decides_by_the_longest_row(tiny):
    """Of 13 tokens the longest crosses at its fourth step, and takes the others along."""
    together = generate(tiny, PROMPTS, 9, options=Options(rope_policy="batch"))
    assert token_ids(together) == [greedy(tiny, p, 9, lambda n, p=p: n - len(p) + 13) for p in PROMPTS]
    assert token_ids(together) != token_ids(generate(tiny, PROMPTS, 9))


def test_batch_counts_a_row_that_has_ended(tiny):
    """As in transformers, which pads it: the width of the batch is what counts."""
    together = generate(tiny, PROMPTS, [9, 9, 1], options=Options(rope_policy="batch"))
    assert token_ids(together)[:2] == [greedy(tiny, p, 9, lambda n, p=p: n - len(p) + 13) for p in PROMPTS[:2]]


@pytest.mark.parametrize("chunk", [4, 512])
def test_log_probabilities_are_those_of_a_run_without_cache(tiny, chunk):
    """Of the answer, of its alternatives and of the prompt; past the border, which the third row crosses."""
    options = Options(logprobs=3, echo=True, prefill_chunk=chunk)
    rows = [Sampling(), Sampling(temperature=2.0, seed=5, banned_tokens=[1, 2, 3]), Sampling(presence_penalty=2.0)]
    for prompt, result in zip(PROMPTS, generate(tiny, PROMPTS, 9, sampling=rows, options=options), strict=True):
        ids = prompt + result.token_ids
        for place, entry in enumerate(result.prompt_logprobs + result.logprobs):
            assert entry.token_id == ids[place]
            if place == 0:
                assert (entry.logprob, entry.top) == (None, {})
                continue
            so_far = prompt if place < len(prompt) else ids[:place]
            expected = np.asarray(jax.nn.log_softmax(logits(tiny, so_far)[place - 1]))
            np.testing.assert_allclose(entry.logprob, expected[ids[place]], atol=1e-4)
            best = np.argsort(-expected)[:3]
            assert list(entry.top) == best.tolist()
            np.testing.assert_allclose(list(entry.top.values()), expected[best], atol=1e-4)


def test_log_probabilities_only_when_asked_for(tiny):
    (plain,) = generate(tiny, PROMPTS[0], 3)
    assert (plain.logprobs, plain.prompt_logprobs) == (None, None)
    (some,) = generate(tiny, PROMPTS[0], 3, options=Options(logprobs=0))
    assert [entry.top for entry in some.logprobs] == [{}] * 3
    assert some.prompt_logprobs is None


@pytest.mark.slow
def test_log_probabilities_end_with_a_stop_string(demo):
    (whole,) = generate(demo, "The capital of France is", 8, options=Options(logprobs=1))
    (cut,) = generate(demo, "The capital of France is", 8, stop=["Paris"], options=Options(logprobs=1))
    assert cut.logprobs == whole.logprobs[: len(cut.token_ids)]
    assert [entry.token_id for entry in cut.logprobs] == cut.token_ids
    assert [max(entry.top, key=entry.top.get) for entry in cut.logprobs] == cut.token_ids  # greedy


@pytest.mark.slow
def test_room_lets_runs_share_programs(tiny):
    from phi3_jax.infer.engine import decoding

    generate(tiny, [7] * 9, 3, options=Options(room=300))
    before = decoding.decode._cache_size()
    longer = generate(tiny, [7] * 9, 30, options=Options(room=300))
    assert decoding.decode._cache_size() == before
    assert token_ids(longer) == token_ids(generate(tiny, [7] * 9, 30))


def test_reading_goes_chunk_by_chunk(tiny):
    run = Run(tiny, PROMPTS, [2] * 3, options=Options(prefill_chunk=5))
    seen = []
    for _ in range(3):
        assert all(not done for done in run.done)
        new = run.advance()
        seen.append((run.reading, [len(row.token_ids) for row in new]))
    assert seen == [((5, 13), [0, 0, 0]), ((10, 13), [0, 0, 0]), ((14, 14), [1, 1, 1])]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"prefill_chunk": 0}, "prefill_chunk=0"),
        ({"cache_dtype": "int4"}, "cache_dtype='int4'"),
        ({"rope_policy": "row"}, "rope_policy='row'"),
        ({"logprobs": -1}, "logprobs=-1"),
        ({"echo": True}, "give logprobs, too"),
        ({"deadline": 0.0}, "deadline=0.0"),
        ({"room": -1}, "room=-1"),
        ({"speculation": PromptLookup(), "rope_policy": "batch"}, "leave one out"),
    ],
)
def test_bad_options(values, message):
    with pytest.raises(ValueError, match=message):
        Options(**values)


def test_log_probabilities_of_a_prompt_need_echo(tiny):
    run = Run(tiny, PROMPTS, [2] * 3, options=Options(logprobs=0))
    run.advance()
    with pytest.raises(ValueError, match="echo=True"):
        run.prompt_logprobs(0)


def test_more_alternatives_than_tokens(tiny):
    with pytest.raises(ValueError, match="logprobs=98 is more than the vocabulary of 97"):
        generate(tiny, [1], options=Options(logprobs=98))


def test_a_draft_model_must_have_the_same_vocabulary(tiny):
    other = dataclasses.replace(tiny, config=dataclasses.replace(tiny.config, vocab_size=96))
    with pytest.raises(ValueError, match="vocabulary of 96"):
        generate(tiny, [1], options=Options(speculation=DraftModel(other)))

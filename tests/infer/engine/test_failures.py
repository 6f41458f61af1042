"""Rows that cannot go on: each ends with an error, and its neighbours do not notice."""

import dataclasses
import math

import jax.numpy as jnp
import pytest
from spoiled import spoiled, with_bytes

import phi3_jax
from phi3_jax.infer import DraftModel, Grammar, Options, PromptCache, PromptLookup, Run, Sampling, generate
from phi3_jax.infer.conversation import Conversation
from phi3_jax.infer.programs.chat_main import Chat

pytestmark = pytest.mark.usefixtures("quick_compilation")
PROMPTS = [[5, 1, 7], [11] * 4 + [2, 31, 8, 8]]
DRAWN = Sampling(temperature=1.0, seed=3)


@pytest.fixture(scope="module")
def sound(tiny):
    """The answers of the undamaged model: a drawn one and a greedy one."""
    return [result.token_ids for result in generate(tiny, PROMPTS, 8, sampling=[DRAWN, Sampling()])]


@pytest.fixture(scope="module")
def small(tiny, tmp_path_factory):
    return with_bytes(tiny, tmp_path_factory.mktemp("bytes"))


def ends(results):
    return [(result.token_ids, result.finish_reason) for result in results]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_numbers_that_are_none_end_their_row_only(tiny, sound, value):
    """Token 5 is in the first prompt alone."""
    results = generate(spoiled(tiny, "embed_tokens", (5, 0), value), PROMPTS, 8, sampling=[DRAWN, Sampling()])
    assert ends(results) == [([], "error"), (sound[1], "length")]
    assert "token 1 of the answer are not finite" in results[0].error
    assert "float16 overflows" in results[0].error
    assert (results[0].text, results[1].error) == ("", None)


@pytest.mark.parametrize(("name", "where"), [("norm", (3,)), ("lm_head", (40, 2))])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_damaged_head_ends_every_row(tiny, name, where, value):
    """One row of the head gives one logit of -inf or inf among finite ones."""
    assert (
        ends(generate(spoiled(tiny, name, where, value), PROMPTS, 8, sampling=[DRAWN, Sampling()]))
        == [([], "error")] * 2
    )


def test_an_error_at_a_later_step_keeps_what_came_before(tiny, sound):
    """The model writes the token, and cannot read it."""
    place = next(i for i, token in enumerate(sound[1]) if token not in PROMPTS[1] + sound[0])
    damaged = spoiled(tiny, "embed_tokens", (sound[1][place], 1), math.nan)
    expected = [(sound[0], "length"), (sound[1][: place + 1], "error")]
    results = generate(damaged, PROMPTS, 8, sampling=[DRAWN, Sampling()])
    assert ends(results) == expected
    pieces = []
    generate(damaged, PROMPTS, 8, sampling=[DRAWN, Sampling()], on_piece=pieces.append)
    (last,) = (piece for piece in pieces if piece.finish_reason == "error")
    assert (last.row, last.token_ids, last.error) == (1, [], results[1].error)


@pytest.mark.slow
def test_guesses_change_no_error(tiny, sound):
    place = next(i for i, token in enumerate(sound[1]) if token not in PROMPTS[1] + sound[0])
    damaged = spoiled(tiny, "embed_tokens", (sound[1][place], 1), math.nan)
    for speculation in (PromptLookup(3), DraftModel(tiny, 3), DraftModel(damaged, 3)):
        results = generate(damaged, PROMPTS, 8, sampling=[DRAWN, Sampling()], options=Options(speculation=speculation))
        assert ends(results) == [(sound[0], "length"), (sound[1][: place + 1], "error")]
    results = generate(
        tiny, PROMPTS, 8, sampling=[DRAWN, Sampling()], options=Options(speculation=DraftModel(damaged, 3))
    )
    assert ends(results) == [(tokens, "length") for tokens in sound]  # a draft model's numbers are only guesses


@pytest.mark.slow
def test_log_probabilities_of_a_prompt_end_where_there_is_none(tiny):
    damaged = spoiled(tiny, "embed_tokens", (2, 0), math.nan)
    options = Options(logprobs=0, echo=True)
    results = generate(damaged, PROMPTS, 8, options=options)
    assert [result.finish_reason for result in results] == ["length", "error"]
    assert [[entry.token_id for entry in result.prompt_logprobs] for result in results] == [PROMPTS[0], PROMPTS[1][:5]]
    assert all(entry.logprob is not None for result in results for entry in result.prompt_logprobs[1:])
    token = results[0].token_ids[3]
    results = generate(spoiled(tiny, "embed_tokens", (token, 0), math.nan), PROMPTS, 8, options=options)
    assert (results[0].finish_reason, len(results[0].token_ids)) == ("error", results[0].token_ids.index(token) + 1)
    assert [entry.token_id for entry in results[0].logprobs] == results[0].token_ids
    assert all(math.isfinite(entry.logprob) for entry in results[0].logprobs)


@pytest.mark.slow
def test_a_row_that_may_take_no_token_says_so(tiny, sound):
    """All are banned at once; or the only one that is left may not come twice."""
    all_but_seven = [token for token in range(97) if token != 7]
    for banned, tokens in ((range(97), []), (all_but_seven, [7])):
        rows = [Sampling(banned_tokens=banned, no_repeat_ngram_size=1), Sampling()]
        results = generate(tiny, [[5, 1, 8], PROMPTS[1]], 8, sampling=rows)
        assert ends(results) == [(tokens, "error"), (sound[1], "length")]
        assert f"no token to pick as number {len(tokens) + 1} of the answer: banned_tokens" in results[0].error


def test_keys_that_are_no_numbers_are_not_kept(tiny, tmp_path):
    damaged = spoiled(tiny, "embed_tokens", (5, 0), math.nan)
    run = Run(damaged, PROMPTS, [2, 2])
    while not run.is_over:
        run.advance()
    with pytest.raises(ValueError, match="row 0 of the cache holds numbers that are not finite"):
        run.prompt_cache(0)
    sound = run.prompt_cache(1)
    poisoned = dataclasses.replace(sound.cache, v=sound.cache.v.at[1, 0, 0, 2, 3].set(jnp.nan))
    dataclasses.replace(sound, cache=poisoned).save(tmp_path / "cache")
    with pytest.raises(ValueError, match="holds keys or values that are not finite numbers; make the prompt cache"):
        PromptCache.load(tmp_path / "cache", damaged)


def test_a_grammar_that_conflicts_ends_its_row_only(small):
    """With a forced token, at once and later; with a banned one; where no token leads on; one that a ban spares."""
    pytest.importorskip("llguidance", reason="the extra `grammar` is not installed")
    cat, the, a = (small.tokenizer.encode(text)[-1] for text in ("cat", "the", "a"))
    grammars = [
        Grammar.choice(["the"]),
        Grammar.regex("[a-z]*"),
        Grammar.choice(["cat"]),
        Grammar.choice(["the"]),
        None,
    ]
    letters = [i for i, piece in enumerate(small.tokenizer.pieces) if "c" in (piece or "") or piece == "<0x63>"]
    rows = [
        Sampling(forced_tokens=[cat]),
        Sampling(forced_tokens=[a, 3 + 0x21]),
        Sampling(banned_tokens=letters),
        Sampling(banned_tokens=[cat]),
        Sampling(forced_tokens=[the, cat]),
        Sampling(banned_tokens=range(small.config.vocab_size)),
    ]
    results = generate(small, [[5, 9]] * 6, 8, sampling=rows, grammar=[*grammars, None])
    assert [result.finish_reason for result in results] == ["error"] * 3 + ["stop", "length", "error"]
    assert "forced_tokens[0] is a token that the grammar does not allow" in results[0].error
    assert (results[1].token_ids, results[1].error[:16]) == ([a], "forced_tokens[1]")
    assert "and the grammar together forbid all" in results[2].error
    assert (results[3].text, results[4].token_ids[:2]) == ("the", [the, cat])
    assert "no token to pick as number 1 of the answer" in results[5].error


def test_a_grammar_that_gives_up_ends_its_row_only(small, monkeypatch):
    """llguidance's limits on work are reached at the third token."""
    pytest.importorskip("llguidance", reason="the extra `grammar` is not installed")
    from phi3_jax.infer.sampling.grammar import GrammarMasks

    real, asked = GrammarMasks.mask, []

    def mask(self, row):
        asked.append(row)
        if row == 0 and asked.count(0) == 4:  # the first is a check before anything runs
            raise ValueError("row 0: llguidance cannot follow the grammar further")
        return real(self, row)

    monkeypatch.setattr(GrammarMasks, "mask", mask)
    results = generate(small, [[5, 9]] * 6, 6, grammar=Grammar.regex("[a-z]{40}"))
    assert [len(result.token_ids) for result in results] == [2, 6, 6, 6, 6, 6]
    assert results[0].error == "row 0: llguidance cannot follow the grammar further"
    assert asked.count(0) == 4  # a row that has ended is not asked again


@pytest.mark.slow
def test_a_conversation_forgets_a_turn_with_an_error(small, capsys):
    tokenizer = dataclasses.replace(small.tokenizer, chat_template="{% for m in messages %}{{ m.content }}{% endfor %}")
    small = dataclasses.replace(small, tokenizer=tokenizer)
    (dog,) = set(tokenizer.encode("dog")) - set(tokenizer.encode("cat sat"))
    conversation = Conversation(spoiled(small, "embed_tokens", (dog, 0), math.nan), max_new_tokens=2)
    list(conversation.ask("cat sat"))
    before = conversation.messages
    pieces = list(conversation.ask(" dog"))
    assert pieces[-1].finish_reason == "error"
    assert conversation.messages == before
    chat = Chat(conversation, on_terminal=False)
    chat.take(" dog")
    assert chat.failed
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert "not finite numbers" in err
    list(conversation.ask(" cat"))  # goes on with the keys of the turn before
    assert conversation.last.generation.finish_reason != "error"
    assert conversation.last.reused > 0


@pytest.mark.slow
def test_no_number_is_lost_on_the_way_through_the_kernels(tiny_folder):
    """Integers know no NaN: the kernels carry it in their scales."""
    model = phi3_jax.load(tiny_folder, quantize="int8", layout=phi3_jax.checkpoint.fastest_layout())
    weight = jnp.asarray(model.params["layers"]["post_attention_layernorm"]["weight"]).at[1, 3].set(jnp.nan)
    layers = {**model.params["layers"], "post_attention_layernorm": {"weight": weight}}
    damaged = dataclasses.replace(model, params={**model.params, "layers": layers})
    results = generate(damaged, PROMPTS, 3, options=Options(cache_dtype="int8"))
    assert ends(results) == [([], "error")] * 2

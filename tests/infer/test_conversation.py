"""Conversations, beside answers of runs that keep nothing."""

import dataclasses
import itertools
import json
from collections.abc import Callable

import pytest
from chats import (
    ASSISTANT,
    DROPS_SYSTEM,
    END,
    FRANCE,
    ITALY,
    PLAIN,
    USER,
    answers_without_memory,
    ask,
    greedy,
    small_chat,
)

import phi3_jax
from phi3_jax.infer import Grammar, Options, generate
from phi3_jax.infer.conversation import ContextFullError, Conversation, load_messages, save_messages
from phi3_jax.infer.engine import decoding

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def small(tiny: phi3_jax.Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> phi3_jax.Checkpoint:
    return small_chat(tiny, tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def reference(demo: phi3_jax.Checkpoint) -> Callable[..., str]:
    return answers_without_memory(demo)


@pytest.fixture
def read_sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the chunks that models read from now on."""
    sizes, read = [], decoding.read

    def counted(config, params, state, last, begin, size, *rest):
        sizes.append(size)
        return read(config, params, state, last, begin, size, *rest)

    counted.lower = read.lower
    monkeypatch.setattr(decoding, "read", counted)
    return sizes


@pytest.mark.slow
def test_a_second_answer_depends_on_the_first_turn_which_is_not_read_again(demo, reference, read_sizes):
    conversation = Conversation(demo, max_new_tokens=24)
    first = ask(conversation, FRANCE)
    assert (conversation.last.reused, read_sizes) == (0, [64])  # 37 tokens, padded
    second = ask(conversation, ITALY)
    assert read_sizes == [64, 16]
    assert first == "The capital of France is Paris." == reference(FRANCE)
    assert second == reference(FRANCE, first, ITALY) != reference(ITALY)
    assert conversation.last.reused == 44  # the first prompt, and the answer without its end token
    assert conversation.last.generation.token_ids == [*demo.tokenizer.encode(second), 2]
    roles = ["user", "assistant", "user", "assistant"]
    assert conversation.messages == [
        {"role": role, "content": text} for role, text in zip(roles, [FRANCE, first, ITALY, second], strict=True)
    ]
    read_sizes.clear()
    conversation.reset()
    assert conversation.messages == []
    assert ask(conversation, FRANCE) == first
    assert conversation.last.reused == 36  # all but the last token, from which the answer comes
    assert read_sizes == [16]


@pytest.mark.parametrize("chunk", [pytest.param(512, marks=pytest.mark.slow), 5])
def test_crossing_the_long_rope_border_changes_nothing(small, chunk):
    """In the middle of the second answer; with chunks of 5 the cache is a ring, and the window of 19 is passed, too."""
    conversation = Conversation(small, sampling=PLAIN, max_new_tokens=4, options=Options(prefill_chunk=chunk))
    prompts, reused = [], []
    for text in ("hi", "yo", "no", "so it is"):
        ask(conversation, text)
        turn = conversation.last
        assert turn.generation.token_ids == greedy(small, turn.prompt_ids, 4)
        prompts.append(len(turn.prompt_ids))
        reused.append(turn.reused)
    # The newest token of an answer has no keys yet.
    assert (prompts, reused) == ([5, 15, 25, 41], [0, 8, 18, 28])


def test_a_prompt_beyond_the_border_is_read_anew(small):
    conversation = Conversation(small, sampling=PLAIN, max_new_tokens=4)
    ask(conversation, "hi")
    for expected in (0, 35):  # the first has keys with the short factors only
        ask(conversation, "a text of 19 tokens")
        assert conversation.last.reused == expected
        assert conversation.last.generation.token_ids == greedy(small, conversation.last.prompt_ids, 4)
    conversation.reset()
    ask(conversation, "hi")  # short again
    assert conversation.last.reused == 0
    assert conversation.last.generation.token_ids == greedy(small, conversation.last.prompt_ids, 4)


def test_each_answer_draws_anew_and_can_be_repeated(small):
    sampling = dataclasses.replace(PLAIN, temperature=1.0, seed=2**32 - 1)

    conversation, drawn = Conversation(small, sampling=sampling, max_new_tokens=7), []
    for _ in range(3):
        conversation.reset()
        ask(conversation, "hi")
        drawn.append(conversation.last.generation.token_ids)
    rows = [dataclasses.replace(sampling, seed=seed) for seed in (2**32 - 1, 0, 1)]
    prompt, room = conversation.last.prompt_ids, Options(room=512)
    assert drawn == [generate(small, prompt, 7, sampling=row, options=room)[0].token_ids for row in rows]
    assert len(set(map(tuple, drawn))) == 3


def test_an_interrupted_answer_is_kept_as_far_as_it_came(small):
    conversation, asked = Conversation(small, sampling=PLAIN, max_new_tokens=9), itertools.count()
    text = ask(conversation, "hi", interrupt=lambda: next(asked) == 2)
    assert conversation.last.generation.finish_reason == "interrupt"
    assert conversation.last.generation.token_ids == greedy(small, conversation.last.prompt_ids, 3)
    assert [message["content"] for message in conversation.messages] == ["hi", text]
    ask(conversation, "yo")
    assert conversation.last.prompt_ids[5:9] == [*small.tokenizer.encode(text), END]
    assert conversation.last.generation.token_ids == greedy(small, conversation.last.prompt_ids, 9)


def test_an_answer_that_was_ended_before_it_began_is_not_kept(small):
    conversation = Conversation(small, max_new_tokens=9, options=Options(prefill_chunk=5))
    ask(conversation, "hello", interrupt=lambda: True)
    assert conversation.last.generation.finish_reason == "interrupt"
    assert conversation.messages == []


def test_a_turn_that_fails_or_is_left_changes_nothing(small):
    conversation = Conversation(small, sampling=PLAIN, max_new_tokens=9)
    ask(conversation, "hi")
    before = conversation.messages
    with pytest.raises(ContextFullError, match=r"has 621 tokens, .* in the model's context of 600"):
        ask(conversation, "x" * 603)
    with pytest.raises(ValueError, match="refuses these messages: not a word"):
        ask(conversation, "forbidden")
    left = conversation.ask("gone")
    next(left)
    left.close()
    assert conversation.messages == before
    ask(conversation, "yo")
    assert conversation.last.prompt_ids[14:] == [END, USER, *small.tokenizer.encode("yo"), END, ASSISTANT]
    assert conversation.last.generation.token_ids == greedy(small, conversation.last.prompt_ids, 9)


def test_turns_share_their_programs(small):
    conversation = Conversation(small, sampling=PLAIN, max_new_tokens=9)
    compiled = []
    for size in (3, 30, 100, 300):
        ask(conversation, "x" * size)
        compiled.append(decoding.decode._cache_size())
    assert len(set(compiled)) == 1


def test_the_system_message_begins_anew(small):
    keeps = "[{{ messages[0].content }}]" + DROPS_SYSTEM
    small = dataclasses.replace(small, tokenizer=dataclasses.replace(small.tokenizer, chat_template=keeps))
    conversation = Conversation(small, "one", max_new_tokens=3)
    ask(conversation, "hi")
    opening = small.tokenizer.encode("[one]")
    assert conversation.last.prompt_ids[:5] == opening
    conversation.set_system("two")
    assert conversation.messages == [{"role": "system", "content": "two"}]
    ask(conversation, "hi")
    assert conversation.last.prompt_ids == [*small.tokenizer.encode("[two]"), *[USER, 71, 72, END, ASSISTANT]]
    conversation.reset()
    assert conversation.messages == [{"role": "system", "content": "two"}]
    conversation.set_system(None)
    assert conversation.messages == []


def test_stop_strings_grammars_and_prompt_caches_reach_the_run(small):
    conversation = Conversation(small, sampling=PLAIN, max_new_tokens=7)
    whole = ask(conversation, "hi")
    cache = conversation._cache
    conversation = Conversation(
        small, None, PLAIN, 7, stop=[whole[3]], options=Options(prompt_cache=cache, deadline=1e6)
    )
    assert ask(conversation, "hi") == whole[: whole.index(whole[3])]
    assert conversation.last.reused == 4
    pytest.importorskip("llguidance")
    conversation = Conversation(small, grammar=Grammar.choice(["abc", "bcd"]))
    assert ask(conversation, "hi") in ("abc", "bcd")


def test_saved_conversations_go_on(small, tmp_path):
    conversation = Conversation(small, sampling=PLAIN, max_new_tokens=4)
    ask(conversation, "hi")
    path = tmp_path / "chat.json"
    save_messages(path, conversation.messages)
    assert json.loads(path.read_text(encoding="utf-8")) == {"messages": conversation.messages}
    with pytest.raises(FileExistsError, match="exists already"):
        save_messages(path, [])
    with pytest.raises(OSError, match=r"none/a.json: cannot be written \(No such file or directory\)"):
        save_messages(tmp_path / "none" / "a.json", [])
    assert [entry.name for entry in tmp_path.iterdir()] == ["chat.json"]

    other = Conversation(small, sampling=PLAIN, max_new_tokens=4)
    other.restore(load_messages(path))
    assert other.messages == conversation.messages
    assert ask(other, "yo") == ask(conversation, "yo")
    assert other.last.prompt_ids == conversation.last.prompt_ids
    with pytest.warns(UserWarning, match="drops the system message"):
        other.restore(two := [{"role": "system", "content": "é"}, {"role": "user", "content": "hi"}])
    assert other.messages == two
    other.set_system(None)
    assert other.messages == []
    for bad in ([], [{"role": "user"}], ["text"], [{"role": "user", "content": "forbidden"}]):
        with pytest.raises(ValueError, match="messages"):
            other.restore(bad)
        assert other.messages == []


@pytest.mark.parametrize("content", [b"\xff", b"{", b"[]", b'{"messages": {}}', b"[" * 100_000])
def test_files_that_hold_no_conversation(tmp_path, content):
    path = tmp_path / "chat.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"chat.json: .*; name a file that /save wrote"):
        load_messages(path)
    with pytest.raises(OSError, match="cannot be read"):
        load_messages(tmp_path / "none.json")


def test_a_conversation_needs_a_tokenizer_and_refuses_echo(tiny, small):
    with pytest.raises(ValueError, match="a chat needs a tokenizer"):
        Conversation(tiny)
    with pytest.raises(ValueError, match="echo"):
        Conversation(small, options=Options(logprobs=0, echo=True))

"""Conversations keep what the model has read, and change nothing by it; the program on a real terminal and in pipes."""

import dataclasses
import functools
import itertools
import json
import os
import pty
import re
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Self

import jax
import pytest
import without_cache
from jax.experimental.compilation_cache import compilation_cache
from phi3_jax.infer import Grammar, Options, Run, Sampling, decoding, generate
from phi3_jax.infer.conversation import ContextFullError, Conversation, load_messages, save_messages
from vocabularies import byte_level_spec, write

import phi3_jax

pytestmark = pytest.mark.usefixtures("quick_compilation")

FRANCE, ITALY = "What is the capital of France?", "And of Italy?"
CONTEXT = 600  # of the tiny model, LongRoPE's border is at 16 and the window 19
USER, END, ASSISTANT = 94, 95, 96
PLAIN = Sampling(banned_tokens=[USER, END, ASSISTANT])  # then the answers come back as the same tokens
DROPS_SYSTEM = (
    "{% for m in messages %}{% if 'forbidden' in m.content %}{{ raise_exception('not a word\nof that') }}{% endif %}"
    "{% if m.role == 'user' %}<|user|>{{ m.content }}<|end|><|assistant|>"
    "{% elif m.role == 'assistant' %}{{ m.content }}<|end|>{% endif %}{% endfor %}"
)


@pytest.fixture(scope="module")
def small(tiny: phi3_jax.Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> phi3_jax.Checkpoint:
    """The tiny model with a tokenizer of one token per ASCII character, and a template like the first Phi-3-mini's."""
    spec = byte_level_spec()
    pieces = [chr(code) for code in range(0x21, 0x7E)] + ["Ġ"]
    spec["model"] |= {"vocab": {piece: i for i, piece in enumerate(pieces)}, "merges": []}
    blank = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False, "special": True}
    specials = ["<|user|>", "<|end|>", "<|assistant|>"]
    spec["added_tokens"] = [{"id": USER + i, "content": content, **blank} for i, content in enumerate(specials)]
    folder = tmp_path_factory.mktemp("tokenizer")
    write(folder, {"tokenizer.json": spec, "chat_template.jinja": DROPS_SYSTEM})
    config = dataclasses.replace(tiny.config, max_position_embeddings=CONTEXT)
    settings = phi3_jax.GenerationSettings((END,))
    return phi3_jax.Checkpoint(config, tiny.params, phi3_jax.load_tokenizer(folder), settings, folder)


@pytest.fixture(scope="module", autouse=True)
def own_compilation_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A compilation cache for the programs, apart from the user's own; the tests fill it for them, which saves time."""
    folder = tmp_path_factory.mktemp("cache")
    names = {"jax_compilation_cache_dir": str(folder / "phi3_jax" / "compiled")}
    names |= {"jax_persistent_cache_min_compile_time_secs": 0.0}
    before = {name: getattr(jax.config, name) for name in names}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        for name, value in names.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        yield
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


@pytest.fixture(scope="module")
def reference(demo: phi3_jax.Checkpoint) -> Callable[..., str]:
    """The demo's answer to messages, alternately the user's and the assistant's, without anything kept."""

    @functools.cache
    def answer(*texts: str, system: str | None = None, limit: int = 16) -> str:
        messages = [] if system is None else [{"role": "system", "content": system}]
        messages += [{"role": role, "content": t} for role, t in zip(itertools.cycle(["user", "assistant"]), texts)]
        ids = phi3_jax.encode_chat(demo.tokenizer, messages)
        return generate(demo, ids, max_new_tokens=limit, options=Options(room=512))[0].text

    return answer


def ask(conversation: Conversation, text: str, **options: object) -> str:
    pieces = list(conversation.ask(text, **options))
    assert "".join(piece.text for piece in pieces) == conversation.last.generation.text
    return conversation.last.generation.text


def greedy(checkpoint: phi3_jax.Checkpoint, prompt: Sequence[int], count: int) -> list[int]:
    """PLAIN, without a cache."""
    ids = list(prompt)
    for _ in range(count):
        logits = without_cache.logits(checkpoint, ids)[-1]
        ids.append(int(logits[:USER].argmax()))
    return ids[len(prompt) :]


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


@pytest.mark.parametrize("chunk", [512, 5])
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


def test_turns_share_their_memory_and_their_programs(small, monkeypatch):
    rooms, first_state = [], Run._first_state
    monkeypatch.setattr(Run, "_first_state", lambda run: rooms.append(run._room) or first_state(run))
    conversation = Conversation(small, sampling=PLAIN, max_new_tokens=9)
    compiled = []
    for size in (3, 30, 100):
        ask(conversation, "x" * size)
        compiled.append(decoding.decode._cache_size())
    assert rooms == [512] * 3  # alone they would take 144, 192 and 384
    assert len(set(compiled)) == 1
    longer = dataclasses.replace(small, config=dataclasses.replace(small.config, max_position_embeddings=5000))
    conversation = Conversation(longer, options=Options(prefill_chunk=128))
    assert [conversation._room(tokens) for tokens in (384, 385, 896, 897, 4000)] == [512, 1024, 1024, 2048, 5000]


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


COMMAND = [sys.executable, "-m", "phi3_jax.infer.chat_main"]


def run_program(lines: Sequence[str], *args: str) -> subprocess.CompletedProcess:
    text = "".join(line + "\n" for line in lines).encode(errors="surrogateescape")
    done = subprocess.run([*COMMAND, *args], input=text, capture_output=True, timeout=240)
    return subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())


def test_in_a_pipe_every_line_is_a_message_or_a_command(demo, reference):
    system = "You are a pirate."
    lines = [FRANCE, "", ITALY, "/reset", ITALY, f"/system {system}", ITALY]
    done = run_program(lines, "--checkpoint", "demo", "--max_new_tokens", "16", "--verbose")
    paris = reference(FRANCE)
    answers = [paris, reference(FRANCE, paris, ITALY), reference(ITALY), reference(ITALY, system=system)]
    assert done.stdout == "".join(answer + "\n" for answer in answers), done.stderr
    assert len(set(answers)) == 4
    reports = done.stderr.splitlines()
    assert len(reports) == 4, done.stderr
    assert reports[0].startswith("phi3-chat: 0 tokens from the cache, 37 read, 8 written in ")
    assert reports[1].startswith("phi3-chat: 44 tokens from the cache, 15 read, 8 written in ")
    assert done.returncode == 0


def test_errors_are_one_line_each_and_the_session_goes_on(small, tmp_path):
    """With a template that drops the system message."""
    phi3_jax.save(small, tmp_path / "small")
    saved, taken = tmp_path / "a chat.json", tmp_path / "taken.json"
    taken.write_text("{}", encoding="utf-8")
    lines = ["hi", "yo", f"/save {saved}", "forbidden", "x" * 700, "\udcff", "/nonsense", "/reset now", "/save"]
    lines += [f"/save {taken}", f"/load {taken}", "/load nowhere.json", "/system", "//yo", f"/load {saved}", "yo"]
    lines += ["/system other", "hi", "/help", "/exit", "never sent"]
    args = ["--checkpoint", str(tmp_path / "small"), "--max_new_tokens", "4", "--system", "be"]
    done = run_program(lines, *args, "--banned_tokens", f"{USER},{END},{ASSISTANT}")

    def answer(*texts: str) -> str:
        parts = [[USER, *small.tokenizer.encode(text), END, ASSISTANT] for text in texts[::2]]
        answers = [[*small.tokenizer.encode(text), END] for text in texts[1::2]]
        prompt = [
            token for pair in itertools.zip_longest(parts, answers, fillvalue=[]) for part in pair for token in part
        ]
        return small.tokenizer.decode(greedy(small, prompt, 4))

    hi = answer("hi")
    yo = answer("hi", hi, "yo")
    assert done.stdout.splitlines() == [hi, yo, answer("/yo"), answer("hi", hi, "yo", yo, "yo"), hi], done.stderr
    assert done.returncode == 1
    reported = [line for line in done.stderr.splitlines() if not line.startswith("  ")]
    expected = [
        "warning: .*drops the system message",
        "refuses these messages: not a word of that",
        "has 723 tokens, .*context of 600: /reset begins a new one",
        "not valid Unicode",
        "unknown command /nonsense; there are /exit, /help, /load, /reset, /save, /system",
        "/reset takes nothing after it",
        "give a file name",
        "taken.json: exists already",
        "taken.json: no .* in it",
        "nowhere.json: cannot be read",
        "warning: .*drops the system message",  # of the file
        "warning: .*drops the system message",  # of the new one
    ]
    assert len(reported) == len(expected), done.stderr
    for line, pattern in zip(reported, expected, strict=True):
        assert re.match(f"phi3-chat: .*{pattern}", line), (line, pattern)
    assert taken.read_text(encoding="utf-8") == "{}"
    messages = json.loads(saved.read_text(encoding="utf-8"))["messages"]
    assert messages[0] == {"role": "system", "content": "be"}
    assert [message["content"] for message in messages[1:]] == ["hi", hi, "yo", yo]


def at_prompt(seen: str) -> bool:
    return seen.endswith("\n> ")


class Terminal:
    """The program on a terminal of its own, where keys send signals."""

    def __init__(self, *args: str):
        self._leader, follower = pty.openpty()
        become_its_program = "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); " + (
            "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
        )
        self._process = subprocess.Popen(
            [sys.executable, "-c", become_its_program, *COMMAND[1:], *args],
            stdin=follower,
            stdout=follower,
            stderr=follower,
            start_new_session=True,
            env=os.environ | {"TERM": "dumb"},
        )
        os.close(follower)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._leader)

    def type(self, keys: str) -> None:
        os.write(self._leader, keys.encode())

    def read_until(self, enough: Callable[[str], bool], again: str | None = None) -> str:
        """What the program shows until it is enough; after five seconds of silence some keys may be typed again."""
        seen, deadline = "", time.monotonic() + 120  # without the \r that the terminal puts before every \n
        while not enough(seen):
            ready, _, _ = select.select([self._leader], [], [], 5)
            if ready:
                seen += os.read(self._leader, 1000).decode(errors="replace").replace("\r", "")
            elif again is not None:
                self.type(again)
            assert time.monotonic() < deadline, seen
        return seen

    def ask(self, keys: str, again: str | None = None) -> str:
        """What is shown after the echo of some keys, up to the next prompt."""
        self.type(keys)
        return self.read_until(at_prompt, again).partition("\n")[2].removesuffix("> ")

    def end(self) -> int:
        """Ctrl-D -> exit code."""
        self.type("\x04")
        return self._process.wait(timeout=60)


def test_on_a_terminal(demo, reference, tmp_path):
    path, story = tmp_path / "chat.json", "Tell me a long story about the sea."
    with Terminal("--checkpoint", "demo", "--max_new_tokens", "64") as terminal:
        assert "demo: write a message, or /help" in terminal.read_until(at_prompt)
        terminal.type("this line is left")
        terminal.read_until(lambda seen: seen.endswith("left"))
        # Again, because Python misses a signal in the moment before it waits for a key.
        assert terminal.ask("\x03", again="\x03") == ""
        paris = reference(FRANCE)
        assert terminal.ask(FRANCE + "\n") == f"{paris}\n"

        terminal.type(story + "\n")
        terminal.read_until(lambda seen: len(seen.partition("\n")[2].split()) > 8)
        terminal.ask("\x03")
        italy = terminal.ask(ITALY + "\n")
        assert terminal.ask("\x1b[A\x1b[A\x1b[A\n") != ""  # arrows up: France again
        assert terminal.ask(f"/save {path}\n") == ""
        assert "/system TEXT" in terminal.ask("/help\n")
        assert "unknown command" in terminal.ask("/x\n")
        assert terminal.end() == 0

    texts = [message["content"] for message in json.loads(path.read_text(encoding="utf-8"))["messages"]]
    assert texts[::2] == [FRANCE, story, ITALY, FRANCE]
    whole = reference(FRANCE, paris, story, limit=64)
    assert whole.startswith(texts[3])
    assert 0 < len(texts[3]) < len(whole)
    assert texts[5] == reference(*texts[:5], limit=64)
    assert italy.startswith(texts[5])


def test_help_begins_with_examples():
    done = run_program([], "--help")
    assert done.returncode == 0
    assert done.stdout.startswith("phi3-chat: ")
    assert done.stdout.count("\nphi3-chat --checkpoint ") == 2
    for flag in ("--verbose", "--system=TEXT", "--temperature=X", "--max_new_tokens=N"):
        assert f"\n  {flag}\n" in done.stdout

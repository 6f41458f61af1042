"""phi3-chat on a real terminal and in pipes."""

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
from cache_folders import own_cache
from chats import ASSISTANT, END, FRANCE, ITALY, USER, answers_without_memory, greedy, small_chat
from jax.experimental.compilation_cache import compilation_cache

import phi3_jax

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module", autouse=True)
def own_compilation_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A compilation cache for the programs, apart from the user's own; the tests fill it for them, which saves time."""
    folder = tmp_path_factory.mktemp("cache")
    names = {"jax_compilation_cache_dir": str(folder / "phi3_jax" / "compiled")}
    names |= {"jax_persistent_cache_min_compile_time_secs": 0.0}
    before = {name: getattr(jax.config, name) for name in names}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", own_cache(folder))
        for name, value in names.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        yield
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


@pytest.fixture(scope="module")
def small(tiny: phi3_jax.Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> phi3_jax.Checkpoint:
    return small_chat(tiny, tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def reference(demo: phi3_jax.Checkpoint) -> Callable[..., str]:
    return answers_without_memory(demo)


COMMAND = [sys.executable, "-m", "phi3_jax.infer.programs.chat_main"]


def run_program(lines: Sequence[str], *args: str) -> subprocess.CompletedProcess:
    text = "".join(line + "\n" for line in lines).encode(errors="surrogateescape")
    done = subprocess.run([*COMMAND, *args], input=text, capture_output=True, timeout=240)
    return subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())


@pytest.mark.slow
def test_in_a_pipe_every_line_is_a_message_or_a_command(demo, reference):
    system = "You are a pirate."
    lines = [FRANCE, "", ITALY, "/reset", ITALY, f"/system {system}", ITALY]
    done = run_program(lines, "--checkpoint", "demo", "--max_new_tokens", "16", "--verbose")
    paris = reference(FRANCE)
    answers = [paris, reference(FRANCE, paris, ITALY), reference(ITALY), reference(ITALY, system=system)]
    assert done.stdout == "".join(answer + "\n" for answer in answers), done.stderr
    assert len(set(answers)) == 4
    *status, _, _, _, _ = reports = done.stderr.splitlines()
    assert [line.partition(":")[0] for line in status] == ["linear", "attention"], done.stderr
    reports = reports[2:]
    assert reports[0].startswith("phi3-chat: 0 tokens from the cache, 37 read, 8 written in ")
    assert reports[1].startswith("phi3-chat: 44 tokens from the cache, 15 read, 8 written in ")
    assert done.returncode == 0


@pytest.mark.slow
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
        ".*half of a surrogate pair",
        "unknown command /nonsense; there are /exit, /help, /load, /reset, /result, /save, /system",
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
        # As a shell would: the terminal's own program, for which Ctrl-C is not ignored, even if it is for the tests.
        become_its_program = "; ".join(
            [
                "import fcntl, os, signal, sys, termios",
                "fcntl.ioctl(0, termios.TIOCSCTTY, 0)",
                "signal.signal(signal.SIGINT, signal.SIG_DFL)",
                "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])",
            ]
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


@pytest.mark.slow
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

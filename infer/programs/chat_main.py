"""phi3-chat: a conversation with a model, on the terminal or through pipes.

phi3-chat --checkpoint demo
phi3-chat --checkpoint microsoft/Phi-3-mini-4k-instruct --system "Be brief." --temperature 0.7 < questions.txt

Every line is a message, and /help lists the commands. On the terminal Ctrl-C ends an answer, and Ctrl-D the program.
Through a pipe only the answers are written to standard output, each with a newline at its end; the exit code is 1 if
there was something that failed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import io
import sys
from collections.abc import Callable
from pathlib import Path

from absl import flags

from phi3_jax.checkpoint import require_tokenizer
from phi3_jax.command_line.interrupts import forget, interruptible
from phi3_jax.command_line.model_flags import CHECKPOINT
from phi3_jax.command_line.program import run_program, told_warnings

from ..conversation import ContextFullError, Conversation, load_messages, save_messages
from . import flags as common
from .calls import print_calls

_TOPICS = {"Conversation": [common.SYSTEM], **common.TOPICS}


@dataclasses.dataclass(frozen=True)
class _Command:
    """A command, a line that begins with /; `argument` is how /help names its argument, "" if it takes none."""

    run: Callable[[Chat, str], None]
    argument: str
    help: str


class Chat:
    """Takes lines of input, writes answers.

    Attributes:
      over: whether /exit was given.
      failed: whether some line has failed.
    """

    def __init__(self, conversation: Conversation, on_terminal: bool, verbose: bool = False):
        self._conversation, self._on_terminal, self._verbose = conversation, on_terminal, verbose
        self.over = self.failed = False

    def take(self, line: str) -> None:
        """Handles one line: a command, or a message to the model; blank lines are ignored."""
        if not line.strip():
            return
        try:
            if line.startswith("/") and not line.startswith("//"):
                self._obey(line)
            else:
                self._answer(line.removeprefix("/") if line.startswith("//") else line)
        except ContextFullError as error:
            self._fail(f"{error}: /reset begins a new one")
        except ValueError as error:
            self._fail(str(error))

    def _answer(self, text: str | None) -> None:
        written = False
        try:
            # Through a pipe Ctrl-C ends the program, not only an answer.
            with interruptible() if self._on_terminal else contextlib.nullcontext(None) as interrupt:
                for piece in self._conversation.ask(text, interrupt):
                    print(piece.text, end="", flush=True)
                    written = written or piece.text != ""
        except ValueError:
            if written:
                print(flush=True)
            raise
        turn = self._conversation.last
        assert turn is not None
        answer = turn.generation
        if answer.error is not None:
            if written:
                print(flush=True)
            raise ValueError(f"{answer.error}; the message is forgotten")
        if not answer.text and not turn.calls and answer.finish_reason in ("deadline", "interrupt"):
            raise ValueError("the answer was ended before it began; the message is forgotten")
        if written or not turn.calls:
            print(flush=True)
        print_calls(turn.calls, turn.problems, "phi3-chat")
        if turn.calls and self._on_terminal:
            _tell("(give the result of each call, in order, with /result TEXT)")
        if self._on_terminal and answer.finish_reason == "length":
            _tell(f"(cut off after {len(answer.token_ids)} tokens; see --max_new_tokens)")
        if self._verbose:
            read = len(turn.prompt_ids) - turn.reused
            _tell(
                f"phi3-chat: {turn.reused} tokens from the cache, {read} read, {len(answer.token_ids)} written in "
                f"{turn.seconds:.2f} s"
            )

    def _obey(self, line: str) -> None:
        name, _, argument = line.strip().partition(" ")
        argument = argument.strip()
        command = _COMMANDS.get(name)
        if command is None:
            known = ", ".join(sorted(_COMMANDS))
            raise ValueError(f"unknown command {name}; there are {known}. Begin a message with // for one slash")
        if argument and not command.argument:
            raise ValueError(f"{name} takes nothing after it. Begin a message with // for one slash")
        try:
            command.run(self, argument)
        except OSError as error:
            raise ValueError(str(error)) from None

    def _reset(self, _: str) -> None:
        self._conversation.reset()

    def _set_system(self, text: str) -> None:
        told_warnings.clear()  # to warn again if the template drops this one, too
        self._conversation.set_system(text or None)

    def _add_result(self, text: str) -> None:
        self._conversation.add_result(text)
        if not self._conversation.waiting:
            self._answer(None)

    def _save(self, name: str) -> None:
        save_messages(_file(name), self._conversation.messages)

    def _load(self, name: str) -> None:
        path = _file(name)
        told_warnings.clear()
        try:
            self._conversation.restore(load_messages(path))
        except ValueError as error:
            raise ValueError(f"{path}: {error}" if str(path) not in str(error) else str(error)) from None

    def _help(self, _: str) -> None:
        for name, command in _COMMANDS.items():
            _tell(f"  {f'{name} {command.argument}':<14} {command.help}")
        _tell("  //...          a message that begins with a slash")

    def _exit(self, _: str) -> None:
        self.over = True

    def _fail(self, message: str) -> None:
        self.failed = True
        _tell(f"phi3-chat: {' '.join(message.splitlines())}")


_COMMANDS = {
    "/reset": _Command(Chat._reset, "", "begin a new conversation; the system message stays"),
    "/system": _Command(Chat._set_system, "TEXT", "begin a new one with this system message; without TEXT, with none"),
    "/save": _Command(Chat._save, "FILE", "write the conversation into a new JSON file"),
    "/load": _Command(Chat._load, "FILE", "go on with a conversation from such a file"),
    "/result": _Command(Chat._add_result, "TEXT", "what a call of --tools gave; after the last, the model goes on"),
    "/help": _Command(Chat._help, "", "this list"),
    "/exit": _Command(Chat._exit, "", "end the program; so does Ctrl-D"),
}


def _file(name: str) -> Path:
    if not name:
        raise ValueError("give a file name, too")
    return Path(name).expanduser()


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def converse(chat: Chat) -> None:
    """The loop on a terminal."""
    with contextlib.suppress(ImportError):  # not in every Python; with it, `input` edits lines and remembers them
        importlib.import_module("readline")
    _tell(f"{CHECKPOINT.value}: write a message, or /help. Ctrl-C ends an answer, Ctrl-D the program.")
    while not chat.over:
        try:
            chat.take(input("> "))
            forget()  # Ctrl-C has ended the answer
        except EOFError:
            _tell("")
            return
        except KeyboardInterrupt:  # at the prompt
            forget()
            _tell("")


def main() -> int:
    """Loads, then answers line by line."""
    common.check()
    tools = common.tools()
    grammar = common.grammar(tools)  # raises before the model is loaded
    checkpoint = common.load_checkpoint()
    require_tokenizer(checkpoint)
    conversation = Conversation(
        checkpoint,
        common.SYSTEM.value,
        common.sampling(),
        common.MAX_NEW_TOKENS.value,
        common.STOP.value,
        grammar,
        common.options(checkpoint),
        tools,
    )
    chat = Chat(conversation, sys.stdin.isatty(), common.VERBOSE.value)
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # invalid UTF-8 is an error of one line, not of the program
    if sys.stdin.isatty():
        converse(chat)
        return 0
    for line in sys.stdin:
        chat.take(line.removesuffix("\n"))
        if chat.over:
            break
    return int(chat.failed)


def run() -> None:
    """The console script."""
    flags.set_default(common.MAX_NEW_TOKENS, 512)
    run_program("phi3-chat", main, _TOPICS)


if __name__ == "__main__":
    run()

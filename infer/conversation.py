"""A chat with a model, turn by turn: the messages so far, and the model's keys and values for them.

    messages -> encode_chat -> prompt -> Run -> answer -> messages
                                          ^ prompt cache, from one turn to the next

Every turn renders the whole conversation again with the checkpoint's template. The model reads only what differs from
the turn before: the new message, and the last answer from the point where it is tokenised differently than it was
written.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from phi3_jax.checkpoint import Checkpoint
from phi3_jax.checkpoint.atomic_write import new_file
from phi3_jax.json_files import CHAT, read_object
from phi3_jax.text import Message, Tool, ToolCall, ToolCallParser, encode_chat

from .answer import Answer, Generation, Piece, write_answers
from .engine import Options, PromptCache, Run
from .sampling import Grammar, Sampling, stop_strings


class ContextFullError(ValueError):
    """The conversation leaves no room for an answer in the model's context."""


@dataclasses.dataclass(frozen=True)
class Turn:
    """One answer and what it took.

    Attributes:
      generation: the answer.
      prompt_ids: token ids of the conversation before it, as the model saw it.
      reused: how many of these tokens were taken from the prompt cache, and not read again.
      seconds: from the question to the end of the answer, with compilation.
      calls: the functions that the answer calls.
      problems: what looked like a call in it and is none, one line each.
    """

    generation: Generation
    prompt_ids: list[int]
    reused: int
    seconds: float
    calls: Sequence[ToolCall] = ()
    problems: Sequence[str] = ()


class Conversation:
    """A chat with a model.

        conversation = Conversation(checkpoint, "Be brief.")
        for piece in conversation.ask("Who wrote Hamlet?"):
            print(piece.text, end="", flush=True)

    With tools, an answer may call some of them: `last.calls`. Then `add_result` is told what each gave, and `ask(None)`
    goes on.

    Attributes:
      last: the newest turn; None before the first.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        system: str | None = None,
        sampling: Sampling | None = None,
        max_new_tokens: int = 128,
        stop: str | Iterable[str] = (),
        grammar: Grammar | None = None,
        options: Options | None = None,
        tools: Sequence[Tool] | None = None,
    ):
        """Begins with no messages except the system message, if there is one.

        Args:
          sampling: how tokens are picked; the n-th answer, counted from 0, is drawn with seed + n.
          max_new_tokens: the most tokens of an answer.
          stop: a string that ends an answer, or several.
          grammar: what every answer must match.
          options: how the runs are carried out; its prompt cache is for the first one.
          tools: functions that the model may call, as `encode_chat` takes them.

        Raises:
          ValueError: the checkpoint has no tokenizer, or the options ask for `echo`.
        """
        if checkpoint.tokenizer is None:
            raise ValueError("a chat needs a tokenizer: put tokenizer.json or tokenizer.model into the folder")
        self._options = options or Options()
        if self._options.echo:
            raise ValueError("a chat does not read its prompts as a whole, which echo needs: leave it out")
        self._checkpoint, self._tokenizer = checkpoint, checkpoint.tokenizer
        self._sampling = sampling or Sampling()
        self._max_new_tokens, self._stop, self._grammar = max_new_tokens, stop_strings(stop), grammar
        self._tools = tools
        self._system = None if system is None else {"role": "system", "content": system}
        self._messages: list[dict[str, Any]] = []
        self._answered = 0
        self._cache: PromptCache | None = self._options.prompt_cache
        self.last: Turn | None = None

    @property
    def messages(self) -> list[dict[str, Any]]:
        """All messages, the system's included, as `encode_chat` takes them."""
        system = [] if self._system is None else [self._system]
        return [dict(message) for message in [*system, *self._messages]]

    @property
    def waiting(self) -> list[str]:
        """The ids of calls that have no results yet."""
        done = {message.get("tool_call_id") for message in self._messages}
        calls = [call for message in self._messages for call in message.get("tool_calls") or []]
        return [call["id"] for call in calls if call.get("id") not in {None, *done}]

    def add_result(self, text: str) -> None:
        """Adds what the first call that waits for it gave. Raises ValueError if there is none."""
        if not self.waiting:
            raise ValueError("no call waits for a result")
        (call_id, *_), calls = self.waiting, [c for m in self._messages for c in m.get("tool_calls") or []]
        name = next(call["function"]["name"] for call in calls if call["id"] == call_id)
        self._messages.append({"role": "tool", "tool_call_id": call_id, "name": name, "content": text})

    def ask(self, text: str | None, interrupt: Callable[[], bool] | None = None) -> Iterator[Piece]:
        """Yields the answer piece by piece; with the last piece, question and answer are added to the messages.

        A turn that fails, or whose pieces are not all consumed, leaves the conversation as it was. So does a turn that
        is stopped from outside before there is any text, or that ends with finish_reason "error"; if there is text, an
        answer that was only stopped is kept.

        Args:
          text: the user's message; None to answer the results of calls.
          interrupt: called between the calls of the compiled functions; True ends the answer as it is.

        With tools, the text of the pieces is without the calls.

        Raises:
          ContextFullError: the conversation fills the model's context.
          ValueError: the template refuses the messages, or a number makes no sense.

        Warns:
          UserWarning: the template drops a message, for example the system's.
        """
        begin = time.perf_counter()
        question = [] if text is None else [{"role": "user", "content": text}]
        prompt_ids = encode_chat(self._tokenizer, [*self.messages, *question], tools=self._tools)
        run = self._run(prompt_ids)
        answer = Answer(self._checkpoint, stop=self._stop, markers=self._tools is not None)
        parser, content = None if self._tools is None else ToolCallParser(self._tools), ""
        for piece in write_answers(run, [answer], interrupt=interrupt):
            if parser is not None:
                certain = parser.push(piece.text) + (parser.flush() if piece.finish_reason else "")
                piece, content = dataclasses.replace(piece, text=certain), content + certain
            if piece.finish_reason is not None:
                generation = answer.finish()
                if generation.error is None:
                    self._cache = run.prompt_cache()
                calls, problems = (parser.calls, parser.problems) if parser else ([], [])
                seconds = time.perf_counter() - begin
                self.last = Turn(generation, prompt_ids, run.reused, seconds, calls, problems)
                if piece.finish_reason in ("stop", "length") or (generation.text and generation.error is None):
                    said = content.strip() if calls else generation.text
                    self._messages += [*question, self._answer_message(said, calls)]
                    self._answered += 1
            yield piece

    def _answer_message(self, content: str, calls: Sequence[ToolCall]) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": content}
        if calls:
            used = {call.get("id") for each in self._messages for call in each.get("tool_calls") or []}
            # Nine letters and digits: Mistral's template takes no other ids.
            unused = (name for i in itertools.count() if (name := f"call{i:05}") not in used)
            message["tool_calls"] = [call.as_message_part(next(unused)) for call in calls]
        return message

    def reset(self) -> None:
        """Begins a new conversation with the same system message."""
        # The cache stays: what the new prompt has in common with it need not be read again.
        self._messages = []

    def set_system(self, text: str | None) -> None:
        """Begins a new conversation with another system message, or with none."""
        self._system = None if text is None else {"role": "system", "content": text}
        self._messages = []

    def restore(self, messages: Sequence[Any]) -> None:
        """Replaces all messages. Raises ValueError, and warns, as `ask` does."""
        encode_chat(self._tokenizer, messages, tools=self._tools)
        copies = [dict(message) for message in messages]
        has_system = copies[0]["role"] == "system"
        self._system = copies[0] if has_system else None
        self._messages = copies[1:] if has_system else copies

    def _run(self, prompt_ids: list[int]) -> Run:
        context = self._checkpoint.config.max_position_embeddings
        if len(prompt_ids) >= context:
            raise ContextFullError(
                f"with this message the conversation has {len(prompt_ids)} tokens, which leaves no room for an answer "
                f"in the model's context of {context}"
            )
        sampling = dataclasses.replace(self._sampling, seed=(self._sampling.seed + self._answered) % 2**32)
        options = dataclasses.replace(self._options, prompt_cache=self._cache)
        return Run(self._checkpoint, [prompt_ids], [self._max_new_tokens], [sampling], options, [self._grammar])


def save_messages(path: str | os.PathLike[str], messages: Sequence[Message]) -> None:
    """Writes {"messages": [...]} as JSON into a new file, atomically.

    Raises:
      FileExistsError: there is such a file.
      OSError: it cannot be written.
    """
    text = json.dumps({"messages": list(messages)}, ensure_ascii=False, indent=2)
    with new_file(Path(path), private=True) as partial:
        partial.write_text(text + "\n", encoding="utf-8")


def load_messages(path: str | os.PathLike[str]) -> list[Any]:
    """The messages that `save_messages` wrote; `Conversation.restore` checks whether they are valid.

    Raises:
      OSError: it cannot be read.
      ValueError: it holds something else.
    """
    remedy = "name a file that /save wrote"
    try:
        content = read_object(Path(path), CHAT, remedy)
    except OSError as error:
        raise OSError(f"{path}: cannot be read ({error.strerror}); {remedy}") from None
    if not isinstance(content.get("messages"), list):
        raise ValueError(f'{path}: no {{"messages": [...]}} in it; {remedy}')
    return content["messages"]

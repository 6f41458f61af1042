"""Requests in our own form: what the engine is asked for, and what the line of an answer holds."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, Literal

from phi3_jax.checkpoint import Checkpoint, require_tokenizer
from phi3_jax.text import call_schema, encode_chat, parse_tool_calls

from ...answer import Generation
from ...prompts import check_prompt
from ...sampling import Grammar, TokenLogprob
from ...sampling.grammar import GrammarMasks
from ..engine import Job
from .requests import Request


@dataclasses.dataclass(frozen=True)
class Defaults:
    """What lines do not say themselves.

    Attributes:
      max_new_tokens: where a line has no limit of its own.
      chat: a line's "prompt" is what the user says in a chat.
      system: what a chat begins with.
      parse_special: text such as <|user|> in a prompt, without `chat`, is special tokens.
      stop: strings that end an answer.
      seconds: after which an answer ends as it is.
      tools: the functions that the answers of chats may call.
      tool_choice: with "required" an answer is a list of calls, with "one" of one call.
      grammar: what answers must match otherwise.
      logprobs, echo: see `Job`.
    """

    max_new_tokens: int
    chat: bool = False
    system: str | None = None
    parse_special: bool = False
    stop: Sequence[str] = ()
    seconds: float | None = None
    tools: Sequence[Any] | None = None
    tool_choice: Literal["auto", "required", "one"] = "auto"
    grammar: Grammar | None = None
    logprobs: int | None = None
    echo: bool = False

    def is_chat(self, request: Request) -> bool:
        """Whether a line goes through the chat template."""
        return self.chat or request.messages is not None

    def tools_of(self, request: Request) -> Sequence[Any] | None:
        """What an answer may call: the line's own tools, or else, in a chat, the program's."""
        if not self.is_chat(request):
            return None
        return self.tools if request.tools is None else request.tools

    def limit_of(self, request: Request) -> int:
        """The most tokens of an answer."""
        return request.max_new_tokens or self.max_new_tokens

    def grammar_of(self, request: Request) -> Grammar | None:
        """What an answer must match. Raises ValueError if it has to call something, but there is nothing."""
        if self.tool_choice == "auto":
            return self.grammar
        if not (tools := self.tools_of(request)):
            raise ValueError(f"--tool_choice={self.tool_choice} needs --tools")
        return Grammar.json_schema(call_schema(tools, 1 if self.tool_choice == "one" else None))

    def check(self, request: Request) -> None:
        """Raises ValueError, before a model is loaded, for what none can answer."""
        if request.tools is not None and not self.is_chat(request):
            raise ValueError('"tools" are for chats: give "messages", or --chat')
        self.grammar_of(request)

    def check_grammars(self, requests: Iterable[tuple[str, Request]], checkpoint: Checkpoint) -> None:
        """Raises ValueError, with the request's name, for a grammar that cannot be used with this model."""
        seen: set[Grammar] = set()
        for name, request in requests:
            if (grammar := self.grammar_of(request)) is not None and grammar not in seen:
                seen.add(grammar)
                ends, vocabulary = checkpoint.generation.eos_token_ids, checkpoint.config.vocab_size
                try:
                    GrammarMasks(require_tokenizer(checkpoint), [grammar], ends, vocabulary)
                except ValueError as error:
                    raise ValueError(f"{name}: {error}") from error

    def prompt_of(self, request: Request, checkpoint: Checkpoint, name: str) -> list[int]:
        """The token ids of a request. Raises ValueError, with its name, for what this model cannot answer."""
        tokenizer, most = require_tokenizer(checkpoint), checkpoint.config.max_position_embeddings
        try:
            if self.is_chat(request):
                messages = request.messages or [{"role": "user", "content": request.prompt or ""}]
                if self.system is not None:
                    messages = [{"role": "system", "content": self.system}, *messages]
                ids = encode_chat(tokenizer, messages, tools=self.tools_of(request), most=most)
            else:
                text = request.prompt or ""
                ids = tokenizer.encode(text, parse_special=self.parse_special, add_eos=False, most=most)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        if outside := request.sampling.tokens_outside(vocabulary := checkpoint.config.vocab_size):
            raise ValueError(f"{name}: it names tokens {outside[:5]} outside of the vocabulary of {vocabulary}")
        check_prompt(checkpoint, ids, name)
        return ids

    def job_of(self, request: Request, prompt: Sequence[int]) -> Job:
        """What the engine is asked for."""
        return Job(
            prompt,
            self.limit_of(request),
            request.sampling,
            tuple(self.stop),
            self.grammar_of(request),
            self.logprobs,
            self.echo,
            seconds=self.seconds,
        )

    def answer_to(self, request: Request, result: Generation, checkpoint: Checkpoint) -> dict[str, Any]:
        """What the line of an answer holds beside the request's fields."""
        fields: dict[str, Any] = {
            "text": result.text,
            "token_ids": result.token_ids,
            "finish_reason": result.finish_reason,
        }
        if (tools := self.tools_of(request)) is not None:
            reply = parse_tool_calls(result.token_ids, require_tokenizer(checkpoint), tools=tools)
            fields["content"] = reply.content if reply.calls else result.text
            fields["tool_calls"] = [call.as_message_part(f"call{i:05}") for i, call in enumerate(reply.calls)]
            fields |= {"tool_problems": reply.problems} if reply.problems else {}
        fields |= {"error": result.error} if result.error is not None else {}
        for name in ("logprobs", "prompt_logprobs"):
            entries: list[TokenLogprob] | None = getattr(result, name)
            fields |= {name: [dataclasses.asdict(entry) for entry in entries]} if entries is not None else {}
        return fields

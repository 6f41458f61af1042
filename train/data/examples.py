"""A line of a data file -> the texts that are trained on, in token ids, and which of their tokens are learned."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np

from phi3_jax.text import Tokenizer, encode_answers, encode_chat, encode_spans

from ..settings import Settings

_SFT = ({"messages"}, {"prompt", "completion"}, {"text"})
_DPO = ({"messages", "chosen", "rejected"}, {"prompt", "chosen", "rejected"})


@dataclasses.dataclass(frozen=True)
class Text:
    """Tokens int32 [n], and learned bool [n]: which of them the model is to predict. The first one is never learned."""

    tokens: np.ndarray
    learned: np.ndarray


def read_line(line: bytes, tokenizer: Tokenizer, settings: Settings) -> tuple[list[Text], set[str]]:
    """The texts of one line, and the names of its fields that are not used.

    The line is a JSON object. With method "sft" it has one of

      messages: a chat, in the checkpoint's own template; learned are the answers with their end tokens.
      prompt and completion: plain text with no template; learned are the completion and the eos token behind it.
      text: plain text, all of it learned, eos too; if it is longer than a row, it is cut into several texts.

    and with "dpo" messages or prompt, and both chosen and rejected: two answers or completions. These give two texts,
    the chosen one first, in which only that last answer is learned. With loss_on "all", chats and prompts are learned
    as well ("sft" only).

    Raises:
      ValueError: the line cannot be used; says why and what would help.
    """
    record = _parse(line)
    forms = _DPO if settings.method == "dpo" else _SFT
    known = set().union(*forms)
    present = known & record.keys()
    if present not in forms:
        wanted = ", or ".join(" and ".join(sorted(form)) for form in forms)
        raise ValueError(f"it has the fields {sorted(record)}; method={settings.method} needs {wanted}")
    if "text" in present:
        texts = _cut(_encode_plain(tokenizer, "", _string(record, "text"), settings.loss_on), settings.sequence_length)
    elif settings.method == "dpo":
        texts = [_encode_reply(tokenizer, record, name) for name in ("chosen", "rejected")]
    elif "completion" in present:
        completion = _string(record, "completion")
        texts = [_encode_plain(tokenizer, _string(record, "prompt"), completion, settings.loss_on)]
    else:
        texts = [_encode_messages(tokenizer, record["messages"], settings.loss_on)]
    for text in texts:
        _check(text, settings.sequence_length)
    return texts, record.keys() - known


def _parse(line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:  # JSON's and Unicode's errors are ValueErrors
        raise ValueError(f"it is not JSON ({error})") from None
    if not isinstance(record, dict):
        raise ValueError("it is JSON but not an object; write {...} on each line")
    return record


def _string(record: dict[str, Any], name: str) -> str:
    if not isinstance(record[name], str):
        raise ValueError(f"{name} is not a string but {type(record[name]).__name__}")
    return record[name]


def _encode_messages(tokenizer: Tokenizer, messages: Any, loss_on: str) -> Text:
    if loss_on == "all":
        ids = encode_chat(tokenizer, messages, add_generation_prompt=False)
        return _text(ids, [(0, len(ids))])
    return _text(*encode_answers(tokenizer, messages))


def _encode_plain(tokenizer: Tokenizer, prompt: str, completion: str, loss_on: str) -> Text:
    """Both as one plain text, and the eos token behind them."""
    if tokenizer.eos_id is None:
        raise ValueError(f"{tokenizer.source} names no eos token, with which texts have to end; use messages instead")
    text = prompt + completion
    ids, [(begin, end)] = encode_spans(tokenizer, text, [(len(prompt), len(text))])
    return _text([*ids, tokenizer.eos_id], [(0 if loss_on == "all" else begin, end + 1)])


def _encode_reply(tokenizer: Tokenizer, record: dict[str, Any], name: str) -> Text:
    """A chat or a prompt with one of the two answers, of which only that answer is learned."""
    reply = _string(record, name)
    if "prompt" in record:
        return _encode_plain(tokenizer, _string(record, "prompt"), reply, "assistant")
    messages = record["messages"]
    if not isinstance(messages, list):
        raise ValueError(f"messages is not a list but {type(messages).__name__}")
    ids, answers = encode_answers(tokenizer, [*messages, {"role": "assistant", "content": reply}])
    return _text(ids, answers[-1:])


def _text(ids: list[int], learned: list[tuple[int, int]]) -> Text:
    mask = np.zeros(len(ids), bool)
    for begin, end in learned:
        mask[begin:end] = True
    mask[:1] = False
    return Text(np.asarray(ids, np.int32), mask)


def _cut(text: Text, length: int) -> list[Text]:
    """Pieces that fit into a row. The first token of each is not learned, so a last piece of one token is left out."""
    if len(text.tokens) <= length:
        return [text]
    starts = range(0, len(text.tokens) - 1, length)
    pieces = [Text(text.tokens[i : i + length], text.learned[i : i + length].copy()) for i in starts]
    for piece in pieces:
        piece.learned[0] = False
    return pieces


def _check(text: Text, length: int) -> None:
    if len(text.tokens) > length:
        raise ValueError(
            f"it has {len(text.tokens)} tokens, more than a row (sequence_length={length}); raise sequence_length, or "
            "shorten it"
        )
    if not text.learned.any():
        raise ValueError("nothing in it is learned: it has too few tokens")

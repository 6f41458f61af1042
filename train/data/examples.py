"""The fields of a line -> the texts that are trained on, in token ids, and which of their tokens are learned."""

from __future__ import annotations

import dataclasses
import functools
import re
import warnings
from typing import Any, NamedTuple

import numpy as np

from phi3_jax.text import Tokenizer, encode_answers, encode_chat, encode_spans

from ..settings import Settings
from .forms import Chat, Plain, read_form


@dataclasses.dataclass(frozen=True)
class Text:
    """Tokens int32 [n], and learned bool [n]: which of them the model is to predict. The first one is never learned."""

    tokens: np.ndarray
    learned: np.ndarray


class Example(NamedTuple):
    """What a line gives.

    Attributes:
      texts: with method "dpo" two, the chosen one first.
      unused: names of its fields that are not used.
      converted: what was converted to what.
      spelled: a special token that its plain text spells and that was taken as characters; "" if there is none.
    """

    texts: list[Text]
    unused: set[str]
    converted: set[str]
    spelled: str


def read_record(record: dict[str, Any], tokenizer: Tokenizer, settings: Settings) -> Example:
    """The texts of one line. It has one of the forms of forms.py; of these are learned, with method "sft",

      chats: the answers with their end tokens, in the checkpoint's own template;
      prompt and completion: plain text with no template: the completion and the eos token behind it;
      text: plain text, all of it learned, eos too; if it is longer than a row, it is cut into several texts.

    and with "dpo" only the two replies or completions. With loss_on "all", chats and prompts are learned as well ("sft"
    only). Special tokens that plain text spells are tokens with parse_special; in chats, contents are always text.

    Raises:
      ValueError: the line cannot be used; says why and what would help.
    """
    forms, notes = read_form(record, settings.method)
    texts, spelled = [], ""
    for form in forms:
        if isinstance(form, Chat):
            loss_on = settings.loss_on if settings.method == "sft" else "assistant"
            texts.append(_encode_chat(tokenizer, form, loss_on))
        else:
            text = _encode_plain(tokenizer, form, settings)
            texts += _cut(text, settings.sequence_length) if form.may_be_cut else [text]
            if not settings.parse_special and (found := _specials(tokenizer).search(form.prompt + form.completion)):
                spelled = spelled or found[0]
    for each in texts:
        _check(each, settings.sequence_length)
    return Example(texts, notes.unused, notes.converted, spelled)


def _encode_chat(tokenizer: Tokenizer, chat: Chat, loss_on: str) -> Text:
    messages = [each.fields for each in chat.messages]
    more: dict[str, Any] = {"tools": chat.tools, "template_options": chat.options}
    learned = [each.learned for each in chat.messages if each.is_answer]
    if loss_on == "all" and all(learned):
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # of messages that the template drops
            try:
                ids = encode_chat(tokenizer, messages, add_generation_prompt=False, **more)
            except UserWarning as warning:
                raise ValueError(str(warning)) from None
        return _text(ids, [(0, len(ids))])
    ids, answers = encode_answers(tokenizer, messages, **more)
    if loss_on != "all":
        return _text(ids, [span for span, is_learned in zip(answers, learned, strict=True) if is_learned])
    if not chat.messages[-1].is_answer:
        raise ValueError(
            "weights with loss_on=all need a conversation that ends with an answer; leave out what follows"
        )
    text = _text(ids, [(0, len(ids))])
    for (begin, end), is_learned in zip(answers, learned, strict=True):
        text.learned[begin:end] &= is_learned
    return text


def _encode_plain(tokenizer: Tokenizer, plain: Plain, settings: Settings) -> Text:
    """Both as one plain text, and the eos token behind them if they do not end with it."""
    if tokenizer.eos_id is None:
        raise ValueError(f"{tokenizer.source} names no eos token, with which texts have to end; use messages instead")
    text, border = plain.prompt + plain.completion, len(plain.prompt)
    ids, [(begin, end)] = encode_spans(tokenizer, text, [(border, len(text))], parse_special=settings.parse_special)
    if not (settings.parse_special and ids[-1:] == [tokenizer.eos_id]):
        ids, end = [*ids, tokenizer.eos_id], end + 1
    return _text(ids, [(0 if settings.method == "sft" and settings.loss_on == "all" else begin, end)])


@functools.lru_cache(maxsize=4)
def _specials(tokenizer: Tokenizer) -> re.Pattern[str]:
    """Finds special tokens that a text spells."""
    return re.compile("|".join(re.escape(token.content) for token in tokenizer.added_tokens if token.special) or "(?!)")


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

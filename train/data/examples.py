"""The fields of a line -> the texts that are trained on, in token ids, and which of their tokens are learned.

fields -> forms.py: chats and plain texts -> token ids -> truncation.py: cut to the length of a row
"""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from phi3_jax.text import Tokenizer, encode_answers, encode_chat, encode_spans

from ..settings import Settings
from .forms import Chat, Plain, read_form
from .messages import Notes
from .truncation import Text, cut_left, leave_out_turns, too_long


class Example(NamedTuple):
    """What a line gives.

    Attributes:
      texts: with method "dpo" two, the chosen one first.
      unused: names of its fields that are not used.
      converted: what was converted to what.
      spelled: a special token that its plain text spells and that was taken as characters; "" if there is none.
      tokens_cut: how many tokens it has lost because it is longer than a row.
    """

    texts: list[Text]
    unused: set[str]
    converted: set[str]
    spelled: str
    tokens_cut: int = 0


def read_record(record: dict[str, Any], tokenizer: Tokenizer, settings: Settings) -> Example:
    """The texts of one line. It has one of the forms of forms.py; of these are learned, with method "sft",

      chats: the answers with their end tokens, in the checkpoint's own template;
      prompt and completion: plain text with no template: the completion and the eos token behind it;
      text: plain text, all of it learned, eos too; if it is longer than a row, it is cut into several texts.

    and with "dpo" only the two replies or completions. With loss_on "all", chats and prompts are learned as well ("sft"
    only). Special tokens that plain text spells are tokens with parse_special; in chats, contents are always text.

    What is longer than a row is treated as settings.truncate says.

    Raises:
      TooLongError: the line is to be skipped because it is longer than a row.
      ValueError: the line cannot be used; says why and what would help.
    """
    forms, notes = read_form(record, settings.method)
    return encode_forms(forms, notes, tokenizer, settings)


def encode_forms(forms: Sequence[Chat | Plain], notes: Notes, tokenizer: Tokenizer, settings: Settings) -> Example:
    """The texts of what `read_form` found in a line; arguments and errors as for `read_record`."""
    length, loss_on = settings.sequence_length, settings.loss_on if settings.method == "sft" else "assistant"
    encode = functools.partial(_encode, tokenizer, settings)
    texts, lost = [encode(form, loss_on) for form in forms], 0
    _require_learned(texts)
    if isinstance(forms[0], Plain) and forms[0].may_be_cut:
        texts = _pieces(texts[0], length)
        _require_learned(texts)
    elif any(len(text.tokens) > length for text in texts):
        before = sum(len(text.tokens) for text in texts)
        if settings.truncate == "left":
            borders = [_answer_begin(encode, form, settings.method) for form in forms]
            texts = cut_left(texts, borders, length, tokenizer)
        elif settings.truncate == "turns":
            texts = leave_out_turns(forms, lambda form: encode(form, loss_on), length)
        else:
            raise too_long(texts, length, settings.truncate)
        lost = before - sum(len(text.tokens) for text in texts)
    spelled = "" if settings.parse_special else _spelled(forms, tokenizer)
    return Example(texts, notes.unused, notes.converted, spelled, lost)


def _encode(tokenizer: Tokenizer, settings: Settings, form: Chat | Plain, loss_on: str) -> Text:
    if isinstance(form, Chat):
        return _encode_chat(tokenizer, form, loss_on)
    return _encode_plain(tokenizer, form, loss_on, settings.parse_special)


def _require_learned(texts: Sequence[Text]) -> None:
    if not all(text.learned.any() for text in texts):
        raise ValueError("nothing in it is learned: it has too few tokens")


def _answer_begin(encode: Callable[[Chat | Plain, str], Text], form: Chat | Plain, method: str) -> int:
    """Where in a form's tokens its last answer begins, or with "dpo" its reply, also where all of it is learned."""
    if isinstance(form, Chat) and not any(message.is_answer for message in form.messages):
        return len(encode(form, "all").tokens) - 1  # with loss_on="all": any end of it may be kept
    learned = encode(form, "assistant").learned
    begins = np.flatnonzero(learned & ~np.roll(learned, 1))  # the first token is never learned
    return int(begins[0 if method == "dpo" else -1])


def _spelled(forms: Sequence[Chat | Plain], tokenizer: Tokenizer) -> str:
    for form in forms:
        if isinstance(form, Plain) and (found := _specials(tokenizer).search(form.prompt + form.completion)):
            return found[0]
    return ""


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


def _encode_plain(tokenizer: Tokenizer, plain: Plain, loss_on: str, parse_special: bool) -> Text:
    """Both as one plain text, and the eos token behind them if they do not end with it."""
    if tokenizer.eos_id is None:
        raise ValueError(f"{tokenizer.source} names no eos token, with which texts have to end; use messages instead")
    text, border = plain.prompt + plain.completion, len(plain.prompt)
    ids, [(begin, end)] = encode_spans(tokenizer, text, [(border, len(text))], parse_special=parse_special)
    if not (parse_special and ids[-1:] == [tokenizer.eos_id]):
        ids, end = [*ids, tokenizer.eos_id], end + 1
    return _text(ids, [(0 if loss_on == "all" else begin, end)])


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


def _pieces(text: Text, length: int) -> list[Text]:
    """Pieces that fit into a row. The first token of each is not learned, so a last piece of one token is left out."""
    if len(text.tokens) <= length:
        return [text]
    starts = range(0, len(text.tokens) - 1, length)
    pieces = [Text(text.tokens[i : i + length], text.learned[i : i + length].copy()) for i in starts]
    for piece in pieces:
        piece.learned[0] = False
    return pieces

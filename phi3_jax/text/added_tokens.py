"""Added tokens: strings that are cut out of a text before the vocabulary sees it; and which of them are special."""

import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from phi3_jax.text.templates import process

# Unicode's White_Space, as in the tokenizers library; Python's str.strip() would also strip U+001C..U+001F.
_WHITE_SPACE = frozenset("\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000") | {
    chr(c) for c in range(0x2000, 0x200B)
}
_WORD_CATEGORIES = frozenset(["Lu", "Ll", "Lt", "Lm", "Lo", "Mn", "Mc", "Me", "Nd", "Nl", "Pc"])

# What ends a turn or a text in this family, its fine-tunes and its relatives.
END_NAMES = frozenset(["<|end|>", "<|endoftext|>", "<|im_end|>", "<|eot_id|>", "<|end_of_text|>", "<|return|>"])
_OWN_NAMES = re.compile(  # of roles and padding
    r"<\|(system|user|assistant|tool|im_start|im_sep|start_header_id|end_header_id|begin_of_text|pad|endofprompt"
    r"|fim_\w+|(placeholder|dummy|reserved)\w*)\|>|\[/?INST\]|\[PAD\d*\]|<pad>|<unk>|<s>|</s>"
)
_PARTS = re.compile(r"</?(think|thinking|tool_call|tool_response|tools|answer|solution)>")  # of what is said
_MARKER = re.compile(r"<\|/?\w+\|>")  # how they are all spelled


@dataclass(frozen=True)
class AddedToken:
    """A string that is cut out of the text before the vocabulary sees it.

    `lstrip` / `rstrip` also take the white space before / after it; `single_word` matches only between non-word
    characters; a `special` one matches only where the caller allows it: text that a user typed never becomes it.
    `skip_special_tokens` hides a `hidden` one. One with `normalized` is looked for in what the normaliser makes of the
    text between the others, where it looks like that. `spelling` is what is decoded instead of the content.
    """

    id: int
    content: str
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    special: bool = True
    hidden: bool = True
    normalized: str | None = None
    spelling: str | None = None


def is_hidden(content: str, flagged: bool) -> bool:
    """Whether `skip_special_tokens` hides a token: the file's flag says so, or its name is known, which flags forget.

    `<think>` and `<|tool_call|>` stay visible where the file wants that: they are part of an answer.
    """
    return flagged or content in END_NAMES or _OWN_NAMES.fullmatch(content) is not None


def is_special(content: str, hidden: bool, template: str) -> bool:
    """Whether text that a user typed must not become this token.

    Hidden tokens, those spelled like `<|word|>` (templates make them of a role), and what the chat template writes,
    unless it is a plain word.

    Args:
      template: the result of `template_text`.
    """
    written = content in template and not (
        content.isspace() or content.strip().isalnum() or _PARTS.fullmatch(content.strip())
    )
    return hidden or _MARKER.fullmatch(content) is not None or written


def template_text(chat_template: str | None) -> str:
    """What a chat template itself may write: its text and its string constants, U+0000 between them."""
    if not chat_template:
        return ""
    try:
        return process.words(chat_template)
    except (ValueError, OSError):  # which is told where the template is used
        return chat_template


class Cutter:
    """Cuts texts at some added tokens, the longest first where several begin.

    Args:
      tokens: each with the string to look for.
    """

    def __init__(self, tokens: Iterable[tuple[str, AddedToken]]):
        self._tokens = dict(tokens)
        strings = sorted(self._tokens, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, strings)) or "(?!)")  # (?!) matches nowhere

    def cut(self, text: str) -> Iterator[tuple[str | AddedToken, int]]:
        """Yields the text's pieces and added tokens in order, and where each starts."""
        position = 0
        for match in self._pattern.finditer(text):
            token = self._tokens[match[0]]
            start, end = match.span()
            if token.single_word and (_is_word(text[start - 1 : start]) or _is_word(text[end : end + 1])):
                continue
            while token.lstrip and start > position and text[start - 1] in _WHITE_SPACE:
                start -= 1
            while token.rstrip and end < len(text) and text[end] in _WHITE_SPACE:
                end += 1
            if position < start:
                yield text[position:start], position
            yield token, start
            position = end
        if position < len(text):
            yield text[position:], position


def _is_word(character: str) -> bool:
    return character != "" and unicodedata.category(character) in _WORD_CATEGORIES

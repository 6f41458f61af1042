"""What people write stays text: no word of a message, of its role or of a tool becomes a special token."""

import re
from collections import Counter
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

from phi3_jax.text.added_tokens import END_NAMES
from phi3_jax.text.messages import Chat, variables
from phi3_jax.text.templates.template import NONCHARACTERS, render, vocabulary
from phi3_jax.text.tokenizer import Tokenizer

# Roles from which a template may make a control token, as Phi-4-mini's does: '<|' + role + '|>'. Other roles may only
# if the template names them: <|end|> and <|endoftext|> are no headers.
_ROLES = frozenset(
    ["system", "user", "assistant", "tool", "developer", "function", "ipython", "tool_response", "observation"]
)


def write(tokenizer: Tokenizer, chat: Chat, add_generation_prompt: bool) -> str:
    """The chat as the template writes it. Raises ValueError as `render_chat`."""
    return render(tokenizer, variables(tokenizer, chat, add_generation_prompt), _characters(chat))


class Literals:
    """Special tokens' strings in a chat, taken apart by a mark that `Tokenizer.encode` drops again.

    Raises:
        ValueError: the texts hold every noncharacter.

    Attributes:
        mark: a character that is neither in the chat nor in the template.
    """

    def __init__(self, tokenizer: Tokenizer, chat: Chat):
        self._tokenizer, self._chat = tokenizer, chat
        self.mark = unused_noncharacter(tokenizer, chat)
        self._specials = [token.content for token in tokenizer.added_tokens if token.special and token.content]
        letters = sorted({ord(c) for content in self._specials for c in content if not c.isspace()})
        self._veils = {old: 0x100000 + i for i, old in enumerate(letters)}
        self._present = [content for content in self._specials if any(content in text for text in chat.texts())]

    def write(self, add_generation_prompt: bool) -> str:
        """The chat as the template writes it, with marks. Raises ValueError as `prepare`."""
        return self.render(self.prepare(add_generation_prompt), add_generation_prompt)

    def prepare(self, add_generation_prompt: bool) -> Chat:
        """The chat with marks, so that the special tokens in what the template makes of it are all its own.

        Raises:
            ValueError: a text holds a special token of one character, which cannot be taken apart; or the template
                makes a special token out of a role that it does not name, or out of other words; or what it writes
                depends on special tokens' strings in a message.
        """
        if short := [content for content in self._present if len(content) == 1]:
            raise ValueError(
                f"A message holds {short}, special tokens of one character; remove them from the messages."
            )
        self.check_roles(add_generation_prompt)
        chat = self._chat.map(self._defuse)
        guarded = self._except_roles(lambda text: self._guard(self._defuse(text)))
        text = self.render(chat, add_generation_prompt)
        if guarded != chat:
            # A word such as "end", or ">" at a beginning, completes a special token where the template writes the rest.
            separate = self.render(guarded, add_generation_prompt)
            if self._unmarked(separate) == self._unmarked(text):
                chat, text = guarded, separate
        self._check_words(text, add_generation_prompt)
        if self._present and self._unmarked(text) != write(self._tokenizer, self._chat, add_generation_prompt):
            raise ValueError(
                f"{self._tokenizer.source}: what the chat template writes depends on {self._present[:3]} in a message, "
                "which are special tokens and stay text; remove them from the messages."
            )
        return chat

    def _check_words(self, text: str, add_generation_prompt: bool) -> None:
        """Raises ValueError if the template makes a special token out of the letters of words, cut or changed."""
        said = self._unmarked(text)
        for change, undo in ((self._spread, self._unmarked), (self._veil, self._unveil)):
            changed = self._except_roles(change)
            given = variables(self._tokenizer, changed, add_generation_prompt)
            try:
                apart = render(self._tokenizer, given, _characters(changed), self._as_data(change))
            except ValueError:  # the template looks at words, and these it does not know
                continue
            more = self._special_tokens(text) - self._special_tokens(apart)
            if more and undo(apart) == said:
                raise ValueError(
                    f"{self._tokenizer.source}: the chat template makes the control token {min(more)!r} out of the "
                    "words of a message; change these words."
                )

    def _unmarked(self, text: str) -> str:
        return text.replace(self.mark, "")

    def _veil(self, text: str) -> str:
        """Other characters for those of special tokens, as many: a template may cut text by its length."""
        return text.translate(self._veils)

    def _unveil(self, text: str) -> str:
        return self._unmarked(text).translate({new: old for old, new in self._veils.items()})

    def _except_roles(self, function: Callable[[str], str]) -> Chat:
        """The chat with every text changed; roles, which templates compare, are only defused."""
        chat = self._chat.map(function)
        for before, after in zip(self._chat.messages, chat.messages, strict=True):
            after["role"] = self._defuse(before["role"])
        return chat

    def check_roles(self, add_generation_prompt: bool) -> None:
        """Raises ValueError if the template makes a special token out of a role that it does not name."""
        named = _ROLES | vocabulary(self._tokenizer).compared
        for index, message in enumerate(self._chat.messages):
            # A template may compare contents with "end", too.
            if (role := message["role"]) in named and f"<|{role}|>" not in END_NAMES:
                continue
            chat = self._chat.map(self._defuse)
            made = self._special_tokens(self.render(chat, add_generation_prompt))
            chat.messages[index]["role"] = f"{self.mark}{chat.messages[index]['role']}{self.mark}"
            if more := made - self._special_tokens(self.render(chat, add_generation_prompt)):
                raise ValueError(
                    f"{self._tokenizer.source}: the chat template makes the control token {min(more)!r} out of "
                    f"messages[{index}], of role {role!r}; use a role that the template knows, such as 'user'."
                )

    def render(self, chat: Chat, add_generation_prompt: bool) -> str:
        """What the template makes of a chat with marks."""
        given = variables(self._tokenizer, chat, add_generation_prompt)
        return render(self._tokenizer, given, _characters(chat), self._as_data(self._defuse))

    def _as_data(self, change: Callable[[str], str]) -> dict[str, Any] | None:
        """A change of texts as the sandbox takes it."""
        if change == self._veil:
            return {"letters": {chr(old): chr(new) for old, new in self._veils.items()}}
        if change == self._spread:
            return {"pattern": r"(\S)", "replacement": rf"\1{self.mark}"}
        return (
            self._present
            and {
                "pattern": f"(?s:(?=({_any_of(self._present)}))(.))",
                "replacement": rf"\2{self.mark}",
            }
        ) or None

    def _special_tokens(self, text: str) -> Counter[str]:
        # Many searches for one string are faster than one for many.
        return Counter({special: count for special in self._specials if (count := text.count(special))})

    def _spread(self, text: str) -> str:
        """Puts the mark behind every letter; white space stays as templates look for it."""
        return re.sub(r"\S+", lambda word: self.mark.join(word[0]) + self.mark, text)

    def _defuse(self, text: str) -> str:
        """Puts the mark behind the first character of every special token's string, overlapping ones included."""
        if not self._present:
            return text
        # A look-ahead consumes nothing, so a string that starts inside of another one is found too.
        return re.sub(f"(?=({_any_of(self._present)}))(.)", rf"\2{self.mark}", text, flags=re.S)

    def _guard(self, text: str) -> str:
        """Puts the mark around words that could be a part of a special token, with white space left outside."""
        words = text.strip()
        if not words:
            return text
        fragments = _fragments(tuple(self._specials))
        lengths = range(1, min(fragments.longest, len(words)) + 1)
        is_ending = any(words[:n] in fragments.ends for n in lengths)
        is_beginning = any(words[-n:] in fragments.beginnings for n in lengths)
        before = self.mark if is_ending or words in fragments.all else ""
        return text.replace(words, f"{before}{words}{self.mark if is_beginning else ''}", 1)


class _Fragments(NamedTuple):
    """Proper beginnings and ends of special tokens, the length of the longest, and all tokens in one text."""

    beginnings: frozenset[str]
    ends: frozenset[str]
    longest: int
    all: str


@lru_cache(maxsize=8)
def _fragments(specials: tuple[str, ...]) -> _Fragments:
    return _Fragments(
        frozenset(s[:n] for s in specials for n in range(1, len(s))),
        frozenset(s[n:] for s in specials for n in range(1, len(s))),
        max(map(len, specials), default=1) - 1,
        "\0".join(specials),
    )


def _any_of(texts: list[str]) -> str:
    """A pattern for these texts, the longest first; `(?!)` matches nowhere."""
    return "|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or "(?!)"


def unused_noncharacter(tokenizer: Tokenizer, chat: Chat, used: str = "") -> str:
    """A character that is nowhere in the chat, the template and `used`. Raises ValueError if there is none."""
    text = "".join([*chat.texts(), tokenizer.chat_template or "", used])
    mark = next((c for c in NONCHARACTERS if c not in text), None)
    if mark is None:
        raise ValueError("The messages hold every noncharacter from U+FDD0 to U+FDEF; remove one of them.")
    return mark


def _characters(chat: Chat) -> int:
    return sum(map(len, chat.texts()))

"""What people write stays text: no word of a message, of its role or of a tool becomes a special token.

A chat is rendered as it is, and twice in colours that show whose word each character is (see `provenance`). A special
token's string in the text counts only where all of its characters are the template's own, or a role that it knows; the
others get a mark, with which `Tokenizer.encode` leaves them text.
"""

import bisect
import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from phi3_jax.text.added_tokens import END_NAMES
from phi3_jax.text.messages import Chat, texts_of, variables
from phi3_jax.text.templates.provenance import LOST, ROLE, TEMPLATE, Colours
from phi3_jax.text.templates.template import NONCHARACTERS, own_names, render, require_template, vocabulary
from phi3_jax.text.tokenizer import Tokenizer

# Roles from which a template may make a control token, as Phi-4-mini's does: '<|' + role + '|>'. Other roles may only
# if the template names them: <|end|> and <|endoftext|> are no headers.
_ROLES = frozenset(
    ["system", "user", "assistant", "tool", "developer", "function", "ipython", "tool_response", "observation"]
)
_PRIVATE = re.compile("[\U000f0000-\U0010ffff]")  # planes 15 and 16: what colours are made of
_PLANES = ((0xF0000, 0xFFFFE), (0x100000, 0x10FFFE))


def write(tokenizer: Tokenizer, chat: Chat, add_generation_prompt: bool) -> str:
    """The chat as the template writes it. Raises ValueError as `render_chat`."""
    given, _ = variables(tokenizer, chat, add_generation_prompt)
    return render(tokenizer, given, _characters(chat))[0]


@dataclass(frozen=True)
class Written:
    """A chat as the template writes it, judged.

    Attributes:
        text: what it writes.
        cuts: places inside of special tokens' strings that stay text.
        single: special tokens of one character that would have to stay text.
    """

    text: str
    cuts: tuple[int, ...]
    single: tuple[str, ...]

    def marked(self, mark: str) -> str:
        """The text with a mark in every string that stays text. Raises ValueError if one has only one character."""
        if self.single:
            raise ValueError(
                f"A message holds {list(self.single)}, special tokens of one character; remove them from the messages."
            )
        places = [0, *self.cuts, len(self.text)]
        return mark.join(self.text[begin:end] for begin, end in itertools.pairwise(places))

    def place(self, at: int) -> int:
        """Where a place of the text is in `marked`."""
        return at + bisect.bisect_left(self.cuts, at)


def judge(tokenizer: Tokenizer, chat: Chat, add_generation_prompt: bool) -> Written:
    """Renders a chat, and finds the special tokens' strings that are not the template's.

    Raises:
        ValueError: as `write`; or the template makes a special token out of a role that it does not know; or whose its
            words are cannot be followed through what it does with them.
    """
    specials = tuple(token.content for token in tokenizer.added_tokens if token.special and token.content)
    given, own = variables(tokenizer, chat, add_generation_prompt)
    if not specials:
        return Written(render(tokenizer, given, _characters(chat))[0], (), ())
    letters = _letters(specials)
    own |= {"names": own_names(tokenizer, given)}
    used = "".join([*texts_of(given), require_template(tokenizer), *tokenizer.named_tokens.values()])
    for _ in range(3):
        firsts = _unused(used, 3 * len(letters))
        palettes = [{"letters": letters, "first": first, "own": own} for first in firsts]
        text, *coloured = render(tokenizer, given, _characters(chat), palettes)
        colours = [_colours(letters, first) for first in firsts]
        if all(each.plain(seen) == text for each, seen in zip(colours, coloured, strict=True)):
            return _Judge(tokenizer, chat, specials, text, colours, coloured).judge()
        used += text  # which may hold such characters that stood in escapes
    raise ValueError(
        f"{tokenizer.source}: the chat template changes its own words in a way that cannot be followed, so that they "
        "cannot be told from those of messages; simplify the template."
    )


class _Judge:
    """One rendered chat.

    Args:
        specials: the special tokens.
        text: what the template writes.
        colours, coloured: two palettes, and the text in each of them.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        chat: Chat,
        specials: Sequence[str],
        text: str,
        colours: Sequence[Colours],
        coloured: Sequence[str],
    ):
        self._tokenizer, self._chat, self._specials = tokenizer, chat, specials
        self._text, self._colours, self._coloured = text, colours, coloured
        self._known = _ROLES | {role.casefold() for role in vocabulary(tokenizer).compared}

    def judge(self) -> Written:
        """Where special tokens stay text. Raises ValueError as the function."""
        cuts, single = set(), set()
        for special in self._specials:
            own = [colours.paint(special, TEMPLATE) for colours in self._colours]
            for begin in _places(special, self._text):
                end = begin + len(special)
                if all(seen.startswith(painted, begin) for seen, painted in zip(self._coloured, own, strict=True)):
                    continue
                theirs = next((at for at in range(begin, end) if self._colour(at) is None), None)
                if theirs is None:
                    self._check_genuine(special, begin)
                elif len(special) == 1:
                    single.add(special)
                else:  # beside a character of people's, and so inside of no special token that counts
                    cuts.add(theirs + 1 if theirs + 1 < end else theirs)
        return Written(self._text, tuple(sorted(cuts)), tuple(sorted(single)))

    def _colour(self, at: int) -> int | None:
        one, other = (colours.colour(seen[at]) for colours, seen in zip(self._colours, self._coloured, strict=True))
        return one if one == other else None

    def _check_genuine(self, special: str, begin: int) -> None:
        """Raises ValueError if the token is made of a role that the template does not know, or of lost words."""
        kinds = [self._colour(begin + i) for i in range(len(special))]
        if LOST in kinds:
            raise ValueError(
                f"{self._tokenizer.source}: the chat template makes {special!r} of numbers, or changes words until "
                "nobody can tell whether it is its own or a message's; write it out in the template."
            )
        role = "".join(c for c, kind in zip(special, kinds, strict=True) if kind == ROLE)
        if role.casefold() in self._known and special not in END_NAMES:
            return
        roles = [message["role"] for message in self._chat.messages]
        index = next((i for i, each in enumerate(roles) if role.casefold() in each.casefold()), 0)
        raise ValueError(
            f"{self._tokenizer.source}: the chat template makes the control token {special!r} out of "
            f"messages[{index}], of role {roles[index]!r}; use a role that the template knows, such as 'user'."
        )


def unused_noncharacter(tokenizer: Tokenizer, chat: Chat, used: str = "") -> str:
    """A character that is nowhere in the chat, the template and `used`. Raises ValueError if there is none."""
    text = "".join([*chat.texts(), tokenizer.chat_template or "", used])
    mark = next((c for c in NONCHARACTERS if c not in text), None)
    if mark is None:
        raise ValueError("The messages hold every noncharacter from U+FDD0 to U+FDEF; remove one of them.")
    return mark


def _characters(chat: Chat) -> int:
    return sum(map(len, chat.texts()))


def _places(special: str, text: str) -> Iterator[int]:
    """Where it is, also where it overlaps itself. Many searches for one string are faster than one for many."""
    at = text.find(special)
    while at >= 0:
        yield at
        at = text.find(special, at + 1)


@lru_cache(maxsize=8)
def _letters(specials: tuple[str, ...]) -> str:
    """The characters that have colours: those of special tokens, also in other cases, and what opens a directive."""
    letters = {each for special in specials for c in special for each in (c, c.upper(), c.lower()) if len(each) == 1}
    return "".join(sorted(letters | set("%{}")))


@lru_cache(maxsize=8)
def _colours(letters: str, first: int) -> Colours:
    return Colours(letters, first)


def _unused(used: str, count: int) -> tuple[int, int]:
    """Where two palettes begin, of so many code points that are not used."""
    taken = {ord(c) for c in _PRIVATE.findall(used)}
    firsts = (first for begin, end in _PLANES for first in range(begin, end - count, count))
    free = (first for first in firsts if not taken.intersection(range(first, first + count)))
    one, other = next(free, None), next(free, None)
    if one is None or other is None:
        raise ValueError("The messages use every character for private use of planes 15 and 16; remove some of them.")
    return one, other

"""Ranges of characters -> ranges of tokens, for training on only some parts of a text."""

from collections.abc import Sequence

from phi3_jax.text.tokenizer import Part, Tokenizer

Span = tuple[int, int]


def encode_spans(
    tokenizer: Tokenizer,
    text: str,
    spans: Sequence[Span],
    *,
    parse_special: bool = False,
    add_bos: bool | None = None,
    literal_mark: str | None = None,
) -> tuple[list[int], list[Span]]:
    """Token ids of a text, the same as `Tokenizer.encode` gives, and the tokens of some ranges of its characters.

    White space that an added token takes (`lstrip`, `rstrip`) belongs to that token, and an added token to the range
    in which it begins.

    Args:
      spans: ranges [begin, end) of characters.

    Returns:
      the ids, and for each span the range [begin, end) of indices into them.

    Raises:
      ValueError: a span begins or ends inside of a token; else as `Tokenizer.encode`.
    """
    parts = list(tokenizer.parts(text, parse_special=parse_special, literal_mark=literal_mark))
    plain = [token_id for part in parts for token_id in part.ids]
    ids = tokenizer.with_bos(plain, add_bos)
    shift = len(ids) - len(plain)
    borders = [tuple(_tokens_before(tokenizer, parts, at, literal_mark) + shift for at in span) for span in spans]
    return ids, [(begin, end) for begin, end in borders]


def _tokens_before(tokenizer: Tokenizer, parts: Sequence[Part], at: int, literal_mark: str | None) -> int:
    count = 0
    for part in parts:
        if at <= part.start:
            break
        if at < part.start + len(part.text):
            left, right = part.text[: at - part.start], part.text[at - part.start :]
            if literal_mark is not None:
                left, right = left.replace(literal_mark, ""), right.replace(literal_mark, "")
            return count + _tokens_of_left(tokenizer, part.ids, left, right)
        count += len(part.ids)
    return count


def _tokens_of_left(tokenizer: Tokenizer, ids: Sequence[int], left: str, right: str) -> int:
    """How many of the ids of `left + right` spell `left`; sentencepiece vocabularies put a space in front of it."""
    wanted, spelled = left.encode(), b""
    for index, token_id in enumerate(ids):
        if spelled in (wanted, b" " + wanted):
            return index
        spelled += tokenizer.token_bytes(token_id)
    raise ValueError(
        f"the tokenizer makes one token of the end of {left[-20:]!r} and the beginning of {right[:20]!r}, of which "
        "only one is to be learned; remove the white space between them, or move it from the one to the other"
    )

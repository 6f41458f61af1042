"""What a tokenizer lets us know of long texts before they are encoded: the least number of ids, and where to cut.

The tokenizers library takes a hundred bytes of memory for each byte of a text, sentencepiece fifty.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from tokenizers.pre_tokenizers import ByteLevel

SPACE_MARK = "\u2581"  # how sentencepiece vocabularies spell a space
_PART = 1 << 16  # characters that are encoded at a time
# Behind one space between two letters. The second part begins without the space, as the normaliser puts one before it.
_BETWEEN_WORDS = re.compile("(?<=[A-Za-z]) (?=[A-Za-z])")
_KEEPING = ("ByteLevel", "Metaspace", "Split")  # pre-tokenizers that drop nothing
_PREPEND = {"type": "Prepend", "prepend": SPACE_MARK}
_REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE_MARK}


def longest_piece(spec: Mapping[str, Any]) -> int | None:
    """The most characters of a text that one id can stand for; None where a text may lose characters before."""
    if not all(step in (_PREPEND, _REPLACE) for step in _steps(spec.get("normalizer"), "normalizers")):
        return None
    steps, vocabulary = _steps(spec.get("pre_tokenizer"), "pretokenizers"), spec["model"]["vocab"]
    if any(step["type"] not in _KEEPING or step.get("behavior") == "Removed" for step in steps):
        return None
    is_byte_level = any(step["type"] == "ByteLevel" for step in steps)
    if not (vocabulary.keys() >= set(ByteLevel.alphabet()) if is_byte_level else _has_bytes(spec)):
        return None  # one unknown token may stand for any number of characters
    return max(map(len, vocabulary))


def has_separate_words(spec: Mapping[str, Any]) -> bool:
    """Whether `cut` may be used: a text is encoded as a whole, and no piece reaches over the border of two words."""
    normalizers = _steps(spec.get("normalizer"), "normalizers")
    if spec.get("pre_tokenizer") is not None or normalizers != [_PREPEND, _REPLACE] or not _has_bytes(spec):
        return False
    if spec["model"].get("ignore_merges"):  # then a short last part might be taken for a piece
        return False
    return are_separate(spec["model"]["vocab"])


def are_separate(pieces: Iterable[str]) -> bool:
    """Whether none of a vocabulary's pieces reaches over the border of two words.

    Merges do not look further than their pieces do, so that what stands on one side of a border changes nothing on the
    other.
    """
    return not any(re.search(f"[^{SPACE_MARK}]{SPACE_MARK}", piece) for piece in pieces)


def cut(text: str) -> Iterator[str]:
    """The text in parts, without the spaces between them."""
    begin = 0
    while len(text) - begin > 2 * _PART and (border := _BETWEEN_WORDS.search(text, begin + _PART)):
        yield text[begin : border.start()]
        begin = border.end()
    yield text[begin:]


def _steps(spec: Any, name: str) -> list[dict[str, Any]]:
    if spec is None:
        return []
    return list(spec[name]) if spec.get("type") == "Sequence" else [spec]


def _has_bytes(spec: Mapping[str, Any]) -> bool:
    """Whether a character that is no piece becomes the pieces of its bytes."""
    model = spec["model"]
    return bool(model.get("byte_fallback")) and all(f"<0x{byte:02X}>" in model["vocab"] for byte in range(256))

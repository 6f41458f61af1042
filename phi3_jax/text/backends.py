"""The two halves of a Tokenizer: text piece -> ids (two libraries) and ids -> text (two families of vocabulary).

Encoders see only text without special tokens: `Tokenizer` has cut those out already, once for both libraries.
Decoders work token by token. Decoding a whole sequence uses the same code as streaming, which only lets complete
characters go earlier: see ByteFallbackDecoder for the one case where that makes a difference.
"""

import codecs
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import sentencepiece
import tokenizers

SPACE_MARK = "\u2581"  # how sentencepiece vocabularies spell a space


@dataclass(frozen=True)
class AddedToken:
    """A string that is cut out of the text before the vocabulary sees it.

    `lstrip` / `rstrip` also take the white space before / after it; `single_word` matches only between non-word
    characters; a `special` one matches only where the caller allows it, and `skip_special_tokens` hides it.
    """

    id: int
    content: str
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    special: bool = True


class PieceEncoder(Protocol):
    """Turns plain text into ids."""

    def encode(self, piece: str, *, at_start: bool) -> list[int]:
        """Ids of one piece of plain text; `at_start` tells whether the piece opens the whole text."""
        ...


class SentencePieceEncoder:
    """`tokenizer.model`: the sentencepiece library puts a space mark in front of every piece by itself."""

    def __init__(self, processor: sentencepiece.SentencePieceProcessor):
        self._processor = processor

    def encode(self, piece: str, *, at_start: bool) -> list[int]:
        """See PieceEncoder; every piece is treated alike."""
        return list(self._processor.encode(piece))


class TokenizersEncoder:
    """The normaliser, pre-tokenizer and BPE model of a `tokenizer.json` document, without its added tokens.

    Raises:
        ValueError: the document is not a BPE tokenizer that the tokenizers library can build.
    """

    def __init__(self, spec: Mapping[str, Any], added_tokens: tuple[AddedToken, ...], source: str):
        # Merges derived from a vocabulary can produce a special token, which plain text must never become.
        forbidden = {token.content for token in added_tokens if token.special}
        merges = [m for m in spec["model"]["merges"] if _merged(m) not in forbidden]
        model = {**spec["model"], "type": "BPE", "merges": merges}
        pre = spec.get("pre_tokenizer")
        self._start = _build(spec, model, pre, source)
        inner = _without_first_prefix(pre)
        self._inner = self._start if inner == pre else _build(spec, model, inner, source)

    def encode(self, piece: str, *, at_start: bool) -> list[int]:
        """See PieceEncoder."""
        library = self._start if at_start else self._inner
        return list(library.encode(piece, add_special_tokens=False).ids)


def _merged(merge: str | list[str]) -> str:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left + right


def _build(spec: Mapping[str, Any], model: dict[str, Any], pre_tokenizer: Any, source: str) -> tokenizers.Tokenizer:
    document = {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": spec.get("normalizer"),
        "pre_tokenizer": pre_tokenizer,
        "model": model,
    }
    try:
        return tokenizers.Tokenizer.from_str(json.dumps(document))
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"{source}: the tokenizers library refuses it ({error}); download the file again.") from error


def _without_first_prefix(pre_tokenizer: Any) -> Any:
    """The same pre-tokenizer for a piece that does not open the text ("first" asks for a space mark only there)."""
    if not isinstance(pre_tokenizer, dict):
        return pre_tokenizer
    if pre_tokenizer.get("type") == "Sequence":
        return {**pre_tokenizer, "pretokenizers": [_without_first_prefix(p) for p in pre_tokenizer["pretokenizers"]]}
    if pre_tokenizer.get("prepend_scheme") == "first":
        return {**pre_tokenizer, "prepend_scheme": "never"}
    return pre_tokenizer


class PieceDecoder(Protocol):
    """Turns vocabulary pieces into text, incrementally. `strips_leading_space`: one space at its start is dropped."""

    strips_leading_space: bool

    def bytes_of(self, piece: str) -> bytes:
        """The UTF-8 bytes, not always whole characters, that a vocabulary piece stands for."""
        ...

    def push(self, piece: str) -> str:
        """The text that is certain once this vocabulary piece has been added."""
        ...

    def release(self) -> str:
        """The complete characters among the text that is still held back; they are not held any longer."""
        ...

    def flush(self) -> str:
        """The text still held back, at the end of the sequence."""
        ...


class ByteFallbackDecoder:
    """Sentencepiece vocabularies: space marks, `<0x0A>`-like byte tokens, one leading space dropped from the text.

    A run of byte tokens that is not valid UTF-8 becomes one U+FFFD per byte, all of the run, as in the tokenizers
    library. A run is therefore certain only when another kind of token ends it. A stream cannot wait for that: a line
    break would come one token late. What it has released stays as it is: the bytes 0A FF are two U+FFFD in a decode,
    and a line break and one U+FFFD in a stream. Only a run that is broken after a complete character differs.
    """

    _BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")

    def __init__(self, strip_leading_space: bool):
        self.strips_leading_space = self._strip = strip_leading_space
        self._run = bytearray()

    def bytes_of(self, piece: str) -> bytes:
        """See PieceDecoder."""
        if byte := self._BYTE.fullmatch(piece):
            return bytes([int(byte[1], 16)])
        return piece.replace(SPACE_MARK, " ").encode("utf-8")

    def push(self, piece: str) -> str:
        """See PieceDecoder."""
        if self._BYTE.fullmatch(piece):
            self._run += self.bytes_of(piece)
            return ""
        return self._emit(self._end_run() + self.bytes_of(piece).decode("utf-8"))

    def release(self) -> str:
        """See PieceDecoder."""
        try:
            text = self._run.decode("utf-8")
        except UnicodeDecodeError as error:
            text = self._run[: error.start].decode("utf-8")
        del self._run[: len(text.encode("utf-8"))]
        return self._emit(text)

    def flush(self) -> str:
        """See PieceDecoder."""
        return self._emit(self._end_run())

    def _end_run(self) -> str:
        run, self._run = bytes(self._run), bytearray()
        try:
            return run.decode("utf-8")
        except UnicodeDecodeError:
            return "\ufffd" * len(run)

    def _emit(self, text: str) -> str:
        if text and self._strip:
            self._strip = False
            return text.removeprefix(" ")
        return text


class ByteLevelDecoder:
    """GPT-2 style vocabularies: every byte is written as one printable character; broken UTF-8 becomes U+FFFD."""

    def __init__(self) -> None:
        self.strips_leading_space = False
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def bytes_of(self, piece: str) -> bytes:
        """See PieceDecoder."""
        if all(c in _CHARACTER_BYTES for c in piece):
            return bytes(_CHARACTER_BYTES[c] for c in piece)
        return piece.encode("utf-8")  # an added token, written as itself

    def push(self, piece: str) -> str:
        """See PieceDecoder."""
        return self._utf8.decode(self.bytes_of(piece))

    def release(self) -> str:
        """See PieceDecoder; `push` holds back nothing but incomplete characters."""
        return ""

    def flush(self) -> str:
        """See PieceDecoder."""
        return self._utf8.decode(b"", final=True)


def _character_bytes() -> dict[str, int]:
    """GPT-2's table: printable Latin-1 stands for itself, the other bytes follow in order from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_CHARACTER_BYTES = _character_bytes()


def decoder_for(spec: Any, source: str) -> Callable[[], PieceDecoder]:
    """Makes decoders that do what the "decoder" section of a tokenizer.json asks for.

    Raises:
        ValueError: the section is none of the two kinds known here.
    """
    steps = spec["decoders"] if isinstance(spec, dict) and spec.get("type") == "Sequence" else [spec]
    kinds = [step.get("type") if isinstance(step, dict) else None for step in steps]
    if kinds == ["ByteLevel"]:
        return ByteLevelDecoder
    replace = {"type": "Replace", "pattern": {"String": SPACE_MARK}, "content": " "}
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    if kinds[:3] == ["Replace", "ByteFallback", "Fuse"] and steps[0] == replace and steps[3:] in ([], [strip]):
        return lambda: ByteFallbackDecoder(strip_leading_space=len(steps) == 4)
    raise ValueError(
        f"{source}: unsupported decoder {json.dumps(spec)}; use a byte-level tokenizer, or a sentencepiece one with "
        "byte fallback."
    )

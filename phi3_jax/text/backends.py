"""The two halves of a Tokenizer: text piece -> ids (two libraries) and ids -> text (two families of vocabulary).

Encoders see text between added tokens: `Tokenizer` has cut it at those already, once for both libraries. Only those
that a tokenizer.json wants to be looked for in normalised text are found here.
Decoders work token by token. Decoding a whole sequence uses the same code as streaming, which only lets complete
characters go earlier: see ByteFallbackDecoder for the one case where that makes a difference.
"""

import codecs
import contextlib
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import sentencepiece
import tokenizers

from phi3_jax.json_files import VOCABULARY, read_bytes
from phi3_jax.regular_file import require_regular
from phi3_jax.text.added_tokens import AddedToken, Cutter
from phi3_jax.text.lengths import SPACE_MARK as SPACE_MARK
from phi3_jax.text.lengths import are_separate, cut, has_separate_words, longest_piece


class PieceEncoder(Protocol):
    """Turns plain text into ids. `longest`: the most characters that one id can stand for; None if it is not known."""

    longest: int | None

    def encode(
        self, piece: str, *, at_start: bool, parse_special: bool = False, literal_mark: str | None = None
    ) -> list[int]:
        """Ids of one piece of text.

        Args:
            at_start: whether the piece opens the whole text.
            parse_special, literal_mark: as in `Tokenizer.encode`, for added tokens that are found only here.
        """
        ...


class SentencePieceEncoder:
    """`tokenizer.model`: the sentencepiece library puts a space mark in front of every piece by itself."""

    def __init__(self, processor: sentencepiece.SentencePieceProcessor, special: Iterable[int] = ()):
        self._processor = processor
        self.longest: int | None = None
        ids = range(processor.get_piece_size())
        pieces = set(map(processor.id_to_piece, ids))
        puts_space = processor.encode("a", out_type=str)[0].startswith(SPACE_MARK) and SPACE_MARK in pieces
        # In BPE scores are ranks; elsewhere their sums are rounded, by how long the text is.
        ranks = all(processor.get_score(i).is_integer() for i in ids)
        self._has_separate_words = puts_space and ranks and are_separate(pieces)
        # A user-defined symbol is found in any text: where it is special, it is spelled out.
        self._spelled = {token_id: self._letters(token_id) for token_id in special}

    def encode(
        self, piece: str, *, at_start: bool, parse_special: bool = False, literal_mark: str | None = None
    ) -> list[int]:
        """See PieceEncoder; every piece is treated alike."""
        text = _without(piece, literal_mark)
        parts = cut(text) if self._has_separate_words else [text]
        ids = [i for part in parts for i in self._processor.encode(part)]
        return [i for token_id in ids for i in self._spelled.get(token_id, [token_id])]

    def _letters(self, token_id: int) -> list[int]:
        library, ids = self._processor, []
        for letter in library.id_to_piece(token_id):
            known = library.piece_to_id(letter)
            bytes_ = [library.piece_to_id(f"<0x{byte:02X}>") for byte in letter.encode()]
            ids += [known] if known != library.unk_id() else bytes_
        return ids


def read_pieces(path: Path) -> tuple[sentencepiece.SentencePieceProcessor, list[str]]:
    """A `tokenizer.model` and its strings by id. Raises ValueError if the file is damaged, or something else."""
    require_regular(path)
    try:
        content = read_bytes(path, VOCABULARY)  # the library itself would read any file whole
        if not content:
            raise RuntimeError("it is empty")
        processor = sentencepiece.SentencePieceProcessor(model_proto=content)
        ids = list(range(processor.get_piece_size()))
        if not all(map(math.isfinite, processor.get_score(ids))):
            raise RuntimeError("a score is no finite number")
        return processor, processor.id_to_piece(ids)
    except (RuntimeError, OSError, UnicodeError) as error:
        raise ValueError(f"{path}: not a sentencepiece model ({error}); download the file again.") from error


class TokenizersEncoder:
    """The normaliser, pre-tokenizer and BPE model of a `tokenizer.json`, and its added tokens that have `normalized`.

    Raises:
        ValueError: the document is not a BPE tokenizer that the tokenizers library can build.
    """

    def __init__(self, spec: Mapping[str, Any], added_tokens: tuple[AddedToken, ...], source: str):
        model, pre = _model_without_special(spec["model"], added_tokens), spec.get("pre_tokenizer")
        normalizer = spec.get("normalizer")
        self._source = source
        looked_for = [(token.normalized, token) for token in added_tokens if token.normalized is not None]
        self._normalize: Callable[[str], str] = str
        if looked_for:  # these look at normalised text, between the normaliser and the rest
            self._normalize, normalizer = normalizer_of(spec, source), None
        self.longest = None if looked_for else longest_piece(spec)
        self._has_separate_words = not looked_for and has_separate_words(spec)
        self._start = _build(model, normalizer, pre, source)
        inner = _without_first_prefix(pre)
        self._inner = self._start if inner == pre else _build(model, normalizer, inner, source)
        self._all = Cutter(looked_for) if looked_for else None
        self._plain = Cutter((string, token) for string, token in looked_for if not token.special)

    def encode(
        self, piece: str, *, at_start: bool, parse_special: bool = False, literal_mark: str | None = None
    ) -> list[int]:
        """See PieceEncoder."""
        if self._all is None:
            return self._encode(_without(piece, literal_mark), at_start)
        ids: list[int] = []
        for part, start in (self._all if parse_special else self._plain).cut(self._normalize(piece)):
            if isinstance(part, AddedToken):
                ids.append(part.id)
            else:
                ids += self._encode(_without(part, literal_mark), at_start and start == 0)
        return ids

    def _encode(self, piece: str, at_start: bool) -> list[int]:
        library = self._start if at_start else self._inner
        parts = cut(piece) if self._has_separate_words else [piece]
        with _named(self._source):
            return [i for part in parts for i in library.encode(part, add_special_tokens=False).ids]


def normalizer_of(spec: Mapping[str, Any], source: str) -> Callable[[str], str]:
    """What the normaliser of a `tokenizer.json` makes of a text. Raises ValueError if the library refuses it."""
    if spec.get("normalizer") is None:
        return str
    library = _build({"type": "BPE", "vocab": {}, "merges": []}, spec["normalizer"], None, source)

    def normalize(text: str) -> str:
        with _named(source):
            return str(library.normalizer.normalize_str(text))

    return normalize


@contextlib.contextmanager
def _named(source: str) -> Iterator[None]:
    """Errors of the tokenizers library as ValueErrors with the file's name.

    It raises bare Exception, and its panics are not even that, such as of a regular expression that takes too long.
    """
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        told = " ".join(str(error).split())
        raise ValueError(f"{source}: the tokenizers library refuses it ({told}); download the file again.") from error


def _without(piece: str, literal_mark: str | None) -> str:
    return piece if literal_mark is None else piece.replace(literal_mark, "")


def _model_without_special(model: Mapping[str, Any], added_tokens: tuple[AddedToken, ...]) -> dict[str, Any]:
    """A BPE model that never makes special tokens of plain text, which merges derived from a vocabulary could do."""
    forbidden = {token.content for token in added_tokens if token.special} - {model.get("unk_token")}
    merges = [m for m in model["merges"] if not forbidden.intersection(_merged(m))]
    kept = {**model, "type": "BPE", "merges": merges}
    if model.get("ignore_merges"):  # then a word that is a token needs no merges
        kept["vocab"] = {piece: token_id for piece, token_id in model["vocab"].items() if piece not in forbidden}
    return kept


def _merged(merge: str | list[str]) -> tuple[str, str, str]:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right, left + right


def _build(model: dict[str, Any], normalizer: Any, pre_tokenizer: Any, source: str) -> tokenizers.Tokenizer:
    document = {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "model": model,
    }
    with _named(source):
        return tokenizers.Tokenizer.from_str(json.dumps(document))


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

    Some have no byte tokens: `<0x0A>` is text there.

    A run of byte tokens that is not valid UTF-8 becomes one U+FFFD per byte, all of the run, as in the tokenizers
    library. A run is therefore certain only when another kind of token ends it. A stream cannot wait for that: a line
    break would come one token late. What it has released stays as it is: the bytes 0A FF are two U+FFFD in a decode,
    and a line break and one U+FFFD in a stream. Only a run that is broken after a complete character differs.
    """

    _BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")

    def __init__(self, strip_leading_space: bool, byte_tokens: bool = True):
        self.strips_leading_space = self._strip = strip_leading_space
        self._byte_tokens = byte_tokens
        self._run = bytearray()

    def _byte(self, piece: str) -> re.Match[str] | None:
        return self._BYTE.fullmatch(piece) if self._byte_tokens else None

    def bytes_of(self, piece: str) -> bytes:
        """See PieceDecoder."""
        if byte := self._byte(piece):
            return bytes([int(byte[1], 16)])
        return piece.replace(SPACE_MARK, " ").encode("utf-8")

    def push(self, piece: str) -> str:
        """See PieceDecoder."""
        if self._byte(piece):
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


class MetaspaceDecoder:
    """Sentencepiece vocabularies without byte tokens; the first token loses all of its space marks."""

    def __init__(self, strip_leading_space: bool):
        self.strips_leading_space = self._first = strip_leading_space

    def bytes_of(self, piece: str) -> bytes:
        """See PieceDecoder."""
        return piece.replace(SPACE_MARK, " ").encode("utf-8")

    def push(self, piece: str) -> str:
        """See PieceDecoder."""
        mark, self._first = "" if self._first else " ", False
        return piece.replace(SPACE_MARK, mark)

    def release(self) -> str:
        """See PieceDecoder."""
        return ""

    def flush(self) -> str:
        """See PieceDecoder."""
        return ""


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
        ValueError: the section is none of the kinds known here.
    """
    steps = spec["decoders"] if isinstance(spec, dict) and spec.get("type") == "Sequence" else [spec]
    kinds = [step.get("type") if isinstance(step, dict) else None for step in steps]
    if kinds == ["ByteLevel"]:
        return ByteLevelDecoder
    if kinds == ["Metaspace"] and steps[0]["replacement"] == SPACE_MARK:
        strips = steps[0].get("prepend_scheme", "always") != "never"
        return lambda: MetaspaceDecoder(strip_leading_space=strips)
    replace = {"type": "Replace", "pattern": {"String": SPACE_MARK}, "content": " "}
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    rest = [step for step, kind in zip(steps[1:], kinds[1:], strict=True) if kind != "ByteFallback"]
    known = rest in ([], [{"type": "Fuse"}], [{"type": "Fuse"}, strip]) and "ByteFallback" not in kinds[2:]
    if steps[0] == replace and known and (rest or "ByteFallback" not in kinds):
        strips, has_bytes = len(rest) == 2, "ByteFallback" in kinds
        return lambda: ByteFallbackDecoder(strip_leading_space=strips, byte_tokens=has_bytes)
    raise ValueError(
        f"{source}: unsupported decoder {json.dumps(spec)[:200]}; use a byte-level tokenizer, or a sentencepiece one "
        "with byte fallback."
    )

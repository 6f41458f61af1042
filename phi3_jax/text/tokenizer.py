"""Text -> token ids -> text, over tokenizer.json, tokenizer.model or (tokenizer_reader.py) GGUF metadata.

    text --cut at added tokens--> pieces --encoder (tokenizers | sentencepiece)--> ids --decoder--> text

Cutting and decoding are the same code for every kind of file; only the encoder of a piece differs.
"""

import operator
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import sentencepiece

from phi3_jax.text.backends import (
    SPACE_MARK,
    AddedToken,
    ByteFallbackDecoder,
    PieceDecoder,
    PieceEncoder,
    SentencePieceEncoder,
    TokenizersEncoder,
    decoder_for,
)
from phi3_jax.text.tokenizer_files import (
    id_of,
    join_vocabulary,
    listed_in_config,
    make_added_tokens,
    named_token,
    opening_token,
    read_chat_template,
    read_config,
    read_json,
)

# Unicode's White_Space, as in the tokenizers library; Python's str.strip() would also strip U+001C..U+001F.
_WHITE_SPACE = frozenset("\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000") | {
    chr(c) for c in range(0x2000, 0x200B)
}
_WORD_CATEGORIES = frozenset(["Lu", "Ll", "Lt", "Lm", "Lo", "Mn", "Mc", "Me", "Nd", "Nl", "Pc"])


class Part(NamedTuple):
    """A part of a text: where it starts, its characters ("" for an added token), and its ids."""

    start: int
    text: str
    ids: list[int]


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """Text <-> ids for one vocabulary.

    Attributes:
        pieces: the vocabulary's strings by id; None for the unused rows of a padded embedding.
        added_tokens: the strings cut out before the vocabulary applies, with their flags, sorted by id.
        bos_id, eos_id: None where the files name none (then `bos_token` / `eos_token` is "").
        add_bos: whether `encode` starts with bos unless told otherwise. eos is never appended.
        chat_template: jinja2 source, for chat.py.
        source: the file this came from, for messages.
        document: the contents of a tokenizer.json for `checkpoint.save`, where there is no file to copy (GGUF).
    """

    encoder: PieceEncoder
    new_decoder: Callable[[], PieceDecoder]
    pieces: tuple[str | None, ...]
    added_tokens: tuple[AddedToken, ...]
    bos_id: int | None
    eos_id: int | None
    add_bos: bool
    chat_template: str | None
    source: str
    document: Mapping[str, Any] | None = None

    @property
    def vocab_size(self) -> int:
        """Number of ids, unused rows included."""
        return len(self.pieces)

    @property
    def bos_token(self) -> str:
        """The bos token's string, "" if there is none."""
        return "" if self.bos_id is None else self.pieces[self.bos_id] or ""

    @property
    def eos_token(self) -> str:
        """The eos token's string, "" if there is none."""
        return "" if self.eos_id is None else self.pieces[self.eos_id] or ""

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids that `skip_special_tokens` hides."""
        return frozenset(token.id for token in self.added_tokens if token.special)

    def encode(
        self, text: str, *, parse_special: bool = False, add_bos: bool | None = None, literal_mark: str | None = None
    ) -> list[int]:
        """Token ids of a text.

        Args:
            parse_special: whether special tokens written in the text become their ids; leave False for text that
                a user typed. Added tokens that are not special are always recognised.
            add_bos: start with bos; None does what the checkpoint's files say. A second bos is never added.
            literal_mark: a character that is dropped after the cut at special tokens. Text that holds it inside of
                a special token's string keeps that string as plain text (see chat.py).

        Raises:
            ValueError: the text holds a lone surrogate, or bos is asked for and the vocabulary has none.
        """
        parts = self.parts(text, parse_special=parse_special, literal_mark=literal_mark)
        return self.with_bos([token_id for part in parts for token_id in part.ids], add_bos)

    def parts(self, text: str, *, parse_special: bool = False, literal_mark: str | None = None) -> Iterator["Part"]:
        """The text's parts, cut at added tokens, whose ids `encode` joins. Arguments and errors as in `encode`."""
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(f"The text is not valid Unicode ({error}); remove the lone surrogates.") from error
        for part, start in self._cut(text, self._special_pattern if parse_special else self._plain_pattern):
            if isinstance(part, AddedToken):
                yield Part(start, "", [part.id])
            else:
                plain = part if literal_mark is None else part.replace(literal_mark, "")
                yield Part(start, part, self.encoder.encode(plain, at_start=start == 0))

    def with_bos(self, ids: list[int], add_bos: bool | None = None) -> list[int]:
        """The ids with bos in front where it is wanted (see `encode`) and is not there yet."""
        if self.add_bos if add_bos is None else add_bos:
            if self.bos_id is None:
                raise ValueError(f"{self.source}: the vocabulary names no bos token; pass add_bos=False.")
            if ids[:1] != [self.bos_id]:
                return [self.bos_id, *ids]
        return ids

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = False) -> str:
        """Text of a sequence of ids; unused ids give nothing. Raises ValueError for an id outside [0, vocab_size)."""
        decoder, hidden = self.new_decoder(), self.special_ids if skip_special_tokens else frozenset()
        pieces = [self.piece(token_id) for token_id in ids if operator.index(token_id) not in hidden]
        return "".join([decoder.push(piece) for piece in pieces if piece is not None] + [decoder.flush()])

    def stream(self, *, skip_special_tokens: bool = False) -> "StreamDecoder":
        """A decoder that takes ids one at a time."""
        return StreamDecoder(self, skip_special_tokens)

    def piece(self, token_id: int) -> str | None:
        """The vocabulary's string for an id, None for an unused one; ValueError outside [0, vocab_size)."""
        index = operator.index(token_id)
        if not 0 <= index < len(self.pieces):
            raise ValueError(
                f"Token id {index} is outside of the vocabulary of {self.source} ({len(self.pieces)} ids)."
            )
        return self.pieces[index]

    def token_bytes(self, token_id: int, *, opens_text: bool = False) -> bytes:
        """The bytes that a token adds to the decoded text; b"" for an unused id, ValueError outside [0, vocab_size).

        A token may end inside of a character. Special tokens give their strings, as in `decode`.

        Args:
            opens_text: the token is the first of a text, where sentencepiece vocabularies drop one space.
        """
        piece, decoder = self.piece(token_id), self.new_decoder()
        data = b"" if piece is None else decoder.bytes_of(piece)
        return data.removeprefix(b" ") if opens_text and decoder.strips_leading_space else data

    @cached_property
    def _by_content(self) -> dict[str, AddedToken]:
        return {token.content: token for token in self.added_tokens}

    @cached_property
    def _special_pattern(self) -> re.Pattern[str]:
        return _longest_first(token.content for token in self.added_tokens)

    @cached_property
    def _plain_pattern(self) -> re.Pattern[str]:
        return _longest_first(token.content for token in self.added_tokens if not token.special)

    def _cut(self, text: str, pattern: re.Pattern[str]) -> Iterator[tuple[str | AddedToken, int]]:
        """Yields the text's pieces and added tokens in order, and where each starts."""
        position = 0
        for match in pattern.finditer(text):
            token = self._by_content[match[0]]
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


def _longest_first(contents: Iterable[str]) -> re.Pattern[str]:
    """Matches the longest of the strings at each position; `(?!)` matches nowhere."""
    return re.compile("|".join(map(re.escape, sorted(contents, key=len, reverse=True))) or "(?!)")


def _is_word(character: str) -> bool:
    return character != "" and unicodedata.category(character) in _WORD_CATEGORIES


class StreamDecoder:
    """Decodes ids one at a time. The results of `push` and `flush`, joined, are `Tokenizer.decode` of all ids.

    No result ends inside of a character: `push` returns "" until the bytes of an emoji are complete, and the character
    with the token that completes it. One case differs from `decode`: of a run of byte tokens that is no valid UTF-8,
    the characters before the first wrong byte have been returned already, where `decode` makes U+FFFD of all its bytes.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool):
        self._tokenizer = tokenizer
        self._skip = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._decoder = tokenizer.new_decoder()

    def push(self, token_id: int) -> str:
        """The characters that are complete once this id is added; ValueError for an id outside of the vocabulary."""
        index = operator.index(token_id)  # jax scalars cannot be hashed
        piece = self._tokenizer.piece(index)
        if piece is None or index in self._skip:
            return ""
        return self._decoder.push(piece) + self._decoder.release()

    def flush(self) -> str:
        """The text held back so far; the stream then starts again from the beginning."""
        text = self._decoder.flush()
        self._decoder = self._tokenizer.new_decoder()
        return text


def load_tokenizer(folder: str | Path, backend: Literal["tokenizers", "sentencepiece"] | None = None) -> Tokenizer:
    """Reads the tokenizer of a Hugging Face checkpoint folder.

    `backend` None takes tokenizer.json if it exists, else tokenizer.model; a named backend reads its own file or
    raises. `vocab_size` in a config.json beside it gives the number of ids (the embedding has rows that no token uses).
    Flags of added tokens in tokenizer_config.json's `added_tokens_decoder` override those in tokenizer.json. Whether
    bos is added is decided by the post-processor of tokenizer.json (the flag `add_bos_token` is ignored, as in
    transformers 5), or, with tokenizer.model, by that flag (absent means no).

    Raises:
        FileNotFoundError: no such folder, or no tokenizer file in it.
        ValueError: a file is corrupt, contradicts another one, or asks for something unsupported.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; give the folder that holds the checkpoint's files.")
    files = {"tokenizers": folder / "tokenizer.json", "sentencepiece": folder / "tokenizer.model"}
    if backend is not None and backend not in files:
        raise ValueError(f"Unknown tokenizer backend {backend!r}; known are {sorted(files)}.")
    wanted = [path for name, path in files.items() if backend in (None, name)]
    path = next((path for path in wanted if path.is_file()), None)
    if path is None:
        names = " or ".join(path.name for path in wanted)
        raise FileNotFoundError(f"{folder}: there is no {names}; download the checkpoint's tokenizer files into it.")
    config = read_config(folder)
    load = _load_tokenizer_json if path == files["tokenizers"] else _load_sentencepiece
    try:
        return load(path, config, read_chat_template(folder, config))
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path}: its settings have an unknown shape ({error!r}); download the files again."
        ) from error


def _load_tokenizer_json(path: Path, config: dict[str, Any], chat_template: str | None) -> Tokenizer:
    spec = read_json(path)
    model = spec.get("model")
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE" or not isinstance(model.get("merges"), list):
        raise ValueError(f"{path}: no BPE model in it; convert the tokenizer to BPE or use tokenizer.model.")
    listed = {entry["content"]: entry for entry in spec.get("added_tokens", [])}
    listed |= listed_in_config(config)
    if spec.get("normalizer") is not None and (odd := [c for c, entry in listed.items() if entry.get("normalized")]):
        raise ValueError(
            f'{path}: added tokens {odd} are matched in normalised text, unsupported; set "normalized" false.'
        )
    added = make_added_tokens(listed, config, path)
    pieces = join_vocabulary({token_id: piece for piece, token_id in model["vocab"].items()}, added, path)
    bos = named_token(config, "bos_token")
    opening = opening_token(spec.get("post_processor"))
    if opening is not None and bos not in (None, opening):
        raise ValueError(
            f"{path}: its post-processor opens with {opening!r} but tokenizer_config.json's bos is {bos!r}."
        )
    return Tokenizer(
        encoder=TokenizersEncoder(spec, added, str(path)),
        new_decoder=decoder_for(spec.get("decoder"), str(path)),
        pieces=pieces,
        added_tokens=added,
        bos_id=id_of(bos or opening, pieces, path),
        eos_id=id_of(named_token(config, "eos_token"), pieces, path),
        add_bos=opening is not None,
        chat_template=chat_template,
        source=str(path),
    )


def _load_sentencepiece(path: Path, config: dict[str, Any], chat_template: str | None) -> Tokenizer:
    try:
        processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError) as error:
        raise ValueError(f"{path}: not a sentencepiece model ({error}); download the file again.") from error
    vocabulary = {i: processor.id_to_piece(i) for i in range(processor.get_piece_size())}
    controls = [i for i in vocabulary if processor.is_control(i) or processor.is_unknown(i)]
    listed: dict[str, Any] = {vocabulary[i]: {"id": i, "content": vocabulary[i], "special": True} for i in controls}
    if "added_tokens_decoder" in config:
        listed |= listed_in_config(config)
    else:
        older = read_json(path.with_name("added_tokens.json"))
        listed |= {content: {"id": token_id, "content": content} for content, token_id in older.items()}
    added = make_added_tokens(listed, config, path)
    pieces = join_vocabulary(vocabulary, added, path)
    bos = named_token(config, "bos_token") or (vocabulary[processor.bos_id()] if processor.bos_id() >= 0 else None)
    eos = named_token(config, "eos_token") or (vocabulary[processor.eos_id()] if processor.eos_id() >= 0 else None)
    prefixed = processor.encode("a", out_type=str)[0].startswith(SPACE_MARK)
    return Tokenizer(
        encoder=SentencePieceEncoder(processor),
        new_decoder=lambda: ByteFallbackDecoder(strip_leading_space=prefixed),
        pieces=pieces,
        added_tokens=added,
        bos_id=id_of(bos, pieces, path),
        eos_id=id_of(eos, pieces, path),
        add_bos=bool(config.get("add_bos_token", False)),
        chat_template=chat_template,
        source=str(path),
    )

"""Text -> token ids -> text, over tokenizer.json, tokenizer.model or (tokenizer_reader.py) GGUF metadata.

    text --cut at added tokens--> pieces --encoder (tokenizers | sentencepiece)--> ids --decoder--> text

Cutting and decoding are the same code for every kind of file; only the encoder of a piece differs.
"""

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

from phi3_jax.text.added_tokens import AddedToken, Cutter, is_hidden, is_special
from phi3_jax.text.backends import (
    SPACE_MARK,
    ByteFallbackDecoder,
    PieceDecoder,
    PieceEncoder,
    SentencePieceEncoder,
    TokenizersEncoder,
    decoder_for,
    normalizer_of,
    read_pieces,
)
from phi3_jax.text.tokenizer_files import (
    frame_of,
    id_of,
    join_vocabulary,
    listed_in_config,
    make_added_tokens,
    named_token,
    named_tokens,
    read_added_tokens,
    read_chat_templates,
    read_config,
    read_document,
    warn_of,
    warn_of_other_ids,
)


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
        add_bos: whether `encode` starts with bos unless told otherwise.
        opening, closing: the ids that `encode` puts in front of a text instead of bos, and behind a text; both are
            usually empty.
        chat_template, tool_chat_template: jinja2 sources, for chat.py; the second is for chats with tools, if it is
            another one.
        named_tokens: special tokens by the names that a template may use, such as pad_token.
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
    opening: tuple[int, ...] = ()
    closing: tuple[int, ...] = ()
    tool_chat_template: str | None = None
    named_tokens: Mapping[str, str] = field(default_factory=dict)

    @property
    def vocab_size(self) -> int:
        """Number of ids, unused rows included, and those of added tokens beyond the embedding."""
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
        return frozenset(token.id for token in self.added_tokens if token.hidden)

    @cached_property
    def for_tools(self) -> "Tokenizer":
        """The same with the template that is for chats with tools, if the checkpoint has such a one."""
        return self if self.tool_chat_template is None else replace(self, chat_template=self.tool_chat_template)

    def encode(
        self,
        text: str,
        *,
        parse_special: bool = False,
        add_bos: bool | None = None,
        add_eos: bool | None = None,
        literal_mark: str | None = None,
        most: int | None = None,
    ) -> list[int]:
        """Token ids of a text.

        Args:
            parse_special: whether special tokens written in the text become their ids; leave False for text that
                a user typed. Added tokens that are not special are always recognised.
            add_bos: start with bos; None does what the checkpoint's files say. A second bos is never added.
            add_eos: end with `closing`. None does so if `add_bos` is None, too: few files close a text, and the prompt
                of an answer must not be closed.
            literal_mark: a character that is dropped after the cut at special tokens. Text that holds it inside of
                a special token's string keeps that string as plain text (see templates/literals.py).
            most: refuse, without encoding it, a text whose length alone says that it has more ids than this.

        Raises:
            ValueError: the text holds a lone surrogate, or bos is asked for and the vocabulary has none; or as above.
        """
        if most is not None and self._least_ids(text, parse_special, literal_mark) > most:
            raise ValueError(f"the text has {len(text)} characters, which are more than {most} tokens: shorten it")
        parts = self.parts(text, parse_special=parse_special, literal_mark=literal_mark)
        ids = self.with_bos([token_id for part in parts for token_id in part.ids], add_bos)
        return [*ids, *self.closing] if (add_bos is None if add_eos is None else add_eos) else ids

    def _least_ids(self, text: str, parse_special: bool, literal_mark: str | None) -> int:
        """A number of ids that the text has at least."""
        longest = self.encoder.longest
        if longest is None or len(text) <= longest:
            return 0
        parts = [part for part, _ in (self._special_cutter if parse_special else self._plain_cutter).cut(text)]
        plain = [part for part in parts if isinstance(part, str)]
        characters = sum(len(part) - (part.count(literal_mark) if literal_mark else 0) for part in plain)
        return len(parts) - len(plain) + characters // longest

    def parts(self, text: str, *, parse_special: bool = False, literal_mark: str | None = None) -> Iterator["Part"]:
        """The text's parts, cut at added tokens, whose ids `encode` joins. Arguments and errors as in `encode`."""
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(f"The text is not valid Unicode ({error}); remove the lone surrogates.") from error
        for part, start in (self._special_cutter if parse_special else self._plain_cutter).cut(text):
            if isinstance(part, AddedToken):
                yield Part(start, "", [part.id])
            else:
                ids = self.encoder.encode(
                    part, at_start=start == 0, parse_special=parse_special, literal_mark=literal_mark
                )
                yield Part(start, part, ids)

    def with_bos(self, ids: list[int], add_bos: bool | None = None) -> list[int]:
        """The ids with bos in front where it is wanted (see `encode`) and is not there yet."""
        if self.add_bos if add_bos is None else add_bos:
            opening = list(self.opening) or ([] if self.bos_id is None else [self.bos_id])
            if not opening:
                raise ValueError(f"{self.source}: the vocabulary names no bos token; pass add_bos=False.")
            if ids[: len(opening)] != opening:
                return opening + ids
        return ids

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = False) -> str:
        """Text of a sequence of ids; unused ids give nothing. Raises ValueError for an id outside [0, vocab_size)."""
        decoder, hidden = self.new_decoder(), self.special_ids if skip_special_tokens else frozenset()
        pieces = [self._spelling(token_id) for token_id in ids if operator.index(token_id) not in hidden]
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
        piece, decoder = self._spelling(token_id), self.new_decoder()
        data = b"" if piece is None else decoder.bytes_of(piece)
        return data.removeprefix(b" ") if opens_text and decoder.strips_leading_space else data

    def _spelling(self, token_id: int) -> str | None:
        """What the decoder is given for an id."""
        piece = self.piece(token_id)
        return self._spellings.get(operator.index(token_id), piece)

    @cached_property
    def _spellings(self) -> dict[int, str]:
        return {token.id: token.spelling for token in self.added_tokens if token.spelling is not None}

    @cached_property
    def _special_cutter(self) -> Cutter:
        return Cutter((token.content, token) for token in self.added_tokens if token.normalized is None)

    @cached_property
    def _plain_cutter(self) -> Cutter:
        plain = [token for token in self.added_tokens if token.normalized is None and not token.special]
        return Cutter((token.content, token) for token in plain)


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
        piece = self._tokenizer._spelling(index)
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
    Flags of added tokens in tokenizer_config.json's `added_tokens_decoder` override those in tokenizer.json, but
    markers of turns, ends and padding are special whatever their flags say (added_tokens.py). Whether bos is added is
    decided by the post-processor of tokenizer.json (the flag `add_bos_token` is ignored, as in transformers 5), or,
    with tokenizer.model, by that flag (absent means no).

    Where files contradict one another, what transformers reads is read.

    Raises:
        FileNotFoundError: no such folder, or no tokenizer file in it.
        ValueError: a file is corrupt, two strings have one id, or something unsupported is asked for.

    Warns:
        UserWarning: files contradict one another, or added tokens lie beyond the embedding.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; give the folder that holds the checkpoint's files.")
    files = {"tokenizers": folder / "tokenizer.json", "sentencepiece": folder / "tokenizer.model"}
    if backend is not None and backend not in files:
        raise ValueError(f"Unknown tokenizer backend {backend!r}; known are {sorted(files)}.")
    wanted = [path for name, path in files.items() if backend in (None, name)]
    path = next((path for path in wanted if path.exists()), None)
    if path is None:
        names = " or ".join(path.name for path in wanted)
        raise FileNotFoundError(f"{folder}: there is no {names}; download the checkpoint's tokenizer files into it.")
    config = read_config(folder)
    load = _load_tokenizer_json if path == files["tokenizers"] else _load_sentencepiece
    try:
        return load(path, config, read_chat_templates(folder, config))
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path}: its settings have an unknown shape ({error!r}); download the files again."
        ) from error


def _load_tokenizer_json(path: Path, config: dict[str, Any], templates: Mapping[str, str]) -> Tokenizer:
    spec = read_document(path)
    model, inside = spec["model"], list(spec.get("added_tokens", []))
    older = read_added_tokens(path.parent)
    beside = listed_in_config(config, older)
    if "added_tokens_decoder" not in config:
        taken = {entry["id"] for entry in inside}
        beside = [entry for entry in beside if entry["id"] not in taken]
    added = make_added_tokens(
        [*inside, *beside],
        config,
        model["vocab"],
        templates.get("default"),
        path,
        normalizer=spec.get("normalizer"),
        normalize=normalizer_of(spec, str(path)),
    )
    warn_of_other_ids(older, model["vocab"] | {token.content: token.id for token in added}, path)
    pieces = join_vocabulary({token_id: piece for piece, token_id in model["vocab"].items()}, added, config, path)
    _compare_with_model(pieces, added, path.with_name("tokenizer.model"))
    opening, closing = frame_of(spec.get("post_processor"), pieces, path)
    bos_id = id_of(named_token(config, "bos_token"), pieces)
    return Tokenizer(
        encoder=TokenizersEncoder(spec, added, str(path)),
        new_decoder=decoder_for(spec.get("decoder"), str(path)),
        pieces=pieces,
        added_tokens=added,
        bos_id=opening[0] if bos_id is None and opening else bos_id,
        eos_id=id_of(named_token(config, "eos_token"), pieces),
        add_bos=bool(opening),
        chat_template=templates.get("default"),
        source=str(path),
        opening=tuple(opening),
        closing=tuple(closing),
        tool_chat_template=templates.get("tool_use"),
        named_tokens=named_tokens(config),
    )


def _compare_with_model(pieces: Sequence[str | None], added: Sequence[AddedToken], path: Path) -> None:
    """Warns if tokenizer.model holds other strings than tokenizer.json, other than special ones, which may be renamed.

    Scores and merges are not compared.
    """
    try:
        others = read_pieces(path)[1] if path.exists() else None
    except ValueError:
        return  # other kinds of vocabularies have files of this name, too
    if others is None:
        return
    ours = [*pieces, *[None] * (len(others) - len(pieces))]
    special = {token.id for token in added if token.special}
    if odd := [i for i, other in enumerate(others) if ours[i] != other and i not in special]:
        i = odd[0]
        warn_of(
            f"{path.with_name('tokenizer.json')} is read, as in transformers, and not tokenizer.model beside it, which "
            f"differs in {len(odd)} strings (id {i} is {ours[i]!r} here and {others[i]!r} there); remove the wrong one."
        )


def _load_sentencepiece(path: Path, config: dict[str, Any], templates: Mapping[str, str]) -> Tokenizer:
    processor, strings = read_pieces(path)
    vocabulary = dict(enumerate(strings))
    older = read_added_tokens(path.parent)
    beside = [{**entry, "normalized": False} for entry in listed_in_config(config, older)]
    for entry in beside:  # a string of the vocabulary may be renamed
        if entry["id"] in vocabulary and entry["content"] not in vocabulary.values():
            vocabulary[entry["id"]] = entry["content"]
    controls = [i for i in vocabulary if processor.is_control(i) or processor.is_unknown(i)]
    inside = [{"id": i, "content": vocabulary[i], "special": True} for i in controls]
    # Models also hold markers as user-defined symbols.
    inside += [{"id": i, "content": c} for i, c in vocabulary.items() if is_special(c, is_hidden(c, False), "")]
    default = {"bos_token": processor.bos_id(), "eos_token": processor.eos_id()}
    names = {name: named_token(config, name) or vocabulary.get(token_id) for name, token_id in default.items()}
    ids = {piece: token_id for token_id, piece in vocabulary.items()}
    added = make_added_tokens([*inside, *beside], config, ids, templates.get("default"), path, keep_ids=True)
    warn_of_other_ids(older, ids | {token.content: token.id for token in added}, path)
    pieces = join_vocabulary(vocabulary, added, config, path)
    prefixed = processor.encode("a", out_type=str)[0].startswith(SPACE_MARK)
    return Tokenizer(
        encoder=SentencePieceEncoder(
            processor, [t.id for t in added if t.special and t.id < processor.get_piece_size() and t.id not in controls]
        ),
        new_decoder=lambda: ByteFallbackDecoder(strip_leading_space=prefixed),
        pieces=pieces,
        added_tokens=added,
        bos_id=id_of(names["bos_token"], pieces),
        eos_id=id_of(names["eos_token"], pieces),
        add_bos=bool(config.get("add_bos_token", False)),
        chat_template=templates.get("default"),
        source=str(path),
        tool_chat_template=templates.get("tool_use"),
        named_tokens=named_tokens(config),
    )

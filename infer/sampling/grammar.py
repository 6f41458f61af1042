"""Grammars that an answer must match: a JSON schema, a regular expression, or one of several texts.

The package llguidance (the extra `grammar`) knows which bytes may follow; this file maps bytes to tokens. Each step:

    host: masks() -> device: where(unpack(masks, V), logits, -inf) -> a token per row -> host: push(row, token)

The text that must match is the text as `Tokenizer.stream` prints it. Sentencepiece drops one space at its beginning, so
that `▁yes`, as an answer's first token, prints "yes". llguidance therefore gets a second entry for every token with
such a space, spelled without it: its twin, which replaces the token in the first step.

Axis letters: B batch, V vocab, W = V / 32 rounded up, the words of a mask.
"""

from __future__ import annotations

import dataclasses
import json
import operator
import re
import threading
import warnings
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from phi3_jax.json_files import parse
from phi3_jax.text import Tokenizer

# JSON may have any amount of white space almost anywhere, and small models may write it without end. This allows ", "
# and ": " on one line, and a line break with some indentation.
_JSON_SPACE = r" |\n {0,24}"
# The entry of a token that prints nothing when it is the first one: it is only the space that is dropped.
_NOTHING = -1
_MOST_NESTED = 120  # llguidance takes schemas with 128 objects and arrays inside of one another
_LONGEST = 1 << 22  # characters, of which llguidance takes 150 bytes each
# Grammars that are kept compiled, if they are not longer: those of answers to one request, or of one client's requests.
_KEPT, _LONGEST_KEPT = 16, 1 << 17


@dataclasses.dataclass(frozen=True)
class Grammar:
    """What an answer must match, from its first character to its last. Made by `json_schema`, `regex` or `choice`.

    `GrammarMasks` checks whether it is valid.

    Attributes:
      source: the JSON text of the schema, the pattern, or the options as a JSON list.

    Raises:
      ValueError: the source is too long; for a schema also as `json_schema`.
    """

    kind: Literal["json_schema", "regex", "choice"]
    source: str

    def __post_init__(self) -> None:
        """Raises ValueError for a source that is too long, or nested too deeply."""
        if len(self.source) > _LONGEST:
            name = "schema" if self.kind == "json_schema" else self.kind
            raise ValueError(f"the {name} has {len(self.source)} characters, more than {_LONGEST}; make it shorter")
        if self.kind == "json_schema":
            _check_depth(self.source)

    @classmethod
    def json_schema(cls, schema: Mapping[str, Any] | str) -> Grammar:
        """JSON that a schema (or the schema's JSON text) describes, with object keys in the schema's order.

        White space: none, one space, or a line break and at most 24 spaces. An object "x-guidance" in the schema sets
        llguidance's options, among them "whitespace_pattern". Without "additionalProperties": false an object may have
        any other keys, as JSON Schema says.

        Raises:
          ValueError: the schema cannot be written as JSON, is nested too deeply, or is too long.
        """
        if not isinstance(schema, str):
            try:
                schema = json.dumps(dict(schema), allow_nan=False)
            except (TypeError, ValueError) as error:
                raise ValueError(f"the schema cannot be written as JSON: {error}") from error
            except RecursionError:
                raise ValueError(f"the schema is nested more than {_MOST_NESTED} times; make it flatter") from None
        return cls("json_schema", schema)

    @classmethod
    def regex(cls, pattern: str) -> Grammar:
        r"""Text that the pattern matches as a whole. Syntax of Rust's regex crate: no look-around, no `\1`, no `\b`."""
        return cls("regex", pattern)

    @classmethod
    def choice(cls, options: Sequence[str]) -> Grammar:
        """One of these texts, exactly. Raises ValueError if the options are not a list of texts."""
        if isinstance(options, str) or not all(isinstance(option, str) for option in options):
            raise ValueError(f"the options of a choice must be a list of texts, not {options!r}")
        return cls("choice", json.dumps(list(options)))


def _check_depth(schema: str) -> None:
    """Raises ValueError for JSON that is nested too deeply for those who read it by calling themselves."""
    depth = 0
    for found in re.finditer(r'"(?:[^"\\]|\\.)*"|[\[{]|[\]}]', schema, re.S):
        depth += (found[0] in "[{") - (found[0] in "]}")
        if depth > _MOST_NESTED:
            raise ValueError(f"the schema is nested more than {_MOST_NESTED} times; make it flatter")


class GrammarMasks:
    """Which tokens each row of a batch may take next; it stays on the host.

    Special and other added tokens, unused ids and ids past the tokenizer's are never part of an answer. An answer may
    end, with any of the end ids, exactly when it matches; after that its row allows only end ids.

    Attributes:
      words: W.
    """

    def __init__(
        self, tokenizer: Tokenizer, grammars: Sequence[Grammar | None], end_ids: Sequence[int], vocab_size: int
    ):
        """Takes the grammar of each row, None for a row that may write anything.

        Raises:
          ValueError: a grammar is invalid, not supported by llguidance, or matches nothing; there is no end id for rows
            with a grammar, or one is not in the vocabulary.
          ImportError: the extra `grammar` is not installed.
        """
        if any(grammars) and not end_ids:
            raise ValueError("a grammar needs a token to end with: name eos_token_id in generation_config.json")
        if outside := [token for token in end_ids if not 0 <= token < vocab_size]:
            raise ValueError(f"end ids {outside} are outside of the vocabulary of {vocab_size}")
        self.words = -(-vocab_size // 32)
        self._end_ids = frozenset(end_ids)
        self._rows: list[_Row | None] = [None] * len(grammars)
        if not any(grammars):
            return
        vocabulary = _vocabulary(tokenizer)
        is_end = np.isin(np.arange(vocab_size), list(end_ids))
        is_text = np.zeros(vocab_size, bool)
        is_text[: len(vocabulary.is_text)] = vocabulary.is_text[:vocab_size]
        self._ends, self._texts = _pack(is_end), _pack(is_text & ~is_end)
        compiled: dict[Grammar, Any] = {}  # rows often share a grammar
        for i, grammar in enumerate(grammars):
            if grammar is not None:
                if grammar not in compiled:
                    compiled[grammar] = vocabulary.compiled(grammar, f"grammar of row {i}")
                self._rows[i] = _Row(f"row {i}", vocabulary, compiled[grammar].deep_copy())
        self.masks()  # raises for a grammar that nothing matches

    def masks(self) -> np.ndarray:
        """uint32 [B, W], the masks of all rows. Raises ValueError as `mask` does."""
        return np.stack([self.mask(row) for row in range(len(self._rows))])

    def mask(self, row: int) -> np.ndarray:
        """A row's mask, uint32 [W]: bit t % 32 of word t // 32 is set if token t is allowed; `unpack` reads it.

        Raises:
          ValueError: llguidance gave up (its limits on work were reached), or no token leads on to a match.
        """
        state, mask = self._rows[row], np.zeros(self.words, np.uint32)
        if state is None:
            return ~mask
        if not state.has_ended:
            texts = state.next_texts()[: self.words]
            mask[: len(texts)] = texts & self._texts[: len(texts)]
        if state.is_complete():
            mask |= self._ends
        elif not mask.any():
            raise ValueError(f"{state.name}: no token that may be used leads on to a match of the grammar")
        return mask

    def push(self, row: int, token: int) -> None:
        """Records that the row has taken this token; tokens after an end id are ignored.

        Raises:
          ValueError: the mask did not allow the token.
        """
        state, token = self._rows[row], operator.index(token)
        if state is None or state.has_ended:
            return
        if token not in self._end_ids:
            state.push(token)
        elif state.is_complete():
            state.has_ended = True
        else:
            raise ValueError(f"{state.name}: end id {token} before the text matches the grammar")

    def is_complete(self, row: int) -> bool:
        """Whether the text so far matches, so that the answer may end; always True for a row without grammar."""
        state = self._rows[row]
        return state is None or state.is_complete()


def unpack(masks: jax.Array, vocab_size: int) -> jax.Array:
    """Masks uint32 [..., W] -> bool [..., V], on the device."""
    bits = masks[..., None] >> jnp.arange(32, dtype=jnp.uint32) & 1  # [..., W, 32]
    return bits.reshape(*masks.shape[:-1], -1)[..., :vocab_size] != 0


def _pack(allowed: np.ndarray) -> np.ndarray:
    """bool [V] -> uint32 [W], the inverse of `unpack`."""
    padded = np.zeros(-(-len(allowed) // 32) * 32, bool)
    padded[: len(allowed)] = allowed
    return np.packbits(padded, bitorder="little").view(np.uint32)


class _Row:
    """The state of one answer.

    Attributes:
      name: for error messages.
      has_ended: whether an end id was written.
    """

    def __init__(self, name: str, vocabulary: _Vocabulary, matcher: Any):
        self.name, self.has_ended = name, False
        self._vocabulary, self._matcher = vocabulary, matcher
        self._is_first = True

    def next_texts(self) -> np.ndarray:
        """uint32 [words]: which tokens may follow; bits of entries past the tokens mean nothing.

        No token if llguidance gave up: `is_complete`, which is called next, then raises.
        """
        packed = np.frombuffer(self._matcher.compute_bitmask(), np.uint32)
        if not self._is_first:
            return packed
        allowed = np.unpackbits(packed.view(np.uint8), bitorder="little")[: self._vocabulary.end_entry]
        # The last place, -1, is that of _NOTHING: such a token is allowed if any other token may follow it.
        return _pack(np.append(allowed, allowed.any())[self._vocabulary.first_entries])

    def push(self, token: int) -> None:
        """Appends a token that is no end id. Raises ValueError if it does not fit."""
        is_text = self._vocabulary.is_text
        if not (0 <= token < len(is_text) and is_text[token]):
            raise ValueError(f"{self.name}: token {token} is not text, as answers with a grammar are")
        entry = int(self._vocabulary.first_entries[token]) if self._is_first else token
        self._is_first = False
        if entry != _NOTHING and not self._matcher.consume_token(entry):
            raise ValueError(f"{self.name}: token {token} does not fit the grammar: {_error(self._matcher)}")

    def is_complete(self) -> bool:
        """Whether the answer may end here. Raises ValueError if llguidance gave up."""
        complete = self._matcher.is_accepting()
        if self._matcher.is_error():
            raise ValueError(f"{self.name}: llguidance cannot follow the grammar further: {_error(self._matcher)}")
        return complete


@dataclasses.dataclass(frozen=True, eq=False)
class _Vocabulary:
    """A tokenizer's vocabulary as llguidance has it: the tokens, their twins, an end token.

    Attributes:
      tokenizer: its LLTokenizer.
      is_text: bool [tokens]: whether an answer may hold the token.
      first_entries: int [tokens]: what stands for a token that is the first one: itself, its twin, or _NOTHING.
      end_entry: the id of the end token, and the number of entries before it.
    """

    tokenizer: Any
    is_text: np.ndarray
    first_entries: np.ndarray
    end_entry: int
    _kept: dict[Grammar, Any] = dataclasses.field(default_factory=dict)  # the last one used is the last
    _lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)

    def compiled(self, grammar: Grammar, name: str) -> Any:
        """The grammar's LLMatcher, at its beginning, of which rows have copies. From any thread; raises ValueError."""
        with self._lock:
            matcher = self._kept.pop(grammar, None)
        matcher = matcher or _compile(grammar, self, name)
        if len(grammar.source) <= _LONGEST_KEPT:
            with self._lock:
                self._kept[grammar] = matcher
                while len(self._kept) > _KEPT:
                    del self._kept[next(iter(self._kept))]
        return matcher


# Weak references, so that a tokenizer can be freed, and its tables with it.
_vocabularies: weakref.WeakKeyDictionary[Tokenizer, _Vocabulary] = weakref.WeakKeyDictionary()


def _vocabulary(tokenizer: Tokenizer) -> _Vocabulary:
    """The tables of a tokenizer. Making them takes some tenths of a second: they are kept while it lives."""
    if tokenizer not in _vocabularies:
        added = {token.id for token in tokenizer.added_tokens}
        ids = range(tokenizer.vocab_size)
        entries = [b"" if i in added else tokenizer.token_bytes(i) for i in ids]
        is_text = np.array([entry != b"" for entry in entries])
        first_entries = np.arange(len(ids))
        for i in np.flatnonzero(is_text).tolist():
            if (first := tokenizer.token_bytes(i, opens_text=True)) != entries[i]:
                first_entries[i] = len(entries) if first else _NOTHING
                entries += [first] if first else []
        llguidance = _llguidance()
        ll_tokenizer = llguidance.LLTokenizer(llguidance.TokenizerWrapper(_Entries([*entries, b""])))
        _vocabularies[tokenizer] = _Vocabulary(ll_tokenizer, is_text, first_entries, len(entries))
    return _vocabularies[tokenizer]


class _Entries:
    """The bytes of every entry, the end token's last, under the names that llguidance's TokenizerWrapper reads."""

    bos_token_id = None

    def __init__(self, tokens: list[bytes]):
        self.tokens = tokens
        self.eos_token_id = len(tokens) - 1
        self.special_token_ids = [self.eos_token_id]

    def __call__(self, text: str | bytes) -> list[int]:
        """llguidance calls this only to force tokens on the model, which `_lark` turns off."""
        raise RuntimeError(f"llguidance wants the tokens of {text!r} in spite of no_forcing")


def _compile(grammar: Grammar, vocabulary: _Vocabulary, name: str) -> Any:
    """The grammar's LLMatcher, at its beginning; ValueError for a grammar that is wrong or not supported."""
    llguidance = _llguidance()
    try:
        limits = llguidance.LLParserLimits(verbose_errors=False)
        matcher = llguidance.LLMatcher(vocabulary.tokenizer, _lark(grammar), log_level=0, limits=limits)
        if matcher.is_error():
            raise ValueError(f"llguidance says {_error(matcher)}")
    except ValueError as error:
        raise ValueError(f"{name}: this {grammar.kind} cannot be used: {error}") from error
    for warning in matcher.get_grammar_warnings():
        warnings.warn(f"{name}: {warning}", stacklevel=3)
    return matcher


def _lark(grammar: Grammar) -> str:
    """The grammar in llguidance's language. Raises ValueError for a schema that is no JSON, or no options."""
    write = {"json_schema": _json_rule, "regex": _regex_rule, "choice": _choice_rule}[grammar.kind]
    # Forced tokens would be those of llguidance, which does not know how this tokenizer splits text.
    return f'%llguidance {{"no_forcing": true}}\nstart: {write(grammar.source)}\n'


def _json_rule(source: str) -> str:
    schema = parse(source)
    schema = {} if schema is True else schema
    if isinstance(schema, dict) and isinstance(options := schema.get("x-guidance", {}), dict):
        schema["x-guidance"] = {"whitespace_pattern": _JSON_SPACE, **options}
    return f"%json {json.dumps(schema)}"


def _regex_rule(source: str) -> str:
    # Between slashes; slashes in the pattern are escaped, unless they already are.
    return "/" + re.sub(r"\\.|/", lambda match: r"\/" if match[0] == "/" else match[0], source, flags=re.DOTALL) + "/"


def _choice_rule(source: str) -> str:
    options = json.loads(source)
    if not options:
        raise ValueError("there are no options to choose from")
    # Code points rather than characters, so that none is taken for syntax.
    return "/" + "|".join("".join(f"\\x{{{ord(character):x}}}" for character in option) for option in options) + "/"


def _error(matcher: Any) -> str:
    """llguidance's message without places in, and a listing of, the text that `_lark` wrote."""
    message = re.sub(r"^(at )?\d+\(\d+\): ", "", matcher.get_error())
    if message.startswith("NoExtensionBias"):
        return "no token of the vocabulary leads on to a match"
    message = re.split(r"\n *\d+ \| |\n<non-verbose/>", message)[0]
    # A regex's error repeats it, and points at a place in the line below.
    message = re.sub(r"regex parse error:\n.*\nerror: ", "regex parse error: ", message, flags=re.DOTALL)
    message = " ".join(line.strip() for line in message.splitlines()).strip()
    return message if len(message) <= 500 else f"{message[:200]} ... {message[-250:]}"  # it repeats long grammars


def _llguidance() -> Any:
    try:
        import llguidance
    except ImportError:
        raise ImportError("grammars need the llguidance package: pip install 'phi3_jax[grammar]'") from None
    return llguidance

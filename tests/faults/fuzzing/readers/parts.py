"""What the readers share: small models, and what tells two things that were read apart."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from templates import PHI4_MINI, SPECIALS
from training_runs import CONFIG
from vocabularies import byte_level_spec

import phi3_jax
from phi3_jax.checkpoint.gguf.tokenizer_reader import tokenizer_from_gguf
from phi3_jax.text import Tokenizer
from phi3_jax.train import fingerprint

from ..reader import Read

TEXTS = ("Hello <|end|> the cat", "  é漢🙂\n\n12345\t</s><s><|user|>word", "\0\u2028▁\u00a0 e\u0301<0x0A>")
MESSAGES = [
    {"role": "system", "content": "Be brief.<|end|>"},
    {"role": "user", "content": "Hi <|assistant|>é\n"},
    {"role": "assistant", "content": "Yes"},
    {"role": "user", "content": "<|end|>"},
]


@functools.cache
def model() -> phi3_jax.Checkpoint:
    """A random model of some kilobytes, with a tokenizer of bytes."""
    params = phi3_jax.random_params(CONFIG)
    return phi3_jax.Checkpoint(CONFIG, params, _tokenizer(), phi3_jax.GenerationSettings((258,)))


def _tokenizer() -> Tokenizer:
    """Bytes, one merge, special tokens, and a chat template: 263 ids in all."""
    letters = list(byte_level_spec()["model"]["vocab"])[:256]
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": [*letters, "th", *SPECIALS[:6]],
        "tokenizer.ggml.token_type": [1] * 257 + [3] * 6,
        "tokenizer.ggml.merges": ["t h"],
        "tokenizer.ggml.bos_token_id": 257,
        "tokenizer.ggml.eos_token_id": 258,
        "tokenizer.ggml.add_bos_token": True,
    }
    return dataclasses.replace(tokenizer_from_gguf(metadata, "small.gguf"), chat_template=PHI4_MINI)


def digest(*parts: Any) -> str:
    """A short hash of arrays, bytes and what has a repr."""
    found = hashlib.blake2b(digest_size=8)
    for part in parts:
        if isinstance(part, np.ndarray | jax.Array):
            array = np.asarray(part)
            found.update(f"{array.shape} {array.dtype}".encode() + np.ascontiguousarray(array).tobytes())
        else:
            found.update(part if isinstance(part, bytes) else repr(part).encode("utf-8", "surrogatepass"))
    return found.hexdigest()


def of_checkpoint(checkpoint: phi3_jax.Checkpoint) -> Read:
    """What a model computes with, in parts; its shapes go through the decoder once."""
    config, rope = checkpoint.config, checkpoint.config.long_rope
    _trace(config, str(jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), checkpoint.params)), checkpoint.params)
    factors = (rope.short_factor, rope.long_factor) if rope else ()  # in GGUF files these are tensors
    structure = jax.tree.structure(checkpoint.params)
    found = {
        "weights": digest(fingerprint.of_weights(checkpoint.params), structure, factors),
        "config": digest(config),
        "generation": list(checkpoint.generation.eos_token_ids),
    }
    return found | (of_tokenizer(checkpoint.tokenizer) if checkpoint.tokenizer else {})


def _trace(config: phi3_jax.Phi3Config, shapes: str, params: Any) -> None:
    if (config, shapes) not in _traced:
        tokens = jax.ShapeDtypeStruct((1, 3), jnp.int32)
        jax.eval_shape(lambda params, tokens: phi3_jax.Phi3(config).apply({"params": params}, tokens), params, tokens)
        _traced.clear()
        _traced.add((config, shapes))


_traced: set[Any] = set()


def of_tokenizer(tokenizer: Tokenizer) -> Read:
    """The ids of some texts, and what they decode to."""
    ids = [tokenizer.encode(text, parse_special=special) for text in TEXTS for special in (False, True)]
    found: Read = {"ids": digest(ids), "texts": digest([tokenizer.decode(each) for each in ids])}
    found["specials"] = digest(sorted(tokenizer.special_ids), tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size)
    if tokenizer.chat_template is not None:
        found["chat"] = digest(phi3_jax.encode_chat(tokenizer, MESSAGES))
    return found


def with_changes(checkpoint: phi3_jax.Checkpoint, **changes: Any) -> phi3_jax.Checkpoint:
    """The model with other sizes, and so with other weights."""
    config = dataclasses.replace(checkpoint.config, **changes)
    return dataclasses.replace(checkpoint, config=config, params=phi3_jax.random_params(config))

"""Prompts before they run: text becomes token ids, and a prompt that cannot be answered raises an error."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np

from phi3_jax.checkpoint import Checkpoint

Prompt = str | Sequence[int] | np.ndarray | jax.Array


def encode_prompt(checkpoint: Checkpoint, prompt: Prompt) -> list[int]:
    """Token ids of a prompt; ids pass through.

    Raises:
      ValueError: there is text but no tokenizer, or what is neither text nor token ids, or the text is far longer than
        the model's context.
    """
    if not isinstance(prompt, str):
        try:
            return [operator.index(token) for token in prompt]
        except TypeError:
            raise ValueError(f"a prompt is text or a list of token ids, not {str(prompt)[:60]}") from None
    if checkpoint.tokenizer is None:
        raise ValueError(
            "the checkpoint has no tokenizer: put tokenizer.json or tokenizer.model into its folder, or pass token ids"
        )
    return checkpoint.tokenizer.encode(prompt, add_eos=False, most=checkpoint.config.max_position_embeddings)


def as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or several -> a list of prompts."""
    if isinstance(prompts, str):
        return [prompts]
    if isinstance(prompts, np.ndarray | jax.Array):
        if prompts.ndim not in (1, 2) or not np.issubdtype(prompts.dtype, np.integer):
            raise ValueError(
                f"an array of prompts must hold token ids [T] or [B, T], not {prompts.dtype} {prompts.shape}"
            )
        return [prompts.tolist()] if prompts.ndim == 1 else prompts.tolist()
    if not isinstance(prompts, Iterable):
        raise ValueError(f"a prompt is text or a list of token ids, not {prompts!r}")
    items: list[Any] = list(prompts)
    return [items] if items and not isinstance(items[0], str) and np.ndim(items[0]) == 0 else items


def for_each(value: Any, rows: int, single: Any, name: str) -> list[Any]:
    """One value for each row, from a single value or a list. Raises ValueError for a list of another length."""
    if isinstance(value, np.ndarray | jax.Array) and value.ndim == 0:
        value = value.item()
    if isinstance(value, single):
        return [value] * rows
    if len(value) != rows:
        raise ValueError(f"{name} has {len(value)} entries for {rows} prompts")
    return list(value)


def check_batch(checkpoint: Checkpoint, prompts: Sequence[Sequence[int]], max_new_tokens: Sequence[int]) -> None:
    """Raises ValueError if a limit is below 1, or for a prompt as `check_prompt` does."""
    for i, (prompt, limit) in enumerate(zip(prompts, max_new_tokens, strict=True)):
        if limit < 1:
            raise ValueError(f"max_new_tokens={limit} must be at least 1")
        check_prompt(checkpoint, prompt, f"prompt {i}")


def check_prompt(checkpoint: Checkpoint, prompt: Sequence[int], name: str) -> None:
    """Raises ValueError if a prompt is empty, has ids outside of the vocabulary, or leaves no room for an answer."""
    vocabulary, context = checkpoint.config.vocab_size, checkpoint.config.max_position_embeddings
    if len(prompt) == 0:
        raise ValueError(f"{name} is empty: give it at least one token")
    if len(prompt) >= context:
        raise ValueError(
            f"{name} has {len(prompt)} tokens, which leaves no room for an answer in the model's context of "
            f"{context}: shorten it"
        )
    if outside := [token for token in prompt if not 0 <= token < vocabulary]:
        raise ValueError(f"{name} has ids {outside[:5]} outside of the vocabulary of {vocabulary}")

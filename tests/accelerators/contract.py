"""What a compiled program of text generation does with weights and cache, beside what it has to do.

Axis letters: L layer, B batch, T prompt chunk, S slot, K key-value heads, H head dim, V vocab.
"""

from __future__ import annotations

from typing import Any

import hlo
import jax
import jax.numpy as jnp
import traffic

from phi3_jax.config import Phi3Config

USED = 0.5  # the share of the cache's slots that hold tokens, where bytes are counted
_NEARLY_ALL = 0.995


def facts(
    text: str, config: Phi3Config, params: Any, cache: Any, batch: int, tokens: int, has_logits: bool
) -> dict[str, Any]:
    """What the text of a program says, as values for JSON.

    Args:
      params, cache: of the program, as shapes.
      tokens: how many of each row the program reads at a time.
      has_logits: whether the program makes logits.

    Returns:
      "writes": the instructions that write as much as the smallest matrix of a layer, or a layer of the cache;
      "scores": those that write an array of a prompt's queries and keys;
      "conditionals", "open_loops": those that a GPU's host waits for;
      "read", "written", "kernels": bytes of one token of each row, or of a chunk of the prompts; of each kernel, too,
      whose number is "launches";
      "needed", "logits": the bytes of weights and used cache, and of the logits.
    """
    program = hlo.parse(text)
    slots = cache.k.shape[-2]
    shares = _shares(config, params, cache)
    one = traffic.cost(program, _token_loop(program, config.num_hidden_layers, shares), shares)
    layer = cache.k.size // config.num_hidden_layers
    rows = {tokens, batch * tokens} if tokens > 1 else set[int]()
    return {
        "layers": config.num_hidden_layers,
        "writes": traffic.large_writes(program, min(smallest_matrix(config, params), layer), rows),
        "scores": traffic.scores(program, tokens, slots) if tokens > 1 else [],
        "conditionals": hlo.conditionals(program),
        "open_loops": hlo.open_loops(program),
        "read": one.read,
        "written": one.written,
        "kernels": one.kernels,
        "launches": len(one.kernels),
        "needed": needed(config, params, cache, has_logits),
        "logits": 4 * batch * config.vocab_size,
    }


def needed(config: Phi3Config, params: Any, cache: Any, has_logits: bool) -> float:
    """The bytes that a token takes at least: the layers' weights, the head's, and the used cache."""
    head = "lm_head" if "lm_head" in params else "embed_tokens"  # of the embedding, only one row is read
    weights = {"layers": params["layers"]} | ({"head": params[head]} if has_logits else {})
    return size(weights) + USED * size([cache.k, cache.v, cache.k_scale, cache.v_scale])


def smallest_matrix(config: Phi3Config, params: Any) -> int:
    """The number of elements of a layer's smallest matrix; two integers of 4 bits in a byte are one."""
    is_packed = any(leaf.dtype.name == "uint8" for leaf in jax.tree.leaves(params["layers"]["mlp"]))
    shortest = config.hidden_size * config.num_attention_heads * config.head_dim
    return shortest // 2 if is_packed else shortest


def _token_loop(program: hlo.Program, layers: int, shares: dict[tuple[int, ...], float]) -> hlo.Computation:
    """The computation that makes one token: the entry, or the body of the loop that takes nearly all of the time."""
    where = program.entry
    while True:
        whole = traffic.cost(program, where, shares)
        for _, turns, body in hlo.loops(program, where):
            part = (turns or 1) * traffic.cost(program, body, shares).read
            if turns != layers and part >= _NEARLY_ALL * whole.read:
                where = body
                break
        else:
            return where


def _shares(config: Phi3Config, params: Any, cache: Any) -> dict[tuple[int, ...], float]:
    """What a kernel of ours reads of an array: of the cache one layer's used slots, of a stack of weights one layer."""
    layers, found = config.num_hidden_layers, dict[tuple[int, ...], float]()
    for leaf in jax.tree.leaves(params["layers"]):
        if leaf.ndim > 1 and leaf.shape[0] == layers:
            found[leaf.shape] = 1 / layers
    for leaf in (cache.k, cache.k_scale):
        if leaf is not None:
            found |= {leaf.shape: USED / layers, leaf.shape[1:]: USED}
    return found


def size(tree: Any) -> int:
    """The bytes of a tree of arrays in a device's memory."""
    return sum(leaf.size * _bits(leaf.dtype) // 8 for leaf in jax.tree.leaves(tree))


def _bits(dtype: Any) -> int:
    # Two integers of 4 bits are a byte in the device's memory, but not in NumPy's.
    return jnp.iinfo(dtype).bits if jnp.issubdtype(dtype, jnp.integer) else 8 * dtype.itemsize

"""Our side of phi3-benchmark, in a process of its own: the compiled functions of engine/decoding.py, timed.

It answers the requests of peer_process.py. The compilation cache is off: `prepare` reports the time of compiling.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import phi3_jax
from phi3_jax.model import slots_needed

from ..engine import Options, decoding
from ..engine.buckets import most_at_once, own_cache_dtype, sizes_for
from ..engine.prefill import Prefill
from ..sampling import Sampling, SamplingArrays
from .model import ModelSpec, load_model
from .peer_process import Reply, Rows, peak_memory, serve


class Ours:
    """The `Side` that runs phi3_jax."""

    def platform(self, spec: dict[str, Any]) -> Reply:
        """Where it computes, and the weights' dtype there; only this process looks, as an accelerator is one's own."""
        return {"platform": jax.default_backend(), "dtype": ModelSpec(**spec).resolved_dtype()}

    def load(self, spec: dict[str, Any], cache_dtype: str | None = None) -> Reply:
        """spec: the fields of a ModelSpec. The reply also has the config, and what runs each operation.

        "free_bytes" are those of an accelerator's memory; None on the CPU, and where it does not say.
        """
        jax.config.update("jax_enable_compilation_cache", False)
        self._model = model = load_model(ModelSpec(**spec))
        self._cache_dtype = jnp.dtype(cache_dtype) if cache_dtype else own_cache_dtype(model)
        self._case: Case | None = None
        skipped = 0 if model.config.tie_word_embeddings else _size(model.params["embed_tokens"])
        return {
            "versions": {"jax": jax.__version__},
            "weight_bytes": _size(model.params) - skipped,
            "free_bytes": stats["bytes_limit"] - stats["bytes_in_use"] if (stats := _memory_stats()) else None,
            "cache_bytes": float(self._cache_dtype.itemsize),
            "config": model.config.to_hf(),
            "device": jax.devices()[0].device_kind,
            "status": phi3_jax.kernels.status(model.params, self._cache_dtype, model.config.head_dim),
        }

    def memory(self) -> Reply:
        """The most memory that was used at once: the accelerator's, or on the CPU this process's."""
        stats = _memory_stats()
        return {"peak_bytes": stats["peak_bytes_in_use"]} if stats else peak_memory()

    def export(self, spec: dict[str, Any], path: str, kind: str) -> Reply:
        """Writes the weights for a peer: a GGUF file of a type, or with kind "folder" safetensors."""
        checkpoint = load_model(ModelSpec(**spec), "rows")
        if kind == "folder":
            phi3_jax.save(checkpoint, path)
            return {}
        from phi3_jax.checkpoint.gguf.writer import save_gguf  # needs the extra `gguf`

        save_gguf(checkpoint, path, kind)  # type: ignore[arg-type]  # it says itself which types there are
        return {}

    def prepare(self, kind: str, rows: Rows, new_tokens: int) -> Reply:
        """See `peer_process.Side`."""
        self._case = Case(self._model, rows, new_tokens if kind == "decode" else 0, self._cache_dtype)
        self._case.measure()
        return {
            "note": f"cache {self._cache_dtype.name}",
            "compile": self._case.compile_seconds,
            "cache_bytes": self._case.cache_bytes,
        }

    def measure(self) -> Reply:
        """See `peer_process.Side`."""
        assert self._case is not None  # `prepare` comes first
        seconds, token = self._case.measure()
        return {"seconds": seconds, "token": token}

    def release(self) -> Reply:
        """See `peer_process.Side`."""
        self._case = None
        return {}


class Case:
    """Rows whose prefill, or whose decoding, is run again and again.

    Attributes:
      compile_seconds: what compiling took, so far.
      cache_bytes: bytes of one number in the cache, scales included.
    """

    def __init__(self, model: phi3_jax.Checkpoint, rows: Rows, new_tokens: int, cache_dtype: Any) -> None:
        """Reads the rows. With new_tokens = 0 the prefill will be measured, otherwise decoding."""
        self._model, self._context, self._new_tokens = model, len(rows[0]), new_tokens
        self.compile_seconds, self._compiled = 0.0, set[tuple[Any, ...]]()
        config, options, batch = model.config, Options(), len(rows)
        _, room = sizes_for(model, batch, self._context + new_tokens + 1, options, cache_dtype)
        self._chunk, capacity = options.prefill_chunk, slots_needed(config, room, most_at_once(options))
        if config.sliding_window and config.sliding_window + new_tokens > capacity and capacity < room:
            # The new tokens would overwrite keys that are needed again when `_go_back` removes these tokens.
            raise ValueError(f"{new_tokens} new tokens are more than a cache of a window can go back: ask for fewer")
        self._settings = decoding.Settings(
            limits=jnp.full(batch, new_tokens + 1, jnp.int32),
            end_ids=jnp.zeros(0, jnp.int32),  # no token ends a row early
            sampling=SamplingArrays.of([Sampling()] * batch, config.vocab_size),
            prompt_lengths=jnp.full(batch, self._context, jnp.int32),
        )
        tokens = jnp.asarray(np.pad(np.asarray(rows, np.int32), ((0, 0), (0, room - self._context))))
        self._state = decoding.begin(config, self._settings, tokens, capacity, cache_dtype)
        cache = self._state.cache
        numbers = batch * capacity * 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
        self.cache_bytes = (_size(cache) - cache.positions.nbytes) / numbers
        self._read()

    def measure(self) -> tuple[float, int]:
        """-> (seconds, the first row's newest token)."""
        self._go_back(0 if self._new_tokens == 0 else self._context)
        begin, compiled = time.perf_counter(), self.compile_seconds
        if self._new_tokens == 0:
            self._read()
        else:
            steps = jnp.int32(self._new_tokens)
            self._state, _ = self._call(decoding.decode, self._state, self._settings, steps)
        newest = int(np.asarray(self._state.tokens)[0, int(self._state.lengths[0]) - 1])
        return time.perf_counter() - begin - (self.compile_seconds - compiled), newest

    def _read(self) -> None:
        """Reads the rows, as `Run` does, and takes their first tokens."""
        prefill = Prefill.start(self._model.params, len(self._state.tokens), self._context, self._chunk)
        self._state = prefill.read_all(functools.partial(self._call, decoding.read), self._state)
        self._state = self._call(decoding.answer, self._state, prefill.last, self._settings)

    def _go_back(self, kept: int) -> None:
        """Removes all tokens from the cache but the first `kept`; if there are any, the token after them stays, too."""
        state = self._state
        positions = jnp.where(state.cache.positions < kept, state.cache.positions, -1)
        self._state = dataclasses.replace(
            state,
            cache=dataclasses.replace(state.cache, positions=positions),
            lengths=jnp.full_like(state.lengths, self._context + (kept > 0)),
            done=jnp.zeros_like(state.done),
        )
        jax.block_until_ready(self._state)

    def _call(self, function: Any, *args: Any) -> Any:
        """Calls a jitted function of the model and `args`; the first time, compiles it and adds to compile_seconds."""
        program = (function, *(arg for arg in args if isinstance(arg, int)))  # shapes are the same throughout a case
        if program not in self._compiled:
            begin = time.perf_counter()
            function.lower(self._model.config, self._model.params, *args).compile()
            self.compile_seconds += time.perf_counter() - begin
            self._compiled.add(program)
        return jax.block_until_ready(function(self._model.config, self._model.params, *args))


def _memory_stats() -> dict[str, int] | None:
    """What an accelerator says of its memory; None on the CPU."""
    return None if jax.default_backend() == "cpu" else jax.devices()[0].memory_stats()


def _size(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


if __name__ == "__main__":
    serve(Ours())

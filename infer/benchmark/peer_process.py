"""The programs that phi3-benchmark measures beside ours, each in a process of its own: llama.cpp, and transformers.

    python peer_process.py llama_cpp|transformers

Requests and replies are JSON objects, one per line, on standard input and output: load, prepare (a case), measure (it,
any number of times), release (it), memory. The other Python needs llama-cpp-python, or torch and transformers; nothing
of phi3_jax is imported here.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any, Protocol, TextIO

Reply = dict[str, Any]
Rows = list[list[int]]  # token ids, as many in each row

_BATCH = 512  # tokens that llama.cpp is given at a time
_PAGE = 256  # llama.cpp rounds the tokens that a sequence has room for up to this
_TRIAL = 4  # calls, to find out whether flash attention is faster


class Side(Protocol):
    """What answers the requests. Raises ValueError, OSError, ImportError or MemoryError for those it cannot answer."""

    def load(self, *args: Any, **request: Any) -> Reply:  # a peer has arguments of its own
        """Loads the weights -> {"versions", "weight_bytes" if known, "cache_bytes": of a number in the cache}."""

    def prepare(self, kind: str, rows: Rows, new_tokens: int) -> Reply:
        """Gets ready to read the rows ("prefill"), or to go on from them ("decode"), and runs that once."""

    def measure(self) -> Reply:
        """Runs it again -> {"seconds"}, and for prefill {"token"}: the most likely next token of the first row."""

    def release(self) -> Reply:
        """Frees what `prepare` has made."""


def serve(side: Side) -> None:
    """Answers requests until standard input ends; each call of a method is one request."""
    replies = take_standard_output()
    for line in sys.stdin:
        request: dict[str, Any] = json.loads(line)
        name = request.pop("do")
        method: Callable[..., Reply] = getattr(side, name, peak_memory) if name == "memory" else getattr(side, name)
        begin = time.perf_counter()
        try:
            reply = method(**request)
        except (ValueError, OSError, ImportError, MemoryError) as error:
            traceback.print_exc()
            reply = {"error": f"{type(error).__name__}: {error}"}
        # The seconds that `measure` itself replies are more exact.
        print(json.dumps({"seconds": time.perf_counter() - begin, **reply}), file=replies, flush=True)


def take_standard_output() -> TextIO:
    """Standard output for the replies only: whatever libraries print goes to standard error from now on."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return replies


def peak_memory() -> Reply:
    """The most memory that this process has had at once, mapped files included: Linux's VmHWM."""
    with open("/proc/self/status", encoding="ascii") as file:
        line = next(line for line in file if line.startswith("VmHWM"))
    return {"peak_bytes": int(line.split()[1]) * 1024}


class LlamaCpp:
    """llama.cpp through its C interface, as its own llama-bench uses it: the tokens are given, nothing is sampled."""

    def load(self, path: str, threads: int, flash_attention: str = "best") -> Reply:
        """path: a GGUF file; flash_attention: "on", "off", or "best": whichever is faster in each case."""
        import llama_cpp

        self._lib, self._threads = llama_cpp, threads
        self._ways = {"on": [1], "off": [0], "best": [1, 0]}[flash_attention]
        self._silence = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self._silence, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = 0
        self._model = llama_cpp.llama_model_load_from_file(path.encode(), params)
        if not self._model:
            raise ValueError(f"llama.cpp could not load {path}")
        self._context: Any = None
        # The cache is of float16 by default.
        return {"versions": {"llama-cpp-python": llama_cpp.__version__}, "cache_bytes": 2.0}

    def quantize(self, source: str, target: str, kind: str, threads: int) -> Reply:
        """Writes a GGUF file of another type with llama.cpp's own quantiser; kind is such as "q4_k_m"."""
        import llama_cpp

        params = llama_cpp.llama_model_quantize_default_params()
        params.nthread, params.ftype = threads, getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind.upper()}")
        partial = f"{target}.partial"  # of a fixed name, so that kills do not leave many
        try:
            if llama_cpp.llama_model_quantize(source.encode(), partial.encode(), ctypes.byref(params)):
                raise ValueError(f"llama.cpp could not quantise {source}")
            with open(partial, "rb") as file:
                os.fsync(file.fileno())
            os.replace(partial, target)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(partial)
        return {}

    def prepare(self, kind: str, rows: Rows, new_tokens: int) -> Reply:
        """See `Side`. Tries both ways of attention, if asked to, and keeps the faster one."""
        self._kind, self._rows, self._new_tokens = kind, rows, new_tokens
        best: tuple[float, int] | None = None
        for way in self._ways:
            self._open(way)
            seconds = self._trial()
            if best is None or seconds < best[0]:
                best = seconds, way
        assert best is not None  # there is at least one way
        if best[1] != self._ways[-1]:
            self._open(best[1])
        return {"note": f"flash attention {'on' if best[1] else 'off'}"}

    def measure(self) -> Reply:
        """See `Side`."""
        return self._prefill() if self._kind == "prefill" else self._decode(self._new_tokens)

    def release(self) -> Reply:
        """See `Side`."""
        if self._context is not None:
            self._lib.llama_batch_free(self._batch)
            self._lib.llama_free(self._context)
            self._context = None
        return {}

    def _open(self, flash_attention: int) -> None:
        """Makes a context, with the rows in its cache for "decode"."""
        self.release()
        tokens = -(-(len(self._rows[0]) + self._new_tokens + 1) // _PAGE) * _PAGE
        params = self._lib.llama_context_default_params()
        params.n_ctx, params.n_seq_max = tokens * len(self._rows), len(self._rows)
        params.n_batch = params.n_ubatch = _BATCH
        params.n_threads = params.n_threads_batch = self._threads
        params.flash_attn_type = flash_attention
        self._context = self._lib.llama_init_from_model(self._model, params)
        if not self._context:
            raise ValueError("llama.cpp could not make a context; is there memory enough?")
        self._batch = self._lib.llama_batch_init(_BATCH, 0, 1)
        self._memory = self._lib.llama_get_memory(self._context)
        if self._kind == "decode":
            self._read()

    def _trial(self) -> float:
        if self._kind == "prefill":
            self._prefill()
            return self._prefill()["seconds"]
        self._decode(1)
        return self._decode(min(_TRIAL, self._new_tokens))["seconds"]

    def _read(self) -> None:
        for sequence, row in enumerate(self._rows):
            for begin in range(0, len(row), _BATCH):
                chunk = [(token, begin + i, sequence) for i, token in enumerate(row[begin : begin + _BATCH])]
                self._run(chunk, len(chunk) - 1 if begin + len(chunk) == len(row) else None)

    def _prefill(self) -> Reply:
        self._lib.llama_memory_clear(self._memory, False)
        begin = time.perf_counter()
        self._read()
        self._lib.llama_synchronize(self._context)
        seconds = time.perf_counter() - begin
        logits = self._lib.llama_get_logits_ith(self._context, -1)
        count = self._lib.llama_vocab_n_tokens(self._lib.llama_model_get_vocab(self._model))
        # Of the last row that was read; cases of this kind have only one.
        return {"seconds": seconds, "token": max(range(count), key=logits.__getitem__)}

    def _decode(self, steps: int) -> Reply:
        context = len(self._rows[0])
        for sequence in range(len(self._rows)):
            self._lib.llama_memory_seq_rm(self._memory, sequence, context, -1)
        begin = time.perf_counter()
        for step in range(steps):
            self._run([(row[step % context], context + step, sequence) for sequence, row in enumerate(self._rows)], -1)
        self._lib.llama_synchronize(self._context)
        return {"seconds": time.perf_counter() - begin}

    def _run(self, tokens: list[tuple[int, int, int]], wanted: int | None) -> None:
        """Runs (token, position, sequence) ..., with the logits of one (its index), of all (-1) or of none (None)."""
        batch = self._batch
        batch.n_tokens = len(tokens)
        for i, (token, position, sequence) in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = token, position, 1, sequence
            batch.logits[i] = wanted in (-1, i)
        if code := self._lib.llama_decode(self._context, batch):
            raise ValueError(f"llama_decode gave {code}")


class Transformers:
    """transformers on the CPU: its own model and cache, the most likely token at each step."""

    def load(self, path: str, threads: int, dtype: str) -> Reply:
        """path: a folder with config.json and safetensors."""
        import torch
        import transformers

        torch.set_num_threads(threads)
        self._torch, self._transformers = torch, transformers
        self._model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype)).eval()
        embedding, head = self._model.get_input_embeddings().weight, self._model.get_output_embeddings().weight
        size = sum(weight.nbytes for weight in self._model.parameters())
        return {
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
            "weight_bytes": size if head is embedding else size - embedding.nbytes,
            "cache_bytes": float(embedding.element_size()),
        }

    def prepare(self, kind: str, rows: Rows, new_tokens: int) -> Reply:
        """See `Side`."""
        self._kind, self._new_tokens, self._rows = kind, new_tokens, self._torch.tensor(rows)
        self._cache: Any = None
        self._next: Any = None
        with self._torch.inference_mode():
            self._read()
        self.measure()
        return {"note": f"attention {self._model.config._attn_implementation}"}

    def measure(self) -> Reply:
        """See `Side`."""
        with self._torch.inference_mode():
            return self._prefill() if self._kind == "prefill" else self._decode()

    def release(self) -> Reply:
        """See `Side`."""
        self._cache = self._next = None
        return {}

    def _read(self) -> None:
        # Without the config every layer keeps all keys, so that new ones can be removed again.
        self._cache = self._transformers.DynamicCache()
        for chunk in self._rows.split(_BATCH, dim=1):
            self._next = self._step(chunk)

    def _step(self, tokens: Any) -> Any:
        out = self._model(input_ids=tokens, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1:].argmax(dim=-1)

    def _prefill(self) -> Reply:
        begin = time.perf_counter()
        self._read()
        token = int(self._next[0, 0])
        return {"seconds": time.perf_counter() - begin, "token": token}

    def _decode(self) -> Reply:
        if new := self._cache.get_seq_length() - self._rows.shape[1]:
            self._cache.crop(-new)
        begin, token = time.perf_counter(), self._next
        for _ in range(self._new_tokens):
            token = self._step(token)
        token.tolist()
        return {"seconds": time.perf_counter() - begin}


if __name__ == "__main__":
    serve(LlamaCpp() if sys.argv[1] == "llama_cpp" else Transformers())

"""Generation as users run it: first token, prefill and decoding, beside what memory and arithmetic allow."""

from __future__ import annotations

import time
from typing import Any

import jax
import models
import numpy as np

import phi3_jax
from phi3_jax.infer import Run
from phi3_jax.infer.benchmark.roofline import Work, decode_work, prefill_work

NEW = 64


def measure(report: Any, rehearse: bool) -> None:
    """Adds a line for each form and batch: decoding behind 512 tokens; and prefills of 512 and 4000 tokens."""
    config = models.config(rehearse)
    for form in models.FORMS[2:] if rehearse else models.FORMS:
        if not report.has_time(f"{form} weights", 45):
            return
        begin = time.perf_counter()
        checkpoint = models.checkpoint(config, form)
        jax.block_until_ready(checkpoint.params)
        report.add(f"{form} weights", {"bytes": float(_size(checkpoint)), "made, s": time.perf_counter() - begin})
        for batch in (1, 8) if rehearse else (1, 8, 32):
            if report.has_time(f"{form} decode, batch {batch}", 25):
                _decode(report, checkpoint, form, batch, 24 if rehearse else 512)
        if report.has_time(f"{form} long prompt", 25):
            _long_prompt(report, checkpoint, form, 48 if rehearse else 4000)
        memory = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
        report.add(f"{form} peak memory so far, bytes", memory)
        del checkpoint


def _decode(report: Any, checkpoint: phi3_jax.Checkpoint, form: str, batch: int, context: int) -> None:
    first, per_step, run = _timed(checkpoint, batch, context)
    work = decode_work(checkpoint.config, context + NEW, batch, 1, _read(checkpoint), 2)
    found = {"tokens/s": batch / per_step, "ms per step": per_step * 1e3} | _of_limits(report, work, per_step)
    found |= {"first token, ms": first * 1e3, "compiling, s": run.timings.compile}
    report.add(f"{form} decode, batch {batch}, context {context}", found)
    if batch == 1:
        _add_prefill(report, checkpoint, form, context, first)


def _long_prompt(report: Any, checkpoint: phi3_jax.Checkpoint, form: str, length: int) -> None:
    first, _, _ = _timed(checkpoint, 1, length)
    _add_prefill(report, checkpoint, form, length, first)


def _add_prefill(report: Any, checkpoint: phi3_jax.Checkpoint, form: str, length: int, seconds: float) -> None:
    work = prefill_work(checkpoint.config, length, _read(checkpoint))
    found = {"tokens/s": length / seconds, "first token, ms": seconds * 1e3} | _of_limits(report, work, seconds)
    report.add(f"{form} prefill {length}", found)


def _timed(checkpoint: phi3_jax.Checkpoint, batch: int, context: int) -> tuple[float, float, Run]:
    """-> (seconds to the first token, seconds of a step; the best of three, all compiled; the first run)."""
    rows = np.random.default_rng(0).integers(5, checkpoint.config.vocab_size - 9, (batch, context)).tolist()
    firsts, steps, runs = [], [], []
    for attempt in range(4):  # the first one compiles
        begin = time.perf_counter()
        run = Run(checkpoint, rows, [2 * NEW + 8] * batch)
        while not any(new.token_ids for new in run.advance(1)):
            pass
        first = time.perf_counter() - begin
        run.advance(NEW)
        begin = time.perf_counter()
        run.advance(NEW)
        if attempt:
            firsts.append(first)
            steps.append((time.perf_counter() - begin) / NEW)
        runs.append(run)
    return min(firsts), min(steps), runs[0]


def _of_limits(report: Any, work: Work, seconds: float) -> dict[str, float]:
    """Which part of the measured bandwidth and rate this is."""
    limits = report.found
    if "bandwidth" not in limits or "rate" not in limits:
        return {}
    return {
        "of bandwidth": work.bytes / limits["bandwidth"] / seconds,
        "of matmul rate": (work.linear + work.attention) / limits["rate"] / seconds,
    }


def _size(checkpoint: phi3_jax.Checkpoint) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(checkpoint.params))


def _read(checkpoint: phi3_jax.Checkpoint) -> int:
    """Bytes of the weights that a step reads: of the embedding it takes rows."""
    table = checkpoint.params["embed_tokens"]
    return _size(checkpoint) - sum(leaf.nbytes for leaf in jax.tree.leaves(table))

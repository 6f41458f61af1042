"""A step of LoRA on Phi-3-mini, in tokens per second and as a part of the matrix rate that was measured (MFU)."""

from __future__ import annotations

from typing import Any

import jax
import models
import numpy as np
from limits import best

from phi3_jax.train.data import Batch
from phi3_jax.train.run.flops import step_flops
from phi3_jax.train.settings import Settings, resolved
from phi3_jax.train.step import make_train_step, start


def measure(report: Any, rehearse: bool) -> None:
    """Adds a line for LoRA over bfloat16 and one over int4, 4096 tokens in a row."""
    T = 64 if rehearse else 4096
    for form in ("int4",) if rehearse else ("bfloat16", "int4"):
        name = f"LoRA step, {form}, {T} tokens"
        if not report.has_time(name, 45):
            return
        config = models.config(rehearse)
        settings = resolved(
            Settings(
                train="lora",
                dtype="bfloat16",
                quantize="" if form == "bfloat16" else form,
                sequence_length=T,
                batch_size=1,
                accumulation=1,
                remat="full",
            )
        )
        state, frozen = start(settings, config, models.stacked(config, form))
        step = make_train_step(settings, config)
        rng = np.random.default_rng(0)
        tokens = rng.integers(5, config.vocab_size, (1, 1, T)).astype(np.int32)
        segments = np.zeros_like(tokens)
        batch = Batch(tokens, np.ones(tokens.shape, np.float32), np.arange(T, dtype=np.int32)[None, None], segments)
        held = [state]  # the step donates it

        def once(step: Any = step, frozen: Any = frozen, batch: Batch = batch, held: list[Any] = held) -> Any:
            held[0], metrics = step(held[0], frozen, batch)
            return metrics

        seconds = best(once, repeats=3, calls=2)
        found = {"tokens/s": T / seconds, "loss": float(once()["loss"])}
        if "rate" in report.found:
            found["MFU of the measured rate"] = step_flops(settings, config, batch) / seconds / report.found["rate"]
        report.add(name, found)
        del state, frozen, held, step
        jax.clear_caches()

"""transformers with torch.compile and a static cache, on a random model of the same sizes, where torch is there."""

from __future__ import annotations

import time
from typing import Any

import models
import speed


def measure(report: Any, rehearse: bool) -> None:
    """Adds a line for each batch: the peer's decoding in bfloat16, and how many times as fast ours was."""
    try:
        import torch
        import transformers
    except ImportError as error:
        report.add("peer", f"left out: {error}")
        return
    config = models.config(rehearse)
    place = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(place):
        theirs = transformers.Phi3ForCausalLM(transformers.Phi3Config(**config.to_hf())).to(torch.bfloat16).eval()
    theirs.generation_config.eos_token_id = None
    theirs.generation_config.cache_implementation = "static"
    theirs.forward = torch.compile(theirs.forward, mode="reduce-overhead", fullgraph=True)
    context = 24 if rehearse else 512
    for batch in (1, 8, 32):
        if not report.has_time(f"peer decode, batch {batch}", 60):
            return
        ids = torch.randint(5, config.vocab_size - 9, (batch, context), device=place)
        per_step = _step_seconds(torch, theirs, ids)
        found = {"tokens/s": batch / per_step, "ms per step": per_step * 1e3}
        ours = report.found.get(f"bfloat16 decode, batch {batch}, context {context}")
        if isinstance(ours, dict):
            found["ours is, times as fast"] = per_step * 1e3 / ours["ms per step"]
        report.add(f"peer decode, batch {batch}, context {context}", found)


def _step_seconds(torch: Any, model: Any, ids: Any) -> float:
    """Seconds of a step: what 2 N + 1 new tokens take longer than N + 1."""

    def taken(new: int) -> float:
        begin = time.perf_counter()
        with torch.inference_mode():
            model.generate(ids, max_new_tokens=new, min_new_tokens=new, do_sample=False)
        if ids.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - begin

    lengths = speed.NEW + 1, 2 * speed.NEW + 1
    for new in lengths:
        taken(new)  # compiles
    short, long = (min(taken(new) for _ in range(3)) for new in lengths)
    return (long - short) / speed.NEW

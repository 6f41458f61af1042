"""Where in the code each part of a report is computed."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from phi3_jax import Phi3, Tokenizer, inspection
from phi3_jax.kernels.attention import xla
from phi3_jax.kernels.attention.masks import attention_mask
from phi3_jax.kernels.linear import gated
from phi3_jax.model.decoder import MLP, Attention, DecoderLayer, rms_norm
from phi3_jax.model.points import Tap
from phi3_jax.model.rope import rotate

from ..sampling import processors
from ..sampling.pick import process

# The sections of the report, and the parts of the model that the page names.
PARTS: dict[str, Callable[..., Any]] = {
    "tokens": Tokenizer.encode,
    "embedding": Phi3.embed,
    "nearest": inspection.nearest,
    "layer": DecoderLayer,
    "norm": rms_norm,
    "attention": Attention,
    "rotation": rotate,
    "softmax": xla.attention,
    "window": attention_mask,
    "mlp": MLP,
    "gate": gated,
    "residual": DecoderLayer.__call__,
    "lens": inspection.logit_lens,
    "heads": inspection.pattern_scores,
    "rollout": inspection.rollout,
    "attribution": inspection.logit_attribution,
    "surprise": inspection.surprise,
    "entropy": inspection.entropy,
    "next": Phi3.unembed,
    "temperature": processors.apply_temperature,
    "top_k": processors.keep_top_k,
    "top_p": processors.keep_top_p,
    "min_p": processors.keep_min_p,
    "sampling": process,
    "points": Tap,
    "run": inspection.run,
}


def locations() -> dict[str, dict[str, Any]]:
    """For each of PARTS the module's path in the repository, the line, and the name."""
    return {part: _location(function) for part, function in PARTS.items()}


def _location(function: Any) -> dict[str, Any]:
    function = inspect.unwrap(function)
    module = function.__module__
    path = module.removeprefix("phi3_jax.") if module.startswith(("phi3_jax.infer.", "phi3_jax.train.")) else module
    return {
        "module": path.replace(".", "/") + ("/__init__.py" if _is_package(function) else ".py"),
        "line": inspect.getsourcelines(function)[1],
        "name": function.__qualname__,
    }


def _is_package(function: Any) -> bool:
    return (inspect.getsourcefile(function) or "").endswith("__init__.py")

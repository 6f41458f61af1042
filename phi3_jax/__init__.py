"""Phi-3 language models in JAX. The public names, in the order in which a reader meets them."""

import importlib
import importlib.metadata
from typing import Any

from phi3_jax.checkpoint import Checkpoint as Checkpoint
from phi3_jax.checkpoint import GenerationSettings as GenerationSettings
from phi3_jax.checkpoint import load as load
from phi3_jax.checkpoint import save as save
from phi3_jax.config import LongRope as LongRope
from phi3_jax.config import Phi3Config as Phi3Config
from phi3_jax.presets import PRESETS as PRESETS
from phi3_jax.text import Tokenizer as Tokenizer
from phi3_jax.text import load_tokenizer as load_tokenizer
from phi3_jax.text import encode_chat as encode_chat
from phi3_jax.text import render_chat as render_chat
from phi3_jax.text import parse_tool_calls as parse_tool_calls
from phi3_jax.model import Phi3 as Phi3
from phi3_jax.model import KVCache as KVCache
from phi3_jax.kernels.attention.masks import positions_from_mask as positions_from_mask
from phi3_jax.model import random_params as random_params
from phi3_jax import inspection as inspection


def __getattr__(name: str) -> Any:
    # infer and train import the library, so it must not import them: they are loaded at first use.
    if name in ("infer", "train"):
        return importlib.import_module(f"phi3_jax.{name}")
    if name == "__version__":  # asked for late, so that the library can be imported without being installed
        return importlib.metadata.version("phi3_jax")
    raise AttributeError(f"module 'phi3_jax' has no attribute {name!r}")

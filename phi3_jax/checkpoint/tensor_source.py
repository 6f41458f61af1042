"""What every reader of files returns: named tensors, each of which is read on demand."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from phi3_jax.checkpoint.gguf.blocks import IntegerForm, IntegerRows


@dataclasses.dataclass(frozen=True)
class TensorSource:
    """One named tensor of a checkpoint, not yet read.

    Attributes:
      shape: as Hugging Face has it: [out, in] or [D].
      dtype: name of the dtype that `read` gives.
      read: reads the tensor (dequantising, fusing, permuting as its format needs); nothing is kept between calls.
      form: the form of the file's integers; None for floats, and for integers that can only be read as floats.
      quantized: reads the integers; it returns None if they cannot express the weights exactly: then use `read`.
    """

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], np.ndarray]
    form: IntegerForm | None = None
    quantized: Callable[[], IntegerRows | None] | None = None

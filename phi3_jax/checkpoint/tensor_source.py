"""What every reader of files hands out: named tensors, each read when it is asked for."""

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
      form: of the integers that the file holds; None where it holds floats, or integers that are not used as they are.
      quantized: reads those; None where some weights could not be expressed exactly: then `read` the floats.
    """

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], np.ndarray]
    form: IntegerForm | None = None
    quantized: Callable[[], IntegerRows | None] | None = None

"""The two operations that take a model's time: `linear.linear` and `attention.attention`.

Each is one function with a file for each way of doing it; XLA's is the reference.
"""

from phi3_jax.kernels.linear.packed import PackedTensor as PackedTensor
from phi3_jax.kernels.native.build import Unavailable as Unavailable
from phi3_jax.kernels.native.build import why_unavailable as why_unavailable
from phi3_jax.kernels.report import status as status

"""The two operations that take a model's time: `linear.linear` and `attention.attention`.

Each is a room with one public function and a file for each way of computing it, of which xla.py is the reference.
native/ has the C++ of the CPU kernels. Others use the names below, the two functions, what they take as arguments,
and `machine`, which measures what the hardware can do at best.
"""

from phi3_jax.kernels.linear.lora import LoraTensor as LoraTensor
from phi3_jax.kernels.linear.packed import PackedTensor as PackedTensor
from phi3_jax.kernels.linear.quantized import QuantizedTensor as QuantizedTensor
from phi3_jax.kernels.native.build import Unavailable as Unavailable
from phi3_jax.kernels.native.build import why_unavailable as why_unavailable
from phi3_jax.kernels.report import status as status

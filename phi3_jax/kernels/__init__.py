"""The two operations that take a model's time: `linear.linear` and `attention.attention`; and the norm between them.

Each is a package with one public function and a module for each implementation, of which xla.py is the reference;
norm.py has both of its own.
native/ has the C++ of the CPU kernels. Other packages use the names below, the two functions with the types of
their arguments, `dispatch`, which chooses between a kernel and its reference, and `machine`, which measures the limits
of the hardware.
"""

from phi3_jax.kernels.linear.lora import LoraRows as LoraRows
from phi3_jax.kernels.linear.lora import LoraTensor as LoraTensor
from phi3_jax.kernels.linear.packed import PackedTensor as PackedTensor
from phi3_jax.kernels.linear.packed import has_packed as has_packed
from phi3_jax.kernels.linear.per_layer import PerLayer as PerLayer
from phi3_jax.kernels.linear.per_layer import has_per_layer as has_per_layer
from phi3_jax.kernels.linear.per_layer import split_layers as split_layers
from phi3_jax.kernels.linear.per_layer import stack_layers as stack_layers
from phi3_jax.kernels.linear.quantized import QuantizedTensor as QuantizedTensor
from phi3_jax.kernels.native.build import why_unavailable as why_unavailable
from phi3_jax.kernels.native.compiler import Unavailable as Unavailable
from phi3_jax.kernels.report import status as status

"""Weights as floats -> weights as small integers.

policy.py says which weights become which integers; rounding.py rounds without data, calibration.py (with gptq.py) for
the activations of a text. The results are `QuantizedTensor`s. Other packages use the names below.
"""

from phi3_jax.kernels import QuantizedTensor as QuantizedTensor
from phi3_jax.quantization.calibration import calibrate as calibrate
from phi3_jax.quantization.policy import Format as Format
from phi3_jax.quantization.policy import formats as formats
from phi3_jax.quantization.policy import parse_format as parse_format
from phi3_jax.quantization.policy import policy_of as policy_of
from phi3_jax.quantization.policy import quantized_shapes as quantized_shapes
from phi3_jax.quantization.rounding import quantize as quantize
from phi3_jax.quantization.rounding import quantize_params as quantize_params

"""Checkpoints in files <-> a configuration, a tree of parameters, a tokenizer and settings.

load_save.py has the two functions that users call; each kind of file has a module (safetensors, quantised ones) or a
package (gguf/, and peft/ for adapters), and assemble.py stacks their tensors over the layers. Other packages use the
names below, the modules of gguf/, and `atomic_write`; benchmarks `assemble` weights of a `tensor_source` of their own.
"""

from phi3_jax.checkpoint.assemble import Layout as Layout
from phi3_jax.checkpoint.assemble import default_dtype as default_dtype
from phi3_jax.checkpoint.assemble import fastest_layout as fastest_layout
from phi3_jax.checkpoint.assemble import named_tensors as named_tensors
from phi3_jax.checkpoint.load_save import Checkpoint as Checkpoint
from phi3_jax.checkpoint.load_save import GenerationSettings as GenerationSettings
from phi3_jax.checkpoint.load_save import load as load
from phi3_jax.checkpoint.load_save import resolve as resolve
from phi3_jax.checkpoint.load_save import save as save
from phi3_jax.checkpoint.load_save import stored_dtype as stored_dtype
from phi3_jax.checkpoint.peft import load_adapter as load_adapter
from phi3_jax.checkpoint.peft import save_adapter as save_adapter
from phi3_jax.checkpoint.quantized_files import is_quantized as is_quantized

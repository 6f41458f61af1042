"""Checkpoints in files <-> a configuration, a tree of parameters, a tokenizer and settings.

load_save.py has the two functions that users call; each kind of file has a module (safetensors, quantised ones) or a
package (gguf/, and peft/ for adapters); unfused.py has Llama's names, assemble.py stacks the tensors over the layers
(adapted.py: with an adapter), as_floats.py makes floats of them again, and placement.py says where they are put. Other
packages use the names below, the modules of gguf/, and `atomic_write`; benchmarks `assemble` weights of a
`tensor_source` of their own, and the table of weights reads what is in files (stored_tensors.py).
"""

from phi3_jax.checkpoint.as_floats import as_floats as as_floats
from phi3_jax.checkpoint.assemble import named_tensors as named_tensors
from phi3_jax.checkpoint.load_save import Checkpoint as Checkpoint
from phi3_jax.checkpoint.load_save import GenerationSettings as GenerationSettings
from phi3_jax.checkpoint.load_save import holds_integers as holds_integers
from phi3_jax.checkpoint.load_save import load as load
from phi3_jax.checkpoint.load_save import read_config as read_config
from phi3_jax.checkpoint.load_save import require_tokenizer as require_tokenizer
from phi3_jax.checkpoint.load_save import resolve as resolve
from phi3_jax.checkpoint.load_save import save as save
from phi3_jax.checkpoint.load_save import stored_dtype as stored_dtype
from phi3_jax.checkpoint.peft import AttachableAdapter as AttachableAdapter
from phi3_jax.checkpoint.peft import find_adapter as find_adapter
from phi3_jax.checkpoint.peft import kind_of_weights as kind_of_weights
from phi3_jax.checkpoint.peft import load_adapter as load_adapter
from phi3_jax.checkpoint.peft import read_attachable as read_attachable
from phi3_jax.checkpoint.peft import save_adapter as save_adapter
from phi3_jax.checkpoint.peft import write_trained_on as write_trained_on
from phi3_jax.checkpoint.placement import Layout as Layout
from phi3_jax.checkpoint.placement import auto_dtype as auto_dtype
from phi3_jax.checkpoint.placement import fastest_layout as fastest_layout
from phi3_jax.checkpoint.quantized_files import is_quantized as is_quantized
from phi3_jax.checkpoint.stored_tensors import stored_tensors as stored_tensors

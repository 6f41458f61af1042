"""Adapters in PEFT's files, adapter_config.json and adapter_model.safetensors: read, attached, merged, written.

settings.py reads the first file and decides which modules it means, with the regular expressions of patterns.py;
modules.py lists the modules that a model has, in both spellings (qkv_proj here and in Phi-3; q_proj, k_proj and v_proj
in Llama and Mistral); reader.py checks the second file's tensors against both. merging.py adds them to the floats of a
checkpoint that is being loaded, on_integers.py puts them on top of integers, attached.py stacks them for training or a
trial, and writer.py writes what was trained here. trained_on.py has a third file, which only we write.
"""

from phi3_jax.checkpoint.peft.attached import AttachableAdapter as AttachableAdapter
from phi3_jax.checkpoint.peft.attached import load_adapter as load_adapter
from phi3_jax.checkpoint.peft.attached import read_attachable as read_attachable
from phi3_jax.checkpoint.peft.merging import merged_sources as merged_sources
from phi3_jax.checkpoint.peft.on_integers import on_integers as on_integers
from phi3_jax.checkpoint.peft.reader import AdapterFiles as AdapterFiles
from phi3_jax.checkpoint.peft.reader import find_adapter as find_adapter
from phi3_jax.checkpoint.peft.reader import read_adapter as read_adapter
from phi3_jax.checkpoint.peft.trained_on import TRAINED_ON as TRAINED_ON
from phi3_jax.checkpoint.peft.trained_on import kind_of_weights as kind_of_weights
from phi3_jax.checkpoint.peft.trained_on import write_trained_on as write_trained_on
from phi3_jax.checkpoint.peft.writer import save_adapter as save_adapter

"""The decoder: token ids -> logits, as a pure function of a tree of parameters.

Read decoder.py first; rope.py rotates queries and keys, cache.py holds the keys and values of earlier tokens, and
parameters.py says which parameters there are and how checkpoints name them, points.py at which points one can look
inside. Other packages use the names below, and `rope`, `decoder` and `points` where they run a single layer, write its
constants into a file or look inside.
"""

from phi3_jax.model.cache import KVCache as KVCache
from phi3_jax.model.cache import slots_needed as slots_needed
from phi3_jax.model.decoder import Phi3 as Phi3
from phi3_jax.model.parameters import DTYPES as DTYPES
from phi3_jax.model.parameters import Params as Params
from phi3_jax.model.parameters import dtype_name as dtype_name
from phi3_jax.model.parameters import parameter_count as parameter_count
from phi3_jax.model.parameters import parameter_shapes as parameter_shapes
from phi3_jax.model.parameters import random_params as random_params
from phi3_jax.model.parameters import require_floats as require_floats
from phi3_jax.model.parameters import tensor_names as tensor_names

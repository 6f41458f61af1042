"""A look inside a checkpoint, on top of phi3_jax.inspection, the library of pure functions.

stepping.py generates token by token and reads what led to each, timeline.py tells of a greedy run beside a sampled one,
comparison.py says where two models part.
"""

from .comparison import compare as compare
from .stepping import Step as Step
from .stepping import steps as steps
from .timeline import timeline as timeline

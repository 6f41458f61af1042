"""A look inside: values of a run by the names of their points, changes of them, and what one learns from both.

running.py reads values and makes changes, edits.py describes changes, slopes.py has the gradients of what comes out.
Pure functions of a config and parameters; the points themselves are in model/points.py, because the decoder passes
them. README.md shows how. `phi3_jax.infer.inspection` draws the page.
"""

from phi3_jax.inspection.edits import add as add
from phi3_jax.inspection.edits import change as change
from phi3_jax.inspection.edits import moved as moved
from phi3_jax.inspection.edits import replace as replace
from phi3_jax.inspection.edits import scale as scale
from phi3_jax.inspection.edits import zero as zero
from phi3_jax.inspection.running import by_layer as by_layer
from phi3_jax.inspection.running import compiled as compiled
from phi3_jax.inspection.running import matching as matching
from phi3_jax.inspection.running import run as run
from phi3_jax.inspection.slopes import gradients as gradients
from phi3_jax.model.points import POINTS as POINTS
from phi3_jax.model.points import Edit as Edit
from phi3_jax.model.points import Hooks as Hooks

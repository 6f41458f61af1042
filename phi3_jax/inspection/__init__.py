"""A look inside: values of a run by the names of their points, changes of them, and what one learns from both.

running.py reads values and makes changes, edits.py describes changes, slopes.py has the gradients of what comes out.
patching.py makes a change at every layer and position (forks.py: without computing again what it leaves as it was);
lens.py asks every layer for its next word, attribution.py divides a logit among its sources, heads.py says what heads
look at, words.py what lies near a vector, steering.py makes a vector that turns a text.

Pure functions of a config and parameters; the points themselves are in model/points.py, because the decoder passes
them. `phi3_jax.infer.inspection` draws the page.
"""

from phi3_jax.inspection.attribution import Attribution as Attribution
from phi3_jax.inspection.attribution import attribution_of as attribution_of
from phi3_jax.inspection.attribution import biggest as biggest
from phi3_jax.inspection.attribution import logit_attribution as logit_attribution
from phi3_jax.inspection.edits import add as add
from phi3_jax.inspection.edits import change as change
from phi3_jax.inspection.edits import moved as moved
from phi3_jax.inspection.edits import replace as replace
from phi3_jax.inspection.edits import scale as scale
from phi3_jax.inspection.edits import zero as zero
from phi3_jax.inspection.heads import HeadScores as HeadScores
from phi3_jax.inspection.heads import ablation as ablation
from phi3_jax.inspection.heads import head_scores as head_scores
from phi3_jax.inspection.heads import pattern_scores as pattern_scores
from phi3_jax.inspection.heads import rolled as rolled
from phi3_jax.inspection.heads import rollout as rollout
from phi3_jax.inspection.lens import Guesses as Guesses
from phi3_jax.inspection.lens import guesses as guesses
from phi3_jax.inspection.lens import logit_lens as logit_lens
from phi3_jax.inspection.lens import logits_of as logits_of
from phi3_jax.inspection.patching import attribution_patching as attribution_patching
from phi3_jax.inspection.patching import logit_difference as logit_difference
from phi3_jax.inspection.patching import patch_sweep as patch_sweep
from phi3_jax.inspection.patching import sweep as sweep
from phi3_jax.inspection.running import by_layer as by_layer
from phi3_jax.inspection.running import matching as matching
from phi3_jax.inspection.running import run as run
from phi3_jax.inspection.slopes import gradients as gradients
from phi3_jax.inspection.steering import steering_vector as steering_vector
from phi3_jax.inspection.words import analogy as analogy
from phi3_jax.inspection.words import entropy as entropy
from phi3_jax.inspection.words import nearest as nearest
from phi3_jax.inspection.words import surprise as surprise
from phi3_jax.inspection.words import token_rows as token_rows
from phi3_jax.model.points import POINTS as POINTS
from phi3_jax.model.points import Edit as Edit
from phi3_jax.model.points import Hooks as Hooks

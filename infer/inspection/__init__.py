"""A look inside of a model while it reads a prompt, for people: the report, its page and picture, tables of weights.

report.py collects everything about one prompt as plain JSON values, which SCHEMA.md documents; readings.py, texts.py,
sources.py and rounding.py are parts of it. stepping.py generates token by token and reads what led to each, timeline.py
tells of a greedy run beside a sampled one, comparison.py says where two models part. html.py makes the page (its texts,
style and script are in page/), picture.py a still picture, summary.py lines for a terminal. weights.py and sizes.py are
about a model without a prompt. What is computed comes from `phi3_jax.inspection`. Nothing here has flags or prints:
phi3-inspect does.
"""

from .comparison import compare as compare
from .report import collect as collect
from .stepping import Step as Step
from .stepping import steps as steps
from .timeline import timeline as timeline
from .weights import weigh as weigh
from .weights import weigh_shapes as weigh_shapes

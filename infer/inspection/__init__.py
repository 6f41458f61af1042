"""A look inside of a model while it reads a prompt, for people: the report, its page and picture, tables of weights.

report.py collects everything about one prompt as plain JSON values, which SCHEMA.md documents; readings.py, texts.py,
sources.py and rounding.py are parts of it. html.py makes the page (its texts, style and script are in page/),
picture.py a still picture, summary.py lines for a terminal. weights.py and sizes.py are about a model without a prompt.
What is computed comes from `phi3_jax.inspection`. Nothing here has flags or prints: phi3-inspect does.
"""

from .report import collect as collect
from .weights import weigh as weigh
from .weights import weigh_shapes as weigh_shapes

"""A look inside of a model while it reads a prompt, for people: the report, its page and picture, tables of weights.

report.py collects everything about one prompt as plain JSON values, which SCHEMA.md documents; texts.py, readings.py
and sources.py are parts of it. weights.py is about a model without a prompt. What is computed comes from
`phi3_jax.inspection`. Nothing here has flags or prints: phi3-inspect does.
"""

from .report import collect as collect

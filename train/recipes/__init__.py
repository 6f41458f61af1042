"""Recipes: each module has SETTINGS, and a docstring with the command, the hardware and what to expect.

They import Settings by its whole name, so that a copy of one, anywhere, is a recipe, too (`phi3-train --recipe FILE`).
data/ makes the public-domain data that they train on; phi3-fetch-data writes it.
"""

"""Recipes: each module has SETTINGS, and a docstring with the command, the hardware and what to expect.

data/ makes the public-domain data that they train on; phi3-fetch-data writes it.
"""

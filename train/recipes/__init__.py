"""Recipes: each module has SETTINGS, and a docstring with the command, the hardware and what to expect."""

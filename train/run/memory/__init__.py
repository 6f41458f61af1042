"""How much memory a step takes, what a run chooses to fit, and what it advises where it does not.

ahead.py compiles steps from shapes alone, estimates.py says what they take, and auto.py takes the first that fits.
"""

"""A training run, from settings to files; it can be stopped or killed, and resumed.

loop.py is the run from top to bottom; the other files are its parts. Other packages use `loop.train`, which needs the
extra `train`, and `observer.Observer`, which is told what the run does.
"""

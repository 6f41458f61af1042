"""A training run, from settings to files; it can be stopped or killed, and resumed.

loop.py is the run from top to bottom, steps.py its steps, and records/ what they write; memory/ chooses what settings
leave open, by steps that it compiles; the other files are parts, too. Other packages use `loop.train`, which needs the
extra `train`, and `observer.Observer`, which is told what the run does.
"""

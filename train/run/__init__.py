"""A training run: from settings to files, over hours, through stops and kills.

loop.py is the run from top to bottom; the others are its parts. Others use `loop.train`, which needs the extra `train`,
and `observer.Observer`, which is told what the run does.
"""

"""Training, on top of the library.

A training step, in reading order: settings.py, step.py, forward.py, loss.py (dpo.py for preferences), optimizer.py,
sharding.py. What settings may be is in values.py, and beside one another in checks.py. The subpackages are data/, run/
(a whole run), evaluation/, recipes/ and programs/. From Python a run is `phi3_jax.train.run.loop.train(Settings(...))`,
which needs the extra `train`.
"""

from .settings import Settings as Settings

"""Continuous batching: jobs come and go between the calls of the compiled functions, and never wait for one another.

jobs.py is what is asked for; engine.py takes turns: scheduler.py says whose turn it is, reader.py reads a prompt into a
state of its own, batch.py writes all answers at once. sequence.py is a job under way, states.py the same for a device,
statistics.py counts them, warm_up.py compiles all programs beforehand. adapters.py has
the weights for rows of several LoRA adapters, pooling.py reads texts for their embeddings.
"""

from ...answer import Piece as Piece
from .engine import Engine as Engine
from .jobs import Job as Job
from .jobs import QueueFull as QueueFull
from .jobs import Ticket as Ticket
from .options import EngineOptions as EngineOptions
from .statistics import Statistics as Statistics

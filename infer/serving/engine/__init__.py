"""Continuous batching: jobs come and go between the calls of the compiled functions, and never wait for one another."""

from ...answer import Piece as Piece
from .jobs import Job as Job
from .jobs import QueueFull as QueueFull
from .jobs import Ticket as Ticket

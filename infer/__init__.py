"""Generating text. The public names: a table of contents."""

from .generate import Generation as Generation
from .generate import generate as generate
from .sampling import Sampling as Sampling
from .stream import Timings as Timings
from .stream import stream as stream

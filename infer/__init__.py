"""Generating text. The public names: a table of contents."""

from .generate import Generation as Generation
from .generate import Timings as Timings
from .generate import generate as generate
from .generate import stream as stream

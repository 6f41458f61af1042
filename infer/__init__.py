"""Generating text. The public names: a table of contents."""

from .answer import Generation as Generation
from .answer import Piece as Piece
from .beam import Beam as Beam
from .beam import beam_search as beam_search
from .engine import decoding as decoding
from .engine.options import Options as Options
from .engine.prompt_cache import PromptCache as PromptCache
from .engine.run import Run as Run
from .engine.run import Timings as Timings
from .engine.speculation import DraftModel as DraftModel
from .engine.speculation import PromptLookup as PromptLookup
from .generate import generate as generate
from .generate import stream as stream
from .sampling.grammar import Grammar as Grammar
from .sampling.logprobs import TokenLogprob as TokenLogprob
from .sampling.params import Sampling as Sampling

"""Generating text. The public names: a table of contents."""

from .answer import Generation as Generation
from .answer import Piece as Piece
from .beam import Beam as Beam
from .beam import beam_search as beam_search
from .generate import generate as generate
from .generate import stream as stream
from .grammar import Grammar as Grammar
from .logprobs import TokenLogprob as TokenLogprob
from .options import Options as Options
from .prompt_cache import PromptCache as PromptCache
from .run import Run as Run
from .run import Timings as Timings
from .sampling import Sampling as Sampling
from .speculation import DraftModel as DraftModel
from .speculation import PromptLookup as PromptLookup

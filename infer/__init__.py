"""Generating text: prompts in, answers out. The names below are what users and `train` may use.

generate.py is text in, text out; conversation.py a chat, beam.py beam search; answer.py an answer while it grows, and
prompts.py what comes before. Below them are rooms: sampling/, engine/, benchmark/ and programs/.
"""

from .answer import Generation as Generation
from .answer import Piece as Piece
from .beam import Beam as Beam
from .beam import beam_search as beam_search
from .engine import DraftModel as DraftModel
from .engine import Options as Options
from .engine import PromptCache as PromptCache
from .engine import PromptLookup as PromptLookup
from .engine import Run as Run
from .engine import Timings as Timings
from .engine import decoding as decoding
from .generate import generate as generate
from .generate import stream as stream
from .sampling import Grammar as Grammar
from .sampling import Sampling as Sampling
from .sampling import TokenLogprob as TokenLogprob

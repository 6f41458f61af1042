"""Generating text: prompts in, answers out. The names below are what users and `train` may use.

generate.py answers prompts, conversation.py holds a chat, beam.py is beam search. prompts.py tokenises and checks the
prompts, answer.py turns new tokens into text. The subpackages are sampling/, engine/, benchmark/ and programs/.
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

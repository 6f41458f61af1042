"""Logits -> the next token, and what else may decide about an answer's tokens.

params.py is what may be asked for, processors.py changes logits, pick.py takes a token. grammar.py allows only tokens
that keep to a form, stop_strings.py ends an answer, logprobs.py records how likely tokens were. Others use the names
below, and `pick.pick`.
"""

from .grammar import Grammar as Grammar
from .logprobs import TokenLogprob as TokenLogprob
from .params import Sampling as Sampling
from .params import SamplingArrays as SamplingArrays
from .stop_strings import StopWatch as StopWatch

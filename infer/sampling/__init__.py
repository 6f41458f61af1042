"""From logits to the next token; grammars, stop strings and log-probabilities.

params.py has the sampling settings, processors.py changes logits, pick.py picks a token. grammar.py allows only tokens
that fit a grammar, stop_strings.py ends an answer at a stop string, logprobs.py records log-probabilities. Other
packages use the names below, `pick.pick`, and the arrays of `grammar` and `logprobs` in the compiled loop.
"""

from .grammar import Grammar as Grammar
from .logprobs import TokenLogprob as TokenLogprob
from .params import Sampling as Sampling
from .params import SamplingArrays as SamplingArrays
from .stop_strings import StopWatch as StopWatch
from .stop_strings import stop_strings as stop_strings
from .stop_strings import watched_tokens as watched_tokens

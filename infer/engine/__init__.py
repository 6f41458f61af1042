"""Token ids in, token ids out: prompts are read in chunks, and answers written by one compiled loop.

decoding.py has the compiled functions, state.py what they are given and return; prefill.py and run.py call them for a
batch, as options.py says; speculation.py guesses tokens ahead, prompt_cache.py keeps the keys and values of a prefix,
failures.py says why a row cannot go on, news.py what a call has done, timings.py where the time went. Other packages
use the names below, `decoding`, `prefill`, `failures`, `news`, and `buckets` for the sizes of arrays.
"""

from .options import Options as Options
from .prompt_cache import PromptCache as PromptCache
from .run import NewTokens as NewTokens
from .run import Run as Run
from .speculation import DraftModel as DraftModel
from .speculation import PromptLookup as PromptLookup
from .state import RopePolicy as RopePolicy
from .timings import Timings as Timings

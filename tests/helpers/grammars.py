"""What the tests of grammar.py share."""

import numpy as np

from phi3_jax.infer.sampling import Grammar
from phi3_jax.infer.sampling.grammar import GrammarMasks
from phi3_jax.text import Tokenizer


def allowed(masks: GrammarMasks, vocab_size: int, row: int = 0) -> np.ndarray:
    """Ids that a row may write, unpacked by numpy."""
    bits = np.unpackbits(masks.masks()[row].view(np.uint8), bitorder="little")[:vocab_size]
    return np.flatnonzero(bits)


def accepts(tokenizer: Tokenizer, grammar: Grammar, text: str, end: int) -> bool:
    """Whether the tokens of a text pass the masks, and the text may end after them."""
    vocab_size = max(tokenizer.vocab_size, end + 1)
    masks = GrammarMasks(tokenizer, [grammar], [end], vocab_size)
    for token in [*tokenizer.encode(text, add_bos=False), end]:
        if token not in allowed(masks, vocab_size):
            return False
        masks.push(0, token)
    return True

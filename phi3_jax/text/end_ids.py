"""Which tokens end an answer: one rule for every kind of checkpoint."""

import warnings
from collections.abc import Iterable

from phi3_jax.text.added_tokens import END_NAMES
from phi3_jax.text.answers import encode_answers
from phi3_jax.text.tokenizer import Tokenizer


def end_ids(named: Iterable[int], tokenizer: Tokenizer | None) -> tuple[int, ...]:
    """The ids that end an answer, each once.

    Args:
      named: those that the checkpoint's own settings name. Behind them come the tokenizer's eos, the token with which
        its chat template ends an answer (training teaches these two), and tokens such as `<|end|>` (`END_NAMES`), so
        that no answer runs into the next turn.

    Warns:
      UserWarning: the template cannot be asked, as there is no process to run it in.
    """
    found: list[int | None] = list(named)
    if tokenizer is not None:
        found += [tokenizer.eos_id, _turn_end(tokenizer)]
        found += [token.id for token in tokenizer.added_tokens if token.content in END_NAMES]
    return tuple(dict.fromkeys(token_id for token_id in found if token_id is not None))


def _turn_end(tokenizer: Tokenizer) -> int | None:
    try:
        ids, [(_, end)] = encode_answers(
            tokenizer, [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
        )
    except ValueError:  # no template, or one that ends answers with no token
        return None
    except OSError as error:  # plain text needs no template
        warnings.warn(
            f"{tokenizer.source}: which token ends an answer is taken from the settings alone, for {error}",
            stacklevel=4,
        )
        return None
    return ids[end - 1]

"""Models for lm-evaluation-harness (the extra `harness`), which has hundreds of tasks.

import lm_eval, phi3_jax
from phi3_jax.train.evaluation.harness import HarnessModel

model = HarnessModel(phi3_jax.load("demo", adapter="runs/train/adapter"), phi3_jax.infer.generate)
print(lm_eval.simple_evaluate(model, tasks=["arc_easy"])["results"])
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from phi3_jax.checkpoint import Checkpoint, require_tokenizer

from .evaluate import continuation
from .score import Path, Request, Score, score

try:
    from lm_eval.api.model import LM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    raise ImportError(f"lm-evaluation-harness is missing ({error}): pip install 'phi3_jax[harness]'") from None

_MOST_NEW_TOKENS = 256
_BATCH = 8  # prompts that are answered at a time


class HarnessModel(LM):  # type: ignore[misc]
    """A checkpoint with the interface of lm-evaluation-harness. Prompts are plain text, without a chat template."""

    def __init__(self, checkpoint: Checkpoint, generate: Callable[..., Sequence[Any]], path: Path | None = None):
        """Wraps a checkpoint.

        Args:
          generate: `phi3_jax.infer.generate`, for tasks whose answers are generated and not chosen.
          path: what computes log-probabilities, see score.py; None: what generation runs.

        Raises:
          ValueError: the checkpoint has no tokenizer, or neither a bos nor an eos token.
        """
        super().__init__()
        self._checkpoint, self._generate, self._path = checkpoint, generate, path
        self._tokenizer = require_tokenizer(checkpoint)
        ends = [token for token in (self._tokenizer.bos_id, self._tokenizer.eos_id) if token is not None]
        if not ends:
            raise ValueError(f"{self._tokenizer.source}: no bos or eos token, which texts have to begin with here")
        self._first = ends[0]
        self._limit = checkpoint.config.max_position_embeddings

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """For each (context, continuation): the continuation's log-probability, and whether it is the greedy answer."""
        texts = [request.args for request in requests]
        pairs = [continuation(self._tokenizer, context, text, self._limit) for context, text in texts]
        return [(_total(each), each.greedy) for each in score(self._checkpoint, pairs, path=self._path)]

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """For each (text,): its log-probability, in windows that do not overlap where it is longer than the context."""
        windows = [list(self._windows(request.args[0])) for request in requests]
        flat = [window for each in windows for window in each]
        scores = iter(score(self._checkpoint, flat, path=self._path))
        return [sum(_total(next(scores)) for _ in each) for each in windows]

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """For each (context, {"until": strings, ...}): the answer up to the first of these strings."""
        answers: list[str] = []
        while len(answers) < len(requests):
            how = requests[len(answers)].args[1]
            # The next requests with the same settings.
            batch = itertools.takewhile(lambda request: request.args[1] == how, requests[len(answers) :])  # noqa: B023
            answers += self._answers([request.args[0] for request in itertools.islice(batch, _BATCH)], how)
        return answers

    def _answers(self, contexts: Sequence[str], how: dict[str, Any]) -> list[str]:
        until = how.get("until") or []
        new_tokens = how.get("max_gen_toks", _MOST_NEW_TOKENS)
        room = self._limit - new_tokens
        if room < 1:
            raise ValueError(f"max_gen_toks={new_tokens}: leaves no room in the model's context of {self._limit}")
        generations = self._generate(
            self._checkpoint,
            [self._tokenizer.encode(context, add_eos=False)[-room:] for context in contexts],
            max_new_tokens=new_tokens,
            temperature=float(how.get("temperature", 0.0)) if how.get("do_sample") else 0.0,
            stop=[until] if isinstance(until, str) else until,
        )
        if failed := next((generation for generation in generations if generation.error is not None), None):
            raise ValueError(failed.error)
        return [generation.text for generation in generations]

    def _windows(self, text: str) -> Iterator[Request]:
        ids = self._tokenizer.encode(text, add_bos=False)
        for pair in get_rolling_token_windows(ids, self._first, self._limit - 1, 1):
            before, own = make_disjoint_window(pair)
            yield Request([*before, *own], len(before))


def _total(found: Score) -> float:
    return float(found.logprobs.sum(dtype=np.float64))

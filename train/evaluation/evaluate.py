"""Perplexity of texts, the loss of data as training has it, and accuracy on questions with several answers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence

import numpy as np

from phi3_jax.checkpoint import Checkpoint, require_tokenizer
from phi3_jax.progress import OnProgress
from phi3_jax.text import Tokenizer

from ..data import Text
from .files import Question
from .score import Path, Request, score


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """The perplexity of texts.

    Attributes:
      tokens: how many were predicted.
      loss: the mean of -log p over them, in nats.
      perplexity: its exponential.
      bits_per_byte: the total loss in bits per byte of text, which can be compared between vocabularies.
    """

    tokens: int
    loss: float
    perplexity: float
    bits_per_byte: float


@dataclasses.dataclass(frozen=True)
class HeldOutLoss:
    """The loss of those tokens that training would learn, like the held-out loss of a run.

    Attributes:
      tokens: how many.
      loss: the mean of -log p over them, in nats.
      perplexity: its exponential.
    """

    tokens: int
    loss: float
    perplexity: float


@dataclasses.dataclass(frozen=True)
class Accuracy:
    """How often the right choice is the likeliest.

    Attributes:
      questions: how many.
      accuracy: by the choice's log-probability.
      accuracy_normalised: by its log-probability per character, which is fair to long choices.
      standard_error: of `accuracy`.
    """

    questions: int
    accuracy: float
    accuracy_normalised: float
    standard_error: float


def perplexity(
    checkpoint: Checkpoint,
    texts: Sequence[str],
    window: int | None = None,
    stride: int | None = None,
    on_progress: OnProgress | None = None,
    path: Path | None = None,
) -> Perplexity:
    """The perplexity of all tokens of all texts; a text's first token counts only if there is a bos token before it.

    A text that is longer than a window is read in windows that begin every `stride` tokens; each token is predicted
    once, in the first window that has it, from at least window - stride tokens before it where there are so many. These
    are the windows of transformers' guide on perplexity, and the mean is over tokens, not over windows.

    Args:
      window: tokens; by default the model's context, 2048 at most.
      stride: by default half the window.
      path: what computes the log-probabilities, see score.py; None: what generation runs.

    Raises:
      ValueError: window or stride make no sense; the checkpoint has no tokenizer; there is nothing to predict.
    """
    limit = checkpoint.config.max_position_embeddings
    window = min(2048, limit) if window is None else window
    stride = max(1, window // 2) if stride is None else stride
    if not 2 <= window <= limit or not 1 <= stride < window:
        raise ValueError(
            f"window={window}, stride={stride}: needs 1 <= stride < window <= {limit}, the model's context"
        )
    tokenizer = require_tokenizer(checkpoint)
    requests = [
        piece for text in texts if text for piece in windows(tokenizer.encode(text, add_eos=False), window, stride)
    ]
    scores = score(checkpoint, requests, on_progress, path)
    tokens = sum(len(each.logprobs) for each in scores)
    if tokens == 0:
        raise ValueError("there is nothing to predict: the texts have less than two tokens")
    total = -math.fsum(float(each.logprobs.sum(dtype=np.float64)) for each in scores)
    size = sum(len(text.encode()) for text in texts)
    return Perplexity(tokens, total / tokens, _exp(total / tokens), total / size / math.log(2))


def held_out_loss(
    checkpoint: Checkpoint,
    texts: Sequence[Text],
    on_progress: OnProgress | None = None,
    path: Path | None = None,
) -> HeldOutLoss:
    """The loss of all tokens that training would learn, each predicted from all that stands before it in its text.

    Raises:
      ValueError: a text is longer than the model's context; none has learned tokens.
    """
    texts = [text for text in texts if text.learned.any()]
    begins = [int(text.learned.argmax()) for text in texts]
    requests = [Request(text.tokens.tolist(), begin) for text, begin in zip(texts, begins, strict=True)]
    scores = score(checkpoint, requests, on_progress, path)
    logprobs = [each.logprobs[text.learned[begin:]] for text, begin, each in zip(texts, begins, scores, strict=True)]
    tokens = sum(map(len, logprobs))
    if tokens == 0:
        raise ValueError("no text has tokens that training would learn")
    loss = -math.fsum(float(each.sum(dtype=np.float64)) for each in logprobs) / tokens
    return HeldOutLoss(tokens, loss, _exp(loss))


def _exp(loss: float) -> float:
    """The perplexity, which a model that is far off takes beyond the range of numbers."""
    return math.exp(loss) if loss < 700 else math.inf


def windows(ids: Sequence[int], window: int, stride: int) -> Iterator[Request]:
    """The windows of a text; each scores only the tokens that were not in the window before."""
    end = 0
    for begin in range(0, len(ids), stride):
        new_end = min(begin + window, len(ids))
        yield Request(ids[begin:new_end], end - begin)
        end = new_end
        if end == len(ids):
            return


def accuracy(
    checkpoint: Checkpoint,
    questions: Sequence[Question],
    on_progress: OnProgress | None = None,
    path: Path | None = None,
) -> Accuracy:
    """The accuracy on questions; each choice is scored as the text after the question, with a space between.

    Raises:
      ValueError: there are no questions; a choice is longer than the model's context; the checkpoint has no tokenizer.
    """
    if not questions:
        raise ValueError("there are no questions to answer")
    tokenizer, limit = require_tokenizer(checkpoint), checkpoint.config.max_position_embeddings
    pairs = [(question.context, f" {choice}") for question in questions for choice in question.choices]
    requests = [continuation(tokenizer, context, choice, limit) for context, choice in pairs]
    scores = score(checkpoint, requests, on_progress, path)
    totals = iter([float(each.logprobs.sum(dtype=np.float64)) for each in scores])
    right = right_normalised = 0
    for question in questions:
        each = np.array([next(totals) for _ in question.choices])
        sizes = np.array([len(choice) for choice in question.choices])
        right += int(each.argmax() == question.answer)
        right_normalised += int((each / sizes).argmax() == question.answer)
    count = len(questions)
    rate = right / count
    error = math.sqrt(rate * (1 - rate) / (count - 1)) if count > 1 else math.nan
    return Accuracy(count, rate, right_normalised / count, error)


def continuation(tokenizer: Tokenizer, context: str, text: str, limit: int) -> Request:
    """A request to score a text after a context; if both are too long, the context's beginning is left out.

    As in lm-evaluation-harness, white space at the context's end belongs to the text, the text begins after as many
    tokens as the context has by itself, and an empty context is replaced by the bos or eos token.

    Raises:
      ValueError: the text alone is longer than `limit` tokens.
    """
    stripped = context.rstrip()
    context, text = stripped, context[len(stripped) :] + text
    ids, before = (tokenizer.encode(string, add_eos=False) for string in (context + text, context))
    if not before:
        before = [token for token in (tokenizer.bos_id, tokenizer.eos_id) if token is not None][:1]
        ids = before + ids
    begin = len(before)
    if len(ids) - begin >= limit:
        raise ValueError(f"a text to be scored has {len(ids) - begin} tokens; the model's context is {limit}")
    dropped = max(0, len(ids) - limit)
    return Request(ids[dropped:], begin - dropped)

"""Everything that a page shows of one prompt, as plain JSON values; SCHEMA.md says what each means.

Axis letters: L layer, T token, N query heads, V vocab.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from phi3_jax import Checkpoint, inspection
from phi3_jax.json_files import read_object
from phi3_jax.progress import OnProgress

from ..engine.failures import NOT_FINITE_ADVICE
from ..prompts import check_prompt
from ..sampling import Sampling
from . import readings, texts
from .rounding import rounded
from .sizes import model_section
from .sources import locations
from .weights import kind

FORMAT, VERSION = "phi3-inspect", 1
MOST_TOKENS = 256
MOST_BYTES = 48_000_000
_GUESSES, _NEAREST, _TOP = 3, 8, 20  # how many tokens the lens, the embedding and the end name
_BYTES_PER_WEIGHT = 2.5  # of attention, as text: most are 0, and a comma


def collect(
    checkpoint: Checkpoint,
    ids: Sequence[int],
    prompt: str,
    *,
    name: str = "",
    sampling: Sampling | None = None,
    on_progress: OnProgress | None = None,
) -> dict[str, Any]:
    """Runs a prompt, and reports what the model makes of it.

    Args:
      ids: the prompt's tokens, as the model reads them.
      prompt: the text they come from.
      name: of the model, for titles.
      sampling: how the page's sliders stand at first; by default as generation_config.json says.
      on_progress: called with (steps done, steps in all).

    Returns:
      The report of SCHEMA.md, without "generation" and "comparison".

    Raises:
      ValueError: a prompt that is empty, too long for the model, or whose report would be too large for a page; a
        generation_config.json with settings that cannot be; logits that are not finite numbers.
    """
    check_prompt(checkpoint, ids, "the prompt")
    config = checkpoint.config
    require_size(checkpoint, len(ids))
    settings = sampling_defaults(checkpoint) if sampling is None else sampling
    steps = 4 + 2 * config.num_hidden_layers
    done = 0

    def step() -> None:
        nonlocal done
        done += 1
        if on_progress:
            on_progress(done, steps)

    seen = readings.read(checkpoint, ids)
    if not np.isfinite(seen["logits"]).all():
        raise ValueError(f"the model's logits are not finite numbers: {NOT_FINITE_ADVICE}")
    step()
    report: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "model": model_section(config, name, kind(checkpoint.params)),
        "prompt": prompt,
        "tokens": texts.tokens(checkpoint.tokenizer, ids),
        "vocabulary": {},
        "embedding": _embedding(checkpoint, ids, seen),
    }
    step()
    report |= {
        "attention": {"thousandths": _thousandths(seen["attn.pattern"])},
        "residual": _residual(seen),
        "lens": _lens(checkpoint, seen, step),
        "heads": {name: rounded(each) for name, each in readings.head_scores(checkpoint, ids, seen).items()},
    }
    step()
    surprise, entropy = readings.told(seen["logits"], np.asarray([ids], np.int32))
    report |= {
        "rollout": rounded(readings.last_rollout(seen)),
        "attribution": _attribution(checkpoint, seen),
        "surprise": rounded(np.asarray(surprise)[0]),
        "entropy": rounded(np.asarray(entropy)[0]),
        "next": _next(seen, settings),
        "code": locations(),
    }
    texts.add_vocabulary(report, checkpoint.tokenizer)
    step()
    return report


def require_size(checkpoint: Checkpoint, tokens: int) -> None:
    """Raises ValueError for a prompt whose report nobody could open, with its size and how many tokens would do."""
    config = checkpoint.config
    heads = config.num_hidden_layers * config.num_attention_heads

    def size(count: int) -> float:
        return 6 * config.vocab_size + _BYTES_PER_WEIGHT * heads * count * (count + 1) / 2

    if tokens > MOST_TOKENS or size(tokens) > MOST_BYTES:
        most = max((n for n in range(MOST_TOKENS + 1) if size(n) <= MOST_BYTES), default=0)
        raise ValueError(
            f"the prompt has {tokens} tokens: the weights of its attention, {config.num_hidden_layers} layers x "
            f"{config.num_attention_heads} heads x {tokens} x {tokens}, would make a report of "
            f"{size(tokens) / 1e6:.0f} MB; shorten it to at most {most} tokens"
        )


def sampling_defaults(checkpoint: Checkpoint) -> Sampling:
    """How the checkpoint's generation_config.json would draw tokens; at temperature 1 where it says nothing."""
    path = None if checkpoint.folder is None else checkpoint.folder / "generation_config.json"
    said = read_object(path, wide=True) if path is not None and path.exists() else {}
    names = ("temperature", "top_k", "top_p", "min_p")
    try:
        found = {each: said[each] for each in names if said.get(each) is not None}
        found = {each: value for each, value in found.items() if not (each == "top_k" and value == 0)}  # all, there
        return Sampling(**({"temperature": 1.0} | found))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}; correct it") from None


def _embedding(checkpoint: Checkpoint, ids: Sequence[int], seen: readings.Seen) -> dict[str, Any]:
    near = readings.nearest(checkpoint, ids, _NEAREST)
    pairs = [[[token, rounded(cosine)] for token, cosine in row] for row in near]
    return {"norms": _norms(seen["embed"])[0], "nearest": pairs}


def _norms(values: np.ndarray) -> Any:
    """Of the last axis."""
    return rounded(np.linalg.norm(values.astype(np.float32), axis=-1))


def _thousandths(pattern: np.ndarray) -> list[Any]:
    """[L][N][T][t + 1]: weights as whole thousandths; a token's list ends with its own."""
    whole = np.rint(pattern[:, 0] * 1000).astype(int)
    return [[[row[: t + 1].tolist() for t, row in enumerate(head)] for head in layer] for layer in whole]


def _residual(seen: readings.Seen) -> dict[str, Any]:
    names = {"attention": "attn_out", "mid": "resid_mid", "mlp": "mlp_out", "post": "resid_post"}
    return {"embed": _norms(seen["embed"])[0]} | {name: _norms(seen[point][:, 0]) for name, point in names.items()}


def _lens(checkpoint: Checkpoint, seen: readings.Seen, step: Callable[[], None]) -> dict[str, Any]:
    config = checkpoint.config
    found: dict[str, Any] = {}
    for name, point in {"mid": "resid_mid", "post": "resid_post"}.items():
        found[name] = []
        for layer in range(config.num_hidden_layers):  # one after another: it takes a while
            stream = seen[point][layer : layer + 1]
            said = inspection.guesses(config, checkpoint.params, stream, min(_GUESSES, config.vocab_size), None)
            ids, values = np.asarray(said.ids)[0, 0].tolist(), np.asarray(said.probabilities)[0, 0].tolist()
            found[name].append([_pairs(*place) for place in zip(ids, values, strict=True)])
            step()
    return found


def _pairs(ids: list[int], values: list[float]) -> list[list[Any]]:
    return [[token, rounded(value)] for token, value in zip(ids, values, strict=True)]


def _attribution(checkpoint: Checkpoint, seen: readings.Seen) -> dict[str, Any]:
    found = readings.last_attribution(checkpoint, seen)
    array = {name: np.asarray(value) for name, value in found._asdict().items() if value is not None}
    numbers = {name: array[name][0, 0] for name in ("logit", "embed", "rest")}
    numbers |= {name: array[name][:, 0, 0] for name in ("heads", "mlps")}
    return {"id": int(array["ids"][0, 0])} | {name: rounded(value) for name, value in numbers.items()}


def _next(seen: readings.Seen, sampling: Sampling) -> dict[str, Any]:
    logits = seen["logits"][0, -1]
    exponents = np.exp(logits.astype(np.float64) - logits.max())
    probabilities = exponents / exponents.sum()
    top = np.argsort(-logits, kind="stable")[:_TOP]
    return {
        "logits": base64.b64encode(logits.astype("<f4").tobytes()).decode("ascii"),
        "top": [[int(token), rounded(logits[token]), rounded(probabilities[token])] for token in top],
        "sampling": {each: getattr(sampling, each) for each in ("temperature", "top_k", "top_p", "min_p")},
    }

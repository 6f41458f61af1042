"""Everything that a page shows of one prompt, as plain JSON values; SCHEMA.md says what each means.

Axis letters: L layer, T token, N query heads, V vocab.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from phi3_jax import Checkpoint
from phi3_jax.json_files import read_object
from phi3_jax.progress import OnProgress

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
_PAIRS, _NEAREST, _TOP = 3, 8, 20  # how many tokens the lens, the embedding and the end name
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
        generation_config.json with settings that cannot be.
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
        "heads": _heads(checkpoint, seen),
    }
    step()
    report |= {
        "rollout": rounded(readings.rollout(seen["attn.pattern"])),
        "attribution": _attribution(checkpoint, seen),
        **_surprise(seen, ids),
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
    near, cosines = readings.nearest(checkpoint, ids, _NEAREST)
    return {"norms": _norms(seen["embed"]), "nearest": _pairs(near, cosines)}


def _norms(values: np.ndarray) -> Any:
    return rounded(np.linalg.norm(values.astype(np.float64), axis=-1))


def _pairs(ids: np.ndarray, values: np.ndarray) -> list[list[list[Any]]]:
    """[T, K] of both -> [T][K][id, value]."""
    return [[[token, rounded(value)] for token, value in zip(*row, strict=True)] for row in _rows(ids, values)]


def _rows(ids: np.ndarray, values: np.ndarray) -> list[tuple[list[int], list[float]]]:
    return list(zip(ids.tolist(), values.tolist(), strict=True))


def _thousandths(pattern: np.ndarray) -> list[Any]:
    """[L][N][T][t + 1]: weights as whole thousandths; a token's list ends with its own."""
    whole = np.rint(pattern * 1000).astype(int)
    return [[[row[: t + 1].tolist() for t, row in enumerate(head)] for head in layer] for layer in whole]


def _residual(seen: readings.Seen) -> dict[str, Any]:
    names = {"embed": "embed", "attention": "attn_out", "mid": "resid_mid", "mlp": "mlp_out", "post": "resid_post"}
    return {name: _norms(seen[point]) for name, point in names.items()}


def _lens(checkpoint: Checkpoint, seen: readings.Seen, step: Callable[[], None]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, point in {"mid": "resid_mid", "post": "resid_post"}.items():
        found[name] = []
        for stream in seen[point]:
            ids, values = readings.says(checkpoint.config, checkpoint.params, jnp.asarray(stream), _PAIRS)
            found[name].append(_pairs(np.asarray(ids), np.asarray(values)))
            step()
    return found


def _heads(checkpoint: Checkpoint, seen: readings.Seen) -> dict[str, Any]:
    scores = readings.head_scores(seen["attn.pattern"]) | {"induction": readings.induction(checkpoint)}
    return {name: rounded(values) for name, values in scores.items()}


def _attribution(checkpoint: Checkpoint, seen: readings.Seen) -> dict[str, Any]:
    token = int(seen["logits"][-1].argmax())
    logit = float(seen["logits"][-1, token])
    found = readings.attribution(checkpoint, seen, token)
    rest = logit - found["embed"] - found["heads"].sum() - found["mlps"].sum()
    return {"id": token, "logit": rounded(logit), **{name: rounded(value) for name, value in found.items()}} | {
        "rest": rounded(rest)
    }


def _surprise(seen: readings.Seen, ids: Sequence[int]) -> dict[str, Any]:
    surprise, entropy = [None], []
    for place, logits in enumerate(seen["logits"]):  # one row after another: all of them would be T x V doubles
        logs = readings.log_probabilities(logits)
        entropy.append(rounded(-(np.exp(logs) * logs).sum()))
        if place + 1 < len(ids):
            surprise.append(rounded(-logs[ids[place + 1]]))
    return {"surprise": surprise, "entropy": entropy}


def _next(seen: readings.Seen, sampling: Sampling) -> dict[str, Any]:
    logits = seen["logits"][-1]
    probabilities = np.exp(readings.log_probabilities(logits))
    top = np.argsort(-logits, kind="stable")[:_TOP]
    return {
        "logits": base64.b64encode(logits.astype("<f4").tobytes()).decode("ascii"),
        "top": [[int(token), rounded(logits[token]), rounded(probabilities[token])] for token in top],
        "sampling": {each: getattr(sampling, each) for each in ("temperature", "top_k", "top_p", "min_p")},
    }

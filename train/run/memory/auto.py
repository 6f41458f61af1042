"""What a run chooses itself where its settings say "auto", and what it advises where it does not fit.

Nothing is assumed about memory: each choice is a step that was compiled for it, from shapes alone.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from phi3_jax.checkpoint import kind_of_weights, read_config
from phi3_jax.config import Phi3Config
from phi3_jax.model import Params

from ...settings import CHOSEN, Resolved, Settings, resolved
from ..observer import Observer
from . import estimates
from .ahead import Compiled, compile_step, params_like

_SMALL_CHUNK = 256
Adapters = tuple[Any, Any]

_ADVICE_SECONDS = 90.0  # after which no other change is compiled


def recorded_choices(settings: Settings, recorded: Mapping[str, Any] | None) -> Settings:
    """What is "auto" as the run in the folder chose it; `recorded` is None for a new run."""
    there = {} if recorded is None else recorded["settings"]
    known = {name: there[name] for name in CHOSEN if getattr(settings, name) == "auto" and name in there}
    return dataclasses.replace(settings, **known)


def choose_dtypes(settings: Settings, observer: Observer) -> Settings:
    """The two dtypes, before the weights are loaded in one of them.

    On a CPU float32. GPUs and TPUs compute in bfloat16, and the weights below an adapter are bfloat16; where all are
    trained they are float32 if a step with them fits at its smallest, else bfloat16, which rounding by chance makes
    somewhat noisier. If that is not known, they are bfloat16.
    """
    on_cpu = jax.default_backend() == "cpu"
    if settings.compute_dtype == "auto":
        settings = dataclasses.replace(settings, compute_dtype="float32" if on_cpu else "bfloat16")
    if settings.dtype == "auto":
        exact = on_cpu or (settings.train == "all" and _float32_fits(settings, observer))
        settings = dataclasses.replace(settings, dtype="float32" if exact else "bfloat16")
    return settings


def _float32_fits(settings: Settings, observer: Observer) -> bool:
    if estimates.available() is None:
        return False
    config = read_config(settings.checkpoint)
    *_, smallest = _ladder(dataclasses.replace(settings, dtype="float32"))
    observer.progress("compiling a step in float32", 0, 1)
    found = compile_step(smallest, config, params_like(config, "float32"))
    observer.progress("compiling a step in float32", 1, 1)
    return found.fits


def choose(
    settings: Settings,
    config: Phi3Config,
    params: Params,
    observer: Observer,
    adapters: Adapters = (None, None),
    may_halve: bool | None = None,
) -> Compiled:
    """The first of the settings that "auto" may stand for whose step fits, compiled; else the last of them.

    Args:
      settings: with dtypes.
      params: of which only the shapes matter.
      adapters: what `start` is given as (adapter, reference).
      may_halve: whether fewer rows may go through the model at a time; by default where the settings are "auto".
    """
    steps = list(_ladder(settings, may_halve))
    if estimates.available() is None:
        steps = steps[-1:]
    tried: Compiled | None = None
    for number, candidate in enumerate(steps):
        if tried is not None and number + 1 < len(steps) and not _may_fit(candidate, tried):
            continue
        observer.progress("compiling the step", 0, 1)
        tried = compile_step(candidate, config, params, adapters)
        observer.progress("compiling the step", 1, 1)
        if tried.fits:
            break
    assert tried is not None  # a ladder has a step
    return tried


def told(settings: Settings, chosen: Resolved) -> str:
    """What was chosen of these settings, in one line; nothing if all were given."""
    names = [name for name in CHOSEN if getattr(settings, name) == "auto"]
    values = ", ".join(f"{name} {getattr(chosen, name)}" for name in names)
    return values.replace(", accumulation ", " x accumulation ") if "batch_size" in names else values


def _ladder(settings: Settings, may_halve: bool | None = None) -> Iterator[Resolved]:
    """What "auto" may stand for, the fastest first: less is kept for the backward pass, then fewer rows are held."""
    devices, first = jax.device_count(), resolved(settings)
    for remat in ("none", "dots", "full") if settings.remat == "auto" else (first.remat,):
        last = dataclasses.replace(first, remat=remat)
        yield last
    if is_auto(settings) if may_halve is None else may_halve:
        while last.batch_size % (2 * devices) == 0:
            rows, times = _halved(last)
            last = dataclasses.replace(last, batch_size=rows, accumulation=times)
            yield last
    if settings.loss_chunk == "auto":
        yield dataclasses.replace(last, loss_chunk=_SMALL_CHUNK)


def is_auto(settings: Settings) -> bool:
    """Whether a run chooses how many rows go through the model at a time."""
    return settings.batch_size == "auto" and settings.accumulation == "auto"


def _halved(settings: Resolved) -> tuple[int, int]:
    """Half as many rows at a time, twice as often: (batch_size, accumulation)."""
    return settings.batch_size // 2, 2 * settings.accumulation


def _may_fit(candidate: Resolved, tried: Compiled) -> bool:
    """Whether it may after that one did not: half the rows save half of the working memory at most."""
    found, before = tried.memory, tried.settings
    if found is None or found.available is None or candidate.loss_chunk != before.loss_chunk:
        return True
    share = candidate.batch_size / before.batch_size if candidate.remat == before.remat else 0.0
    return found.needed - (1 - share) * found.working <= found.available


# ---- advice ----


def require_fit(
    compiled: Compiled, config: Phi3Config, params: Params, observer: Observer, adapters: Adapters = (None, None)
) -> None:
    """Raises ValueError if there is not enough memory; its message names what takes less, and how much less.

    The changes are compiled for that, for a minute or two at most.
    """
    if compiled.fits:
        return
    needs = f"the run {compiled.memory}" if compiled.memory else "the compiler finds no room for the run"
    before = compiled.memory.needed if compiled.memory else None
    found: list[tuple[str, estimates.Estimate]] = []
    changes, begun = dict(_changes(compiled.settings, params)), time.perf_counter()
    for number, (text, changed) in enumerate(changes.items()):
        if time.perf_counter() - begun > _ADVICE_SECONDS:
            break
        observer.progress("compiling what may take less", number, len(changes))
        found += _measured(text, changed, config, params, before, adapters)
    if found and not any(each.fits for _, each in found):
        texts = [text for text, _ in found if not text.startswith("sequence_length")]
        together = _together(compiled.settings, [changes[text] for text in texts])
        found += _measured(" ".join(texts), together, config, params, min(each.needed for _, each in found), adapters)
    observer.progress("compiling what may take less", len(changes), len(changes))
    if not found:
        raise ValueError(f"{needs}; no change of its settings takes less: take a smaller checkpoint")
    found.sort(key=lambda each: (not each[1].fits, each[1].needed))
    listed = ", ".join(f"{text} {each.needed / 1e9:.2f} GB{', fits' if each.fits else ''}" for text, each in found)
    raise ValueError(f"{needs}; with a change it takes: {listed}")


def _measured(
    text: str, changed: Resolved, config: Phi3Config, params: Params, before: int | None, adapters: Adapters
) -> list[tuple[str, estimates.Estimate]]:
    """The change and what it takes, if that is less than before."""
    like = params if kind_of_weights(params) else params_like(config, changed.dtype, changed.quantize)
    found = compile_step(changed, config, like, adapters if changed.train == "lora" else (None, None)).memory
    return [(text, found)] if found is not None and (before is None or found.needed < before) else []


def _changes(s: Resolved, params: Params) -> Iterator[tuple[str, Resolved]]:
    """Changes that may help, as --set takes them; what mostly helps most comes first."""
    floats = not kind_of_weights(params)
    possible: list[tuple[bool, dict[str, Any]]] = [
        (s.train == "lora" and floats and not s.dora, {"quantize": "int4"}),
        (s.train == "all", {"train": "lora"}),
        (s.remat != "full", {"remat": "full"}),
        (s.batch_size % (2 * jax.device_count()) == 0, {"batch_size": _halved(s)[0], "accumulation": _halved(s)[1]}),
        (s.dtype == "float32" and floats, {"dtype": "bfloat16"}),
        (s.train == "all" and s.optimizer == "adamw", {"optimizer": "adamw8bit"}),
        (not s.shard_weights and jax.device_count() > 1, {"shard_weights": True}),
        (s.loss_chunk == 0 or s.loss_chunk > _SMALL_CHUNK, {"loss_chunk": _SMALL_CHUNK}),
        (s.sequence_length > 3, {"sequence_length": s.sequence_length // 2}),
    ]
    for helps, values in possible:
        new = {name: value for name, value in values.items() if value != getattr(s, name)}
        if helps:
            text = " ".join(f"{name}={str(value).lower()}" for name, value in new.items())
            yield text, dataclasses.replace(s, **new)


def _together(s: Resolved, changed: list[Resolved]) -> Resolved:
    """All of these changes at once."""
    values: dict[str, Any] = {}
    for each in changed:
        values |= {
            field.name: getattr(each, field.name)
            for field in dataclasses.fields(s)
            if getattr(each, field.name) != getattr(s, field.name)
        }
    return dataclasses.replace(s, **values)

"""A training run from its settings to files, top to bottom: `train`.

A run's folder (`Settings.output`) holds settings.json, data/ (tokenised), checkpoints/, metrics.jsonl, samples.jsonl,
tensorboard/, loss.png, and at the end adapter/ or model/; if a checkpoint of an earlier step was better on held-out
data, that is adapter-best/ or model-best/. The same settings in the same folder resume a run that was stopped or
killed; its weights and metrics are bit for bit those of a run that was not. With more steps a finished run goes on,
too: the state of its last step, with the learning rates that the schedule of the new number of steps has from there on.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import phi3_jax
from phi3_jax.checkpoint import holds_integers, require_tokenizer
from phi3_jax.kernels import has_packed

from ..adapters import fingerprints, notes, reference_adapter, with_init_adapter
from ..checks import check_before_loading
from ..data import epoch_size
from ..settings import Settings, resolved, with_few_rows
from ..step import start
from .checkpoints import Checkpoints, Restored
from .evaluations import Evaluations, evaluations_before, make_evaluation
from .exports import disown_exports_after, export, export_folder, is_exported, settle_exports
from .memory.ahead import start_like
from .memory.auto import choose, choose_dtypes, is_auto, recorded_choices, require_fit, told
from .observer import Observer, Outcome
from .records import MetricsWriter, Window, open_trackers, require_drawing, require_trackers
from .run_data import prepare_data
from .run_folder import (
    check_contents,
    check_settings,
    check_steps,
    describe,
    locked_folder,
    recorded_settings,
    write_settings,
)
from .samples import Sampler, encode_prompts, read_prompts
from .steps import Steps, draw


def train(
    settings: Settings, observer: Observer | None = None, interrupt: Callable[[], bool] = lambda: False
) -> Outcome:
    """Begins or resumes a training run -> how it ended.

    Args:
      observer: its methods are called while the run goes on.
      interrupt: called after each step; True saves and ends the run.

    Raises:
      FileNotFoundError: a file or the checkpoint is not there.
      ValueError: settings that cannot be used; settings, weights, a tokenizer or data other than those of the run in
        the folder, or fewer steps than it has done; data that cannot be used; too little memory; too many steps in a
        row that were not finite.
      OSError: the folder cannot be written, has too little room, or is another process's.
    """
    observer, folder = observer or Observer(), Path(settings.output)
    check_before_loading(settings)
    require_drawing()
    require_trackers(settings)
    prompts = read_prompts(settings)
    with (
        locked_folder(folder),
        Checkpoints(folder / "checkpoints", settings.keep_last, settings.keep_best) as checkpoints,
    ):
        settle_exports(settings)
        recorded, done = checkpoints.about(), max(checkpoints.steps, default=0)
        asked, settings = settings, recorded_choices(settings, recorded)
        check_settings(recorded, settings, done)
        prints = fingerprints(settings)

        # ---- the model and the data ----
        settings = choose_dtypes(settings)
        checkpoint = _load(settings, observer)
        data, held_out = prepare_data(checkpoint, settings, observer)
        about = describe(checkpoint, data.fingerprint, prints)
        epoch = epoch_size(data.counts, settings)
        may_halve, settings = is_auto(settings), with_few_rows(settings, epoch)
        settings = dataclasses.replace(settings, steps=settings.all_steps(epoch), epochs=0)
        check_steps(done, settings)  # once more: the data say how many are in `epochs`
        given, (settings, adapter) = settings, with_init_adapter(settings, checkpoint)
        adapters = adapter, reference_adapter(settings, checkpoint)
        for note in notes(settings, checkpoint.config):
            observer.note(note)

        # ---- what was done before ----
        for text in check_contents(recorded, about, settings):
            observer.note(text)
        evaluations = evaluations_before(recorded, held_out, checkpoints, settings, observer)
        like = start_like(resolved(settings), checkpoint.config, checkpoint.params, *adapters)
        is_over = recorded is not None and _is_over(done, evaluations, settings)
        if is_over and not is_exported(settings, done, checkpoints.best):
            done = _restore(checkpoints, like[0], observer).step  # a broken checkpoint's steps are taken again
            evaluations.forget_after(done)
            is_over = _is_over(done, evaluations, settings)

        state = None
        if not is_over:
            # ---- does it fit? ----
            asked_of = data if held_out is None else held_out
            sampler = Sampler(settings, checkpoint, encode_prompts(prompts, checkpoint, settings), asked_of, observer)
            compiled = choose(settings, checkpoint.config, checkpoint.params, observer, adapters, may_halve)
            settings = compiled.settings
            if chosen := told(asked, settings):
                observer.note(f"auto: {chosen}")
            observer.note(str(compiled.memory))
            require_fit(compiled, checkpoint.config, checkpoint.params, observer, adapters)
            checkpoints.require_room(like[0])

            # ---- begin, or go on ----
            state, frozen = start(settings, checkpoint.config, checkpoint.params, *adapters)
            del adapter, adapters
            checkpoint = dataclasses.replace(checkpoint, params={})  # there may not be room for them twice
            if recorded is not None:
                del state
                restored = _restore(checkpoints, like[0], observer)
                state, done = restored.state, restored.step
                evaluations.forget_after(done)
                observer.note(f"going on after step {done}, from the checkpoint of this run")
            write_settings({**about, "held_out": evaluations.held_out}, settings)
            about |= recorded_settings(given, settings)
            disown_exports_after(done, settings)

            # ---- the steps ----
            evaluate = None
            if held_out is not None:
                evaluate = make_evaluation(settings, checkpoint, frozen, held_out, observer)
            answer, is_new = functools.partial(sampler.answer, frozen), recorded is None
            window = Window(settings, checkpoint.config, float(epoch))
            with (
                MetricsWriter(folder, -1 if is_new else done) as metrics,
                open_trackers(settings, folder, is_new, observer) as trackers,
            ):
                outputs = (window, metrics, trackers, checkpoints, about, observer)
                steps = Steps(settings, data, evaluate, answer, evaluations, *outputs, interrupt)
                assert compiled.step is not None  # it fits
                state = steps.go_on(compiled.step, state, frozen, is_new)
            done = int(state.step)

        # ---- the end ----
        exported = None
        checkpoint = dataclasses.replace(checkpoint, params={})  # room for what is read and written
        if _is_over(done, evaluations, settings):
            exported = export_folder(settings)
            for text in _how_it_ended(done, evaluations, settings, was_over=is_over):
                observer.note(text)
            export(settings, checkpoint, checkpoints, like[0], state, done, observer)
            if settings.quantize:
                observer.note(
                    f"{exported}: belongs to {settings.quantize} weights: use it with --quantize {settings.quantize}"
                )
            observer.table(evaluations.table())
        draw(settings)
    return Outcome(done, exported)


def _load(settings: Settings, observer: Observer) -> phi3_jax.Checkpoint:
    on_progress = functools.partial(observer.progress, "loading")
    quantize = settings.quantize or None
    # `start` casts what is not quantised.
    dtype = "auto" if holds_integers(settings.checkpoint) else settings.dtype
    merged = settings.init_adapter or None if settings.train == "all" else None
    checkpoint = phi3_jax.load(
        settings.checkpoint,
        dtype,
        quantize=quantize,
        layout="rows",
        adapter=merged,
        merge_adapter=True,  # also of one that lies in the model's own folder
        on_progress=on_progress,
    )
    if has_packed(checkpoint.params):
        raise ValueError(
            f"{settings.checkpoint}: packed weights are in the order of the CPU kernels, which training cannot use: "
            "write the folder with phi3-quantize --layout rows"
        )
    require_tokenizer(checkpoint)
    return checkpoint


def _restore(checkpoints: Checkpoints, like: Any, observer: Observer) -> Restored:
    restored = checkpoints.restore(like)
    for text in restored.skipped:
        observer.note(text)
    return restored


def _is_over(done: int, evaluations: Evaluations, settings: Settings) -> bool:
    """Whether no steps are left, or the run has ended early."""
    return done >= settings.steps or evaluations.is_exhausted(settings.patience)


def _how_it_ended(done: int, evaluations: Evaluations, settings: Settings, was_over: bool) -> list[str]:
    """What to tell of it, if it was not by the last step just now."""
    if done < settings.steps and (best := evaluations.best) is not None:
        return [
            f"ended early, after step {done} of {settings.steps}: patience={settings.patience}, and the lowest held-out"
            f" loss is still {best['eval_loss']:.4f} of step {best['step']}; a larger patience, or 0, goes on"
        ]
    return [f"finished before: all {done} steps are done; more steps, or epochs, go on from there"] if was_over else []

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
from fractions import Fraction
from pathlib import Path
from typing import Any

import phi3_jax
from phi3_jax.checkpoint import holds_integers, kind_of_weights, require_tokenizer
from phi3_jax.kernels import has_packed

from ..adapters import fingerprints, notes, reference_adapter, with_init_adapter
from ..checks import check_before_loading, check_together
from ..data import Mixture, epoch_size
from ..forward import how_attention_is_computed
from ..settings import Settings, resolved, with_few_rows
from ..step import TrainState, start
from .checkpoints import Checkpoints, Restored
from .evaluations import Evaluations, evaluations_before, make_evaluation
from .exports import disown_exports_after, export_best, export_folder, export_last, is_exported, settle_exports
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
from .samples import Prompt, Sampler, encode_prompts, read_prompts
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
    observer = observer or Observer()
    check_before_loading(settings)
    require_drawing()
    require_trackers(settings)
    prompts = read_prompts(settings)
    folder = Path(settings.output)
    with (
        locked_folder(folder),
        Checkpoints(folder / "checkpoints", settings.keep_last, settings.keep_best) as checkpoints,
    ):
        settle_exports(settings)
        run = _prepare(settings, checkpoints, observer)
        was_over, state = run.is_over, None
        if not was_over:
            state = _take_steps(run, prompts, checkpoints, observer, interrupt)
        run.checkpoint = dataclasses.replace(run.checkpoint, params={})  # room for what is read and written
        exported = None
        if run.is_over:
            exported = export_folder(run.settings)
            for text in _how_it_ended(run, was_over):
                observer.note(text)
            export_last(run.settings, run.checkpoint, checkpoints, run.like, state, run.done, run.weights)
            del state  # there may not be room for two
            export_best(
                run.settings, run.checkpoint, checkpoints, run.like, run.done, run.lowest, observer, run.weights
            )
            if run.weights:
                policy, name = run.settings.quantize, run.settings.checkpoint
                flag = f"--quantize {policy}" if policy else f"--checkpoint {name}"
                observer.note(f"{exported}: belongs to {policy or run.weights} weights: use it with {flag}")
            observer.table(run.evaluations.table())
        draw(run.settings)
    return Outcome(run.done, exported)


@dataclasses.dataclass
class _Run:
    """What a run is made from, and how far it is.

    Attributes:
      asked: the settings as they were asked for, some of them "auto".
      given: with a number of steps, and what the run in the folder chose.
      may_halve: whether a run with too little memory may take fewer rows at a time.
      settings: with what its adapter is; later, with all that the run chose.
      weights: the `kind_of_weights` below an adapter; "" are floats.
      adapters: what `start` is given as (adapter, reference).
      held_out: None if nothing is.
      epoch: how many rows a pass over the data has.
      about: what is saved with each checkpoint.
      recorded: the same of the newest checkpoint in the folder; None if the run begins.
      like: a state as shapes.
      done: the steps taken.
    """

    asked: Settings
    given: Settings
    may_halve: bool
    settings: Settings
    checkpoint: phi3_jax.Checkpoint
    weights: str
    adapters: tuple[Any, Any]
    data: Mixture
    held_out: Mixture | None
    epoch: Fraction
    about: dict[str, Any]
    recorded: dict[str, Any] | None
    evaluations: Evaluations
    like: Any
    done: int

    @property
    def is_over(self) -> bool:
        """Whether no steps are left, or the run has ended early."""
        return self.done >= self.settings.steps or self.evaluations.is_exhausted(self.settings.patience)

    @property
    def lowest(self) -> int | None:
        """The step of the lowest held-out loss."""
        best = self.evaluations.best
        return None if best is None else best["step"]


def _prepare(settings: Settings, checkpoints: Checkpoints, observer: Observer) -> _Run:
    """The model, the data, and what was done before, all of which have to belong together."""
    recorded, done = checkpoints.about(), max(checkpoints.steps, default=0)
    asked, settings = settings, recorded_choices(settings, recorded)
    check_settings(recorded, settings, done)
    prints = fingerprints(settings)
    settings = choose_dtypes(settings, observer)
    checkpoint = _load(settings, observer)
    data, held_out = prepare_data(checkpoint, settings, observer)
    about = describe(checkpoint, data.fingerprint, prints)
    epoch = epoch_size(data.counts, settings)
    may_halve, settings = is_auto(settings), with_few_rows(settings, epoch)
    given = dataclasses.replace(settings, steps=settings.all_steps(epoch), epochs=0)
    check_together(given)  # once more: the data say how many steps are in `epochs`
    settings, adapter = with_init_adapter(given, checkpoint)
    adapters = adapter, reference_adapter(settings, checkpoint)
    for text in (*notes(settings, checkpoint.config), *check_contents(recorded, about, settings)):
        observer.note(text)
    check_steps(done, asked, settings.steps)
    evaluations = evaluations_before(recorded, held_out, checkpoints, settings, observer)
    like, _ = start_like(resolved(settings), checkpoint.config, checkpoint.params, *adapters)
    before = about, recorded, evaluations, like, done
    weights = kind_of_weights(checkpoint.params)
    run = _Run(asked, given, may_halve, settings, checkpoint, weights, adapters, data, held_out, epoch, *before)
    if run.is_over and not is_exported(settings, done, checkpoints.best, run.lowest):
        run.done = _restore(checkpoints, like, observer).step  # a broken checkpoint's steps are taken again
        evaluations.forget_after(run.done)
    return run


def _take_steps(
    run: _Run, prompts: list[Prompt], checkpoints: Checkpoints, observer: Observer, interrupt: Callable[[], bool]
) -> TrainState:
    """Begins the run, or goes on with it, up to its end or an interruption."""
    # ---- does it fit? ----
    model, held_out = run.checkpoint, run.held_out
    asked_of = run.data if held_out is None else held_out
    sampler = Sampler(run.settings, model, encode_prompts(prompts, model, run.settings), asked_of, observer)
    compiled = choose(run.settings, model.config, model.params, observer, run.adapters, run.may_halve)
    run.settings = settings = compiled.settings
    if chosen := told(run.asked, settings):
        observer.note(f"auto: {chosen}")
    observer.note(str(compiled.memory))
    if attention := how_attention_is_computed(settings, model.config):
        observer.note(attention)
    require_fit(compiled, model.config, model.params, observer, run.adapters)
    assert compiled.step is not None  # it fits
    checkpoints.require_room(run.like)

    # ---- begin, or go on ----
    state, frozen = start(settings, model.config, model.params, *run.adapters)
    run.adapters = None, None
    run.checkpoint = model = dataclasses.replace(model, params={})  # there may not be room for them twice
    if run.recorded is not None:
        del state
        restored = _restore(checkpoints, run.like, observer)
        state, run.done = restored.state, restored.step
        run.evaluations.forget_after(run.done)
        observer.note(f"going on after step {run.done}, from the checkpoint of this run")
    write_settings({**run.about, "held_out": run.evaluations.held_out}, settings)
    about = run.about | recorded_settings(run.given, settings)
    disown_exports_after(run.done, settings)

    # ---- the steps ----
    evaluate = None if held_out is None else make_evaluation(settings, model, frozen, held_out, observer)
    answer, is_new, folder = functools.partial(sampler.answer, frozen), run.recorded is None, Path(settings.output)
    window = Window(settings, model.config, float(run.epoch))
    with (
        MetricsWriter(folder, -1 if is_new else run.done) as metrics,
        open_trackers(settings, folder, is_new, observer) as trackers,
    ):
        outputs = (window, metrics, trackers, checkpoints, about, observer)
        steps = Steps(settings, run.data, evaluate, answer, run.evaluations, *outputs, interrupt)
        state = steps.go_on(compiled.step, state, frozen, is_new)
    run.done = int(state.step)
    return state


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
    for text in restored.notes:
        observer.note(text)
    return restored


def _how_it_ended(run: _Run, was_over: bool) -> list[str]:
    """What to tell of it, if it was not by the last step just now."""
    done, steps, best = run.done, run.settings.steps, run.evaluations.best
    if done < steps:
        lowest = (
            "no held-out loss is a number"
            if best is None
            else f"the lowest held-out loss is still {best['eval_loss']:.4f} of step {best['step']}"
        )
        return [
            f"ended early, after step {done} of {steps}: patience={run.settings.patience}, and {lowest}; a larger "
            "patience, or 0, goes on"
        ]
    return [f"finished before: all {done} steps are done; more steps, or epochs, go on from there"] if was_over else []

"""A training run from its settings to files, top to bottom: `train`.

A run's folder (`Settings.output`) holds settings.json, data/ (tokenised), checkpoints/, metrics.jsonl, tensorboard/,
loss.png, and at the end adapter/ or model/; if a checkpoint of an earlier step was better on held-out data, that is
adapter-best/ or model-best/. The same settings in the same folder resume a run that was stopped or killed; its weights
and metrics are bit for bit those of a run that was not. With more steps a finished run goes on, too: the state of its
last step, with the learning rates that the schedule of the new number of steps has from there on.

Axis letters: A batches of a step, B rows, T tokens.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import phi3_jax
from phi3_jax.checkpoint import holds_integers, require_tokenizer, save_adapter
from phi3_jax.kernels import has_packed

from ..adapters import fingerprints, reference_adapter, with_init_adapter
from ..checks import check_before_loading
from ..data import Mixture, batches, epoch_size
from ..settings import Settings, adapter_config, resolved
from ..step import TrainState, start
from .ahead import start_like
from .auto import choose, choose_dtypes, recorded_choices, require_fit, told
from .checkpoints import Checkpoints, Restored
from .curve import save_curve
from .evaluations import Evaluations, evaluations_before, make_evaluation
from .metrics import MetricsWriter, Record, read
from .observer import Observer, Outcome
from .run_data import prepare_data
from .run_folder import (
    best_folder,
    check_contents,
    check_settings,
    check_steps,
    describe,
    disown_exports_after,
    export_folder,
    exported_step,
    is_exported,
    locked_folder,
    remove_export,
    replace_export,
    settle_exports,
    write_settings,
)
from .window import Window


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
        settings = dataclasses.replace(settings, steps=settings.all_steps(epoch_size(data.counts, settings)), epochs=0)
        check_steps(done, settings)  # once more: the data say how many are in `epochs`
        settings, adapter = with_init_adapter(settings, checkpoint)
        reference = reference_adapter(settings, checkpoint)

        # ---- what was done before ----
        for text in check_contents(recorded, about, settings):
            observer.note(text)
        evaluations = evaluations_before(recorded, held_out, checkpoints, settings, observer)
        config, params = checkpoint.config, checkpoint.params
        like = start_like(resolved(settings), config, params, adapter, reference)
        is_over = recorded is not None and _is_over(done, evaluations, settings)
        if is_over and not is_exported(settings, done, checkpoints.best):
            done = _restore(checkpoints, like[0], observer).step  # a broken checkpoint's steps are taken again
            evaluations.forget_after(done)
            is_over = _is_over(done, evaluations, settings)

        # ---- the steps that are left ----
        state = None
        if not is_over:
            compiled = choose(settings, config, params, observer, (adapter, reference))
            settings = compiled.settings
            if chosen := told(asked, settings):
                observer.note(f"auto: {chosen}")
            observer.note(str(compiled.memory))
            require_fit(compiled, config, params, observer, (adapter, reference))
            checkpoints.require_room(like[0])

            state, frozen = start(settings, config, params, adapter, reference)
            del adapter, reference, params
            checkpoint = dataclasses.replace(checkpoint, params={})  # there may not be room for them twice
            if recorded is not None:
                del state
                restored = _restore(checkpoints, like[0], observer)
                state, done = restored.state, restored.step
                evaluations.forget_after(done)
                observer.note(f"going on after step {done}, from the checkpoint of this run")
            about = write_settings({**about, "held_out": evaluations.held_out}, settings)
            disown_exports_after(done, settings)
            evaluate = None
            if held_out is not None:
                evaluate = make_evaluation(settings, checkpoint, frozen, held_out, observer)
            window = Window(settings, checkpoint.config)
            with MetricsWriter(folder, -1 if recorded is None else done) as metrics:
                run = _Run(
                    settings, data, evaluate, evaluations, window, metrics, checkpoints, about, observer, interrupt
                )
                assert compiled.step is not None  # it fits
                state = run.go_on(compiled.step, state, frozen, recorded is None)
            done = int(state.step)

        # ---- the end ----
        exported = None
        checkpoint = dataclasses.replace(checkpoint, params={})  # room for what is read and written
        if _is_over(done, evaluations, settings):
            exported = export_folder(settings)
            for text in _how_it_ended(done, evaluations, settings, was_over=is_over):
                observer.note(text)
            _export(settings, checkpoint, checkpoints, like[0], state, done, observer)
            if settings.quantize:
                observer.note(
                    f"{exported}: belongs to {settings.quantize} weights: use it with --quantize {settings.quantize}"
                )
            observer.table(evaluations.table())
        save_curve(read(folder / "metrics.jsonl"), folder / "loss.png", str(folder))
    return Outcome(done, exported)


@dataclasses.dataclass
class _Run:
    """The steps of a run: what they are computed from, and what their results are written to."""

    settings: Settings
    data: Mixture
    evaluate: Callable[[TrainState], Record] | None
    evaluations: Evaluations
    window: Window
    metrics: MetricsWriter
    checkpoints: Checkpoints
    about: dict[str, Any]
    observer: Observer
    interrupt: Callable[[], bool]

    def go_on(self, step: Callable[..., Any], state: TrainState, frozen: Any, is_new: bool) -> TrainState:
        """Takes all the steps that are left, or those until the run is interrupted."""
        s, done, bad_in_row = self.settings, int(state.step), int(state.bad_in_row)
        self.observer.begin(done, s.steps)
        if is_new and self.evaluate is not None:
            self._write([self._evaluated({"step": 0}, state)])
        stream = batches(self.data, s, done)
        batch = next(stream)
        self.window.restart()
        is_last = False
        while not is_last:
            state, metrics = step(state, frozen, batch)
            done += 1
            self.window.add(done, metrics, batch)
            batch = next(stream)  # while the devices compute
            is_last = self.interrupt() or done == s.steps
            evaluates = self.evaluate is not None and (done % s.eval_every == 0 or done == s.steps)
            if is_last or evaluates or done % s.save_every == 0 or done % s.log_every == 0:
                records = self.window.records()
                bad_in_row = self._count_bad(records, bad_in_row)
                if evaluates:
                    records[-1] = self._evaluated(records[-1], state)
                    is_last = is_last or self.evaluations.is_exhausted(s.patience)
                eval_loss = records[-1].get("eval_loss")
                self._write(records)
                is_good = eval_loss is not None and self.checkpoints.is_among_best(eval_loss)
                if is_last or is_good or done % s.save_every == 0:
                    about = {**self.about, "evaluations": self.evaluations.records}
                    self.checkpoints.save(done, state, about, eval_loss)
                self.window.restart()
        return state

    def _evaluated(self, record: Record, state: TrainState) -> Record:
        """A line of metrics with the evaluation of the state."""
        assert self.evaluate is not None
        record = {**record, **self.evaluate(state)}
        self.evaluations.add(record)
        return record

    def _write(self, records: list[Record]) -> None:
        for record in records:
            self.metrics.write(record)
            self.observer.record(record)

    def _count_bad(self, records: list[Record], in_row: int) -> int:
        """How many of the latest steps, in a row, were skipped. Raises ValueError if these are too many."""
        for number, record in enumerate(records):
            in_row = 0 if record["finite"] else in_row + 1
            if in_row >= self.settings.max_bad_steps:
                self._write(records[: number + 1])
                kept = ", ".join(map(str, self.checkpoints.steps)) or "none yet"
                raise ValueError(
                    f"step {record['step']}: for {in_row} steps in a row (max_bad_steps) the loss or the gradient was "
                    "not finite; a new run with a lower lr or a longer warmup_steps may do better. Checkpoints in "
                    f"{self.settings.output}: {kept}"
                )
        return in_row


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


def _export(
    settings: Settings,
    checkpoint: phi3_jax.Checkpoint,
    checkpoints: Checkpoints,
    like: Any,
    state: TrainState | None,
    done: int,
    observer: Observer,
) -> None:
    """Writes the last step's adapter or model, and the best one's, where they are not there already.

    Args:
      state: of the last step; None if no step was taken now.
    """
    write = functools.partial(_write_export, settings, checkpoint)
    last, best, step = export_folder(settings), best_folder(settings), checkpoints.best
    if state is not None or exported_step(last) != done:
        state = checkpoints.read(done, like) if state is None else state
        replace_export(last, done, functools.partial(write, state))
    if step is None or step == exported_step(best):
        return
    if step == done:
        remove_export(best)  # of an earlier step, which is not the best any more
        return
    del state  # there may not be room for two
    try:
        state = checkpoints.read(step, like)
    except ValueError as error:
        observer.note(f"{best}: not written, because {error}")
        return
    replace_export(best, step, functools.partial(write, state))
    observer.note(f"{best}: of step {step}, whose held-out loss is the lowest of those kept")


def _write_export(settings: Settings, checkpoint: phi3_jax.Checkpoint, state: TrainState, folder: Path) -> None:
    """Writes the adapter in PEFT's format, or the model in Hugging Face's."""
    if settings.train == "lora":
        save_adapter(folder, state.trainable, adapter_config(settings), checkpoint.config, settings.checkpoint)
    else:
        phi3_jax.save(dataclasses.replace(checkpoint, params=state.trainable), folder)

"""A training run from its settings to files, top to bottom: `train`.

A run's folder (`Settings.output`) holds data/ (tokenised), checkpoints/, metrics.jsonl, tensorboard/, loss.png, and at
the end adapter/ or model/; if a checkpoint of an earlier step was better on held-out data, that is adapter-best/ or
model-best/. The same settings in the same folder resume a run that was stopped or killed; its weights and metrics are
bit for bit those of a run that was not.

Axis letters: A batches of a step, B rows, T tokens.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

import phi3_jax
from phi3_jax.checkpoint import holds_integers, require_tokenizer, save_adapter
from phi3_jax.kernels import has_packed

from ..data import Dataset, batches, eval_batches, find_files, prepare, tell
from ..forward import adapter_config
from ..settings import Resolved, Settings
from ..step import TrainState, make_eval_step, start
from .checkpoints import Checkpoints
from .curve import save_curve
from .memory.auto import choose, choose_dtypes, recorded_choices, require_fit, told
from .metrics import MetricsWriter, Record, read
from .observer import Observer, Outcome
from .run_folder import best_folder, check_data, check_settings, describe, export_folder, locked_folder
from .window import Window, with_perplexity


def train(
    settings: Settings, observer: Observer | None = None, interrupt: Callable[[], bool] = lambda: False
) -> Outcome:
    """Begins or resumes a training run -> how it ended.

    Args:
      observer: its methods are called while the run goes on.
      interrupt: called after each step; True saves and ends the run.

    Raises:
      FileNotFoundError: a file or the checkpoint is not there.
      ValueError: settings that cannot be used, or that differ from those of the run in the folder; data that cannot be
        used; too little memory; too many steps in a row that were not finite.
      OSError: the folder cannot be written, has too little room, or is another process's.
    """
    observer, folder = observer or Observer(), Path(settings.output)
    if not settings.train_file:
        raise ValueError("train_file: not given; name a file of JSON lines")
    with (
        locked_folder(folder),
        Checkpoints(folder / "checkpoints", settings.keep_last, settings.keep_best) as checkpoints,
    ):
        recorded = checkpoints.about()
        asked, settings = settings, recorded_choices(settings, recorded)
        check_settings(recorded, settings)
        for name in filter(None, (settings.train_file, settings.eval_file)):
            find_files(name)  # what is not there is missed, or fetched, before the model is loaded

        # ---- the model and the data ----
        settings = choose_dtypes(settings)
        checkpoint = _load(settings, observer)
        data = _prepare(settings.train_file, checkpoint, settings, observer)
        held_out = _prepare(settings.eval_file, checkpoint, settings, observer) if settings.eval_file else None
        check_data(recorded, settings, data.fingerprint)

        # ---- does it fit? ----
        compiled = choose(settings, checkpoint.config, checkpoint.params, observer)
        settings, like = compiled.settings, compiled.like
        if chosen := told(asked, settings):
            observer.note(f"auto: {chosen}")
        observer.note(str(compiled.memory))
        require_fit(compiled, checkpoint.config, checkpoint.params, observer)
        checkpoints.require_room(like[0])

        # ---- begin, or go on ----
        state, frozen = start(settings, checkpoint.config, checkpoint.params)
        checkpoint = dataclasses.replace(checkpoint, params={})  # there may not be room for them twice
        is_new = recorded is None
        if not is_new:
            del state
            state = _restore(checkpoints, like[0], observer)

        # ---- the steps ----
        evaluate = None if held_out is None else _evaluation(settings, checkpoint, frozen, held_out, observer)
        about, window = describe(settings, data.fingerprint), Window(settings, checkpoint.config)
        with MetricsWriter(folder, -1 if is_new else int(state.step)) as metrics:
            run = _Run(settings, data, evaluate, window, metrics, checkpoints, about, observer, interrupt)
            assert compiled.step is not None  # it fits
            state = run.go_on(compiled.step, state, frozen, is_new)

        # ---- the end ----
        done, exported = int(state.step), None
        if done == settings.steps:
            exported = export_folder(settings)
            _export(settings, checkpoint, state, exported)
            if (best := checkpoints.best) is not None and best != done:
                del state  # there may not be room for two
                state = checkpoints.read(best, like[0])
                _export(settings, checkpoint, state, best_folder(settings))
                observer.note(
                    f"{best_folder(settings)}: of step {best}, whose held-out loss is the lowest of those kept"
                )
        save_curve(read(folder / "metrics.jsonl"), folder / "loss.png", str(folder))
    return Outcome(done, exported)


@dataclasses.dataclass
class _Run:
    """The steps of a run: what they are computed from, and what their results are written to."""

    settings: Settings
    data: Dataset
    evaluate: Callable[[TrainState], Record] | None
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
            self._write([{"step": 0, **self.evaluate(state)}])
        stream = batches(self.data, s, done)
        batch = next(stream)
        self.window.restart()
        is_last = done == s.steps
        while not is_last:
            state, metrics = step(state, frozen, batch)
            done += 1
            self.window.add(done, metrics, batch)
            batch = next(stream)  # while the devices compute
            is_last = self.interrupt() or done == s.steps
            saves = is_last or done % s.save_every == 0
            evaluates = done % s.eval_every == 0 or done == s.steps
            if saves or evaluates or done % s.log_every == 0:
                records = self.window.records()
                bad_in_row = self._count_bad(records, bad_in_row)
                if evaluates and self.evaluate is not None:
                    records[-1] |= self.evaluate(state)
                eval_loss = records[-1].get("eval_loss")
                self._write(records)
                if saves or (eval_loss is not None and self.checkpoints.is_among_best(eval_loss)):
                    self.checkpoints.save(done, state, self.about, eval_loss)
                self.window.restart()
        return state

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
    checkpoint = phi3_jax.load(settings.checkpoint, dtype, quantize=quantize, layout="rows", on_progress=on_progress)
    if has_packed(checkpoint.params):
        raise ValueError(
            f"{settings.checkpoint}: packed weights are in the order of the CPU kernels, which training cannot use: "
            "write the folder with phi3-quantize --layout rows"
        )
    require_tokenizer(checkpoint)
    return checkpoint


def _prepare(path: str, checkpoint: phi3_jax.Checkpoint, settings: Settings, observer: Observer) -> Dataset:
    assert checkpoint.tokenizer is not None  # `_load` checks
    on_progress = functools.partial(observer.progress, "preparing")
    data = prepare(path, checkpoint.tokenizer, settings, Path(settings.output) / "data", on_progress)
    rows = checkpoint.config.vocab_size
    if checkpoint.tokenizer.vocab_size > rows and data.highest_id() >= rows:  # an added token without a row
        raise ValueError(
            f"{path}: it has the token id {data.highest_id()} ({checkpoint.tokenizer.piece(data.highest_id())!r}), but "
            f"the model's embedding has {rows} rows: enlarge the embedding, or take the token out of the tokenizer"
        )
    report = data.report
    text = f"{path}: {report.texts} texts, {report.tokens} tokens, {report.learned_tokens} of them learned, "
    text += f"{len(data)} rows that are {report.efficiency:.0%} full"
    observer.note(text + tell(report))
    return data


def _restore(checkpoints: Checkpoints, like: Any, observer: Observer) -> TrainState:
    restored = checkpoints.restore(like)
    for text in restored.skipped:
        observer.note(text)
    observer.note(f"going on after step {restored.step}, from the checkpoint of this run")
    return restored.state


def _evaluation(
    settings: Resolved, checkpoint: phi3_jax.Checkpoint, frozen: Any, held_out: Dataset, observer: Observer
) -> Callable[[TrainState], Record]:
    """A function that computes the means over all held-out data, under names that begin with eval_."""
    step = make_eval_step(settings, checkpoint.config)
    total = -(-len(held_out) // settings.batch_size)

    def evaluate(state: TrainState) -> Record:
        sums: dict[str, float] = {}
        for number, batch in enumerate(eval_batches(held_out, settings)):
            observer.progress("evaluating", number, total)
            for name, value in jax.device_get(step(state.trainable, frozen, batch)).items():
                sums[name] = sums.get(name, 0.0) + float(value)
        observer.progress("evaluating", total, total)
        means = {"loss": sums["loss"] / sums["weight"], "accuracy": sums["correct"] / sums["weight"]}
        return {f"eval_{name}": value for name, value in with_perplexity(means, settings).items()}

    return evaluate


def _export(settings: Settings, checkpoint: phi3_jax.Checkpoint, state: TrainState, folder: Path) -> None:
    """Writes the adapter in PEFT's format, or the model in Hugging Face's, if that is not done already."""
    if folder.exists():
        return
    if settings.train == "lora":
        save_adapter(folder, state.trainable, adapter_config(settings), checkpoint.config, settings.checkpoint)
    else:
        phi3_jax.save(dataclasses.replace(checkpoint, params=state.trainable), folder)

"""A run's checkpoints, by Orbax: written in the background and atomically; the last and the best are kept.

A checkpoint `checkpoints/STEP/` holds the training state and what `Checkpoints.save` is told about the run. Batches and
random numbers depend on (seed, step) alone, so that the state's step is enough to continue in the data's order.

Orbax writes into a folder of another name and renames it. But it removes checkpoints file by file, and a kill in
between would leave half of one: so they are renamed first, and then removed here. It has no checksums of what it
compresses, and would take most flipped bits for numbers: so digests of the files are written just before that renaming
(digests.py), and compared before anything is read.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import jax

try:
    import orbax.checkpoint as ocp
    from orbax.checkpoint.checkpoint_managers import PolicyCheckpointInfo, PreservationContext
except ImportError as error:
    raise ImportError(f"training needs more packages ({error}): pip install 'phi3_jax[train]'") from None

from phi3_jax.regular_file import require_regular

from .digests import check_digests, has_digests, write_digests

_OVERHEAD = 1 << 20  # bytes of a checkpoint besides its arrays
_REMOVED = "removed"  # a folder beside the checkpoints, for those that will be deleted


@dataclasses.dataclass(frozen=True)
class Restored:
    """A checkpoint that was read.

    Attributes:
      step: its name.
      state: arrays, as they were saved.
      notes: of each newer one, why it could not be read, and which one was taken instead; and that this one could not
        be checked.
    """

    step: int
    state: Any
    notes: tuple[str, ...]


class Checkpoints:
    """The checkpoints in a folder, which is made if it is not there. To be closed, or used in a `with`."""

    def __init__(self, folder: Path, keep_last: int, keep_best: int):
        """Opens a folder, and removes what interrupted saves and removals have left there.

        Args:
          keep_last: how many of the newest stay.
          keep_best: how many of those with the lowest evaluation loss stay, too.

        Raises:
          OSError: the folder cannot be written.
        """
        self._folder, self._keep_last, self._keep_best = folder.absolute(), keep_last, keep_best
        self._losses: dict[int, float] = {}  # those that compete for the best
        self._held_out_of: dict[int, str | None] = {}
        self._held_out: str | None = None
        self._saving: int | None = None
        options = ocp.CheckpointManagerOptions(
            preservation_policy=_LastAndBest(keep_last, keep_best, self._losses),
            cleanup_tmp_directories=True,
            todelete_subdir=_REMOVED,
            lightweight_initialize=True,
            async_options=ocp.options.AsyncOptions(post_finalization_callback=self._before_renaming),
        )
        with self._explained():
            self._manager = ocp.CheckpointManager(self._folder, options=options)
            self._remove()
            for step in self.steps:
                _drop_damaged_times(self._folder, step)
        for step in self.steps:
            if (found := self._about(step)) is not None:
                self._add_loss(step, found["eval_loss"], found["held_out"])

    @property
    def steps(self) -> Sequence[int]:
        """The steps of all, rising."""
        return sorted(self._manager.all_steps())

    @property
    def best(self) -> int | None:
        """The step of lowest evaluation loss of those that are kept; None if none was evaluated, or is kept for it."""
        known = [step for step in self.steps if step in self._losses] if self._keep_best else []
        return min(known, key=lambda step: (self._losses[step], step), default=None)

    def about(self) -> dict[str, Any] | None:
        """What the newest checkpoint that can be read was told about its run; None if there is no checkpoint.

        Raises:
          ValueError: there are checkpoints, but none of them can be read.
        """
        for step in reversed(self.steps):
            if (found := self._about(step)) is not None:
                return found["run"]
        if self.steps:
            raise self._unreadable("what they say about their run is missing or damaged")
        return None

    def compare_on(self, held_out: str) -> list[int]:
        """From now on only losses on this held-out data compete for the best.

        Args:
          held_out: its fingerprint, which is saved with each loss.

        Returns:
          The checkpoints whose losses, on other data, do so no more; they stay as long as they are among the last.
        """
        self._held_out = held_out
        others = [step for step in sorted(self._losses) if self._held_out_of[step] != held_out]
        for step in others:
            del self._losses[step]
        return others

    def require_room(self, like: Any) -> None:
        """Raises OSError if the disk has no room for all checkpoints that are kept, and one that is being written.

        Args:
          like: a tree of arrays, or of what has their shapes.
        """
        size = _size(like)
        count = max(1, self._keep_last + self._keep_best + 1 - len(self.steps))
        free = shutil.disk_usage(self._folder).free
        if count * size > free:
            raise OSError(
                f"{self._folder}: takes up to {count} more checkpoints of {size / 1e9:.3f} GB, and {free / 1e9:.3f} GB "
                "are free; make room, or lower keep_last and keep_best"
            )

    def restore(self, like: Any) -> Restored:
        """The newest checkpoint that can be read. Newer ones are set aside under another name.

        Args:
          like: a tree of `jax.ShapeDtypeStruct` with shardings: what the state looks like.

        Raises:
          ValueError: none can be read.
        """
        skipped: dict[int, str] = {}
        for step in reversed(self.steps):
            try:
                state = self.read(step, like)
            except ValueError as error:
                skipped[step] = str(error)
                continue
            for broken in skipped:
                aside = self._folder / _aside(broken)
                shutil.rmtree(aside, ignore_errors=True)
                (self._folder / str(broken)).rename(aside)
                self._losses.pop(broken, None)
            self._manager.reload()
            told = [f"{why}; {step} is taken instead, and that is now {_aside(n)}" for n, why in skipped.items()]
            if not has_digests(self._folder / str(step)):
                told.append(f"checkpoint {step} is of an earlier version, without checksums: it is taken as it is")
            return Restored(step, state, tuple(told))
        raise self._unreadable(next(iter(skipped.values())))

    def read(self, step: int, like: Any) -> Any:
        """The state of one checkpoint; for `like` see `restore`. Raises ValueError if it cannot be read."""
        self._manager.wait_until_finished()
        leaves, structure = jax.tree.flatten(like)
        names = _names(like)
        wanted = ocp.args.StandardRestore(dict(zip(names, leaves, strict=True)))
        try:
            check_digests(self._folder / str(step))
            found = self._manager.restore(step, args=ocp.args.Composite(state=wanted))["state"]
        except Exception as error:  # Orbax has no error class for this
            raise ValueError(f"checkpoint {step} cannot be read: {_first_words(error)}") from error
        return jax.tree.unflatten(structure, [found[name] for name in names])

    def is_among_best(self, eval_loss: float) -> bool:
        """Whether a checkpoint of this evaluation loss would be one of the best that are kept."""
        better = sum(loss <= eval_loss for loss in self._losses.values())
        return math.isfinite(eval_loss) and better < self._keep_best

    def save(self, step: int, state: Any, run: Mapping[str, Any], eval_loss: float | None = None) -> None:
        """Begins to write a checkpoint, when the one before is done; the state may be donated meanwhile.

        Args:
          run: what `about` returns; it must be JSON.
          eval_loss: of this state, if it was evaluated.

        Raises:
          OSError: this one or the one before could not be written.
        """
        about = {"run": dict(run), "eval_loss": eval_loss, "held_out": self._held_out}
        leaves = dict(zip(_names(state), jax.tree.leaves(state), strict=True))
        with self._explained():
            self._manager.wait_until_finished()
            self._remove()
            # Orbax would notice, too, but its threads would print messages of their own.
            if (size := _size(state)) > (free := shutil.disk_usage(self._folder).free):
                raise OSError(f"it takes {size / 1e9:.3f} GB, and {free / 1e9:.3f} GB are free")
            self._add_loss(step, eval_loss, self._held_out)
            self._saving = step
            args = ocp.args.Composite(state=ocp.args.StandardSave(leaves), about=ocp.args.JsonSave(about))
            self._manager.save(step, args=args, force=True)

    def close(self) -> None:
        """Waits until all is written. Raises OSError if it could not be."""
        with self._explained():
            self._manager.close()
            self._remove()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
            return
        with contextlib.suppress(OSError):  # the first error is the one to report
            self.close()

    def _before_renaming(self) -> None:
        """Orbax calls this in its own thread, when all is in the folder of the other name."""
        (written,) = self._folder.glob(f"{self._saving}.*tmp*")
        write_digests(written)

    def _about(self, step: int) -> dict[str, Any] | None:
        """What was saved of the run, the evaluation loss and its data; None if that cannot be read."""
        try:
            check_digests(self._folder / str(step), "about")
            found = self._manager.restore(step, args=ocp.args.Composite(about=ocp.args.JsonRestore()))["about"]
            return {"run": found["run"], "eval_loss": found["eval_loss"], "held_out": found.get("held_out")}
        except Exception:  # see `read`
            return None

    def _add_loss(self, step: int, eval_loss: float | None, held_out: str | None) -> None:
        """A loss competes if it is a number; another one that a checkpoint of this step had does not any more."""
        self._losses.pop(step, None)
        if eval_loss is not None and math.isfinite(eval_loss):
            self._losses[step], self._held_out_of[step] = eval_loss, held_out

    def _remove(self) -> None:
        shutil.rmtree(self._folder / _REMOVED, ignore_errors=True)

    def _unreadable(self, why: str) -> ValueError:
        return ValueError(
            f"{self._folder}: none of the checkpoints {', '.join(map(str, self.steps))} can be read ({why}); to begin "
            "anew, name another output or remove the folder"
        )

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Turns errors of writing, for which Orbax raises many kinds of exceptions, into OSError."""
        try:
            yield
        except Exception as error:
            raise OSError(
                f"{self._folder}: a checkpoint could not be written ({_first_words(error)}); when that is mended, the "
                "same command goes on from the last one"
            ) from error


class _LastAndBest:
    """Which checkpoints stay; an orbax.checkpoint.checkpoint_managers.PreservationPolicy."""

    def __init__(self, last: int, best: int, losses: Mapping[int, float]):
        self._last, self._best, self._losses = last, best, losses

    def should_preserve(
        self, checkpoints: Sequence[PolicyCheckpointInfo], *, context: PreservationContext
    ) -> Sequence[bool]:
        steps = [checkpoint.step for checkpoint in checkpoints]
        known = [step for step in steps if step in self._losses]
        best = sorted(known, key=lambda step: (self._losses[step], step))[: self._best]
        return [step in steps[-self._last :] or step in best for step in steps]


def _drop_damaged_times(folder: Path, step: int) -> None:
    """Removes Orbax's file of when a checkpoint was made, if it is damaged; the folder's age then serves."""
    path = folder / str(step) / "_CHECKPOINT_METADATA"
    try:
        if path.exists():
            require_regular(path)
        _ = ocp.path.step.standard_name_format().find_step(folder, step).commit_timestamp
    except Exception:  # Orbax would raise it in the middle of the run, when it decides what to keep
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)


def _aside(step: int) -> str:
    """What a checkpoint is called that cannot be read."""
    return f"unreadable-{step}"


def _names(tree: Any) -> list[str]:
    """The leaves' names in a checkpoint: "trainable/layers/mlp/down_proj/weight"."""
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in jax.tree.leaves_with_path(tree)]


def _size(tree: Any) -> int:
    """The bytes of a checkpoint at most."""
    return _OVERHEAD + sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _first_words(error: Exception) -> str:
    """The beginning of an error's message, because TensorStore's are pages long."""
    return str(error).split(" [tensorstore")[0].splitlines()[0][:300] if str(error).strip() else type(error).__name__

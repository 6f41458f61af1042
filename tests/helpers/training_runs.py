"""A tiny model with a tokenizer of bytes, and data, for the tests of runs."""

import contextlib
import dataclasses
import json
import random
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from templates import PHI4_MINI, small_tokenizer

import phi3_jax
from phi3_jax.train.run import evaluations
from phi3_jax.train.run.memory import ahead
from phi3_jax.train.run.observer import Observer
from phi3_jax.train.run.records.metrics import TIMES
from phi3_jax.train.settings import Settings

CONFIG = phi3_jax.Phi3Config(
    vocab_size=263,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
    rope_theta=1e4,
    long_rope=phi3_jax.LongRope((1.0, 1.1, 1.3, 2.0), (2.0, 3.0, 5.0, 9.0), 16),
    sliding_window=19,
    initializer_range=0.3,
)


def write_model(folder: Path) -> Path:
    """As a Hugging Face folder."""
    params = phi3_jax.random_params(CONFIG)
    generation = phi3_jax.GenerationSettings((257,))
    phi3_jax.save(phi3_jax.Checkpoint(CONFIG, params, small_tokenizer(PHI4_MINI), generation), folder)
    return folder


def write_data(path: Path, lines: int, seed: int) -> Path:
    """Chats about sums."""
    rng = random.Random(seed)
    with path.open("w") as file:
        for _ in range(lines):
            a, b = rng.randrange(50), rng.randrange(50)
            chat = [{"role": "user", "content": f"{a}+{b}"}, {"role": "assistant", "content": f"{a + b}"}]
            file.write(json.dumps({"messages": chat, "source": "sums"}) + "\n")
    return path


def write_run(folder: Path, **changes: Any) -> Settings:
    """Settings of a run in a folder that has all it needs."""
    model, trained, held_out = folder / "model", folder / "train.jsonl", folder / "eval.jsonl"
    if not model.exists():
        write_model(model)
        write_data(trained, 40, 1)
        write_data(held_out, 7, 2)
    lora = {} if changes.get("train") == "all" else {"lora_rank": 3, "lora_dropout": 0.1}
    steps = changes.get("steps", 7)
    settings = Settings(
        checkpoint=str(model),
        output=str(folder / "run"),
        train_file=str(trained),
        eval_file=str(held_out),
        sequence_length=29,
        batch_size=2,
        accumulation=2,
        lr=1e-2,
        warmup_steps=min(2, steps),
        steps=steps,
        eval_every=min(3, steps),
        save_every=min(2, steps),
        samples=0,
    )
    return dataclasses.replace(settings, **{**lora, **changes})


def tensors(folder: Path) -> dict[str, np.ndarray]:
    """The tensors in a folder's safetensors file."""
    from safetensors.numpy import load_file

    (path,) = folder.glob("*.safetensors")
    return load_file(path)


_COMPILED: dict[Settings, Any] = {}
_EVALUATING: dict[Settings, Any] = {}


@contextlib.contextmanager
def shared_programs() -> Iterator[None]:
    """Runs whose settings give the same programs compile them once, without optimizations, in all files."""
    make_train_step, make_eval_step = ahead.make_train_step, evaluations.make_eval_step

    def of_steps(settings: Settings, config: phi3_jax.Phi3Config) -> Any:
        def lower(*args: Any) -> Any:
            key = _what_is_compiled(settings)
            if key not in _COMPILED:
                jitted: Any = make_train_step(settings, config)
                _COMPILED[key] = jitted.lower(*args).compile()
            return types.SimpleNamespace(compile=lambda: _COMPILED[key])

        return types.SimpleNamespace(lower=lower)

    def of_evaluation(settings: Settings, config: phi3_jax.Phi3Config) -> Any:
        return _EVALUATING.setdefault(_what_is_compiled(settings), make_eval_step(settings, config))

    jax.config.update("jax_disable_most_optimizations", True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ahead, "make_train_step", of_steps)
        patch.setattr(evaluations, "make_eval_step", of_evaluation)
        yield
    jax.config.update("jax_disable_most_optimizations", False)


def _what_is_compiled(settings: Settings) -> Settings:
    """Without what does not matter; a constant rate does not depend on the number of steps."""
    names = ("checkpoint", "output", "train_file", "eval_file", "eval_every", "save_every", "log_every", "patience")
    names += ("eval_rows", "keep_last", "keep_best", *(["steps"] if settings.schedule == "constant" else []))
    return dataclasses.replace(settings, **{name: getattr(Settings(), name) for name in names})


class Heard(Observer):
    """Keeps what it is told, and interrupts after a step."""

    def __init__(self, stop_after: int | None = None):
        self.notes: list[str] = []
        self.records: list[dict[str, Any]] = []
        self.lines: list[str] = []
        self.begun: tuple[int, int] | None = None
        self._stop_after = stop_after
        self._asked = 0

    def note(self, text: str) -> None:
        self.notes.append(text)

    def record(self, record: dict[str, Any]) -> None:
        self.records.append(record)

    def table(self, lines: Sequence[str]) -> None:
        self.lines = list(lines)

    def begin(self, step: int, steps: int) -> None:
        self.begun = step, steps

    def interrupt(self) -> bool:
        self._asked += 1
        return self._stop_after is not None and self._asked == self._stop_after


def untimed(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in record.items() if name not in TIMES} for record in records]

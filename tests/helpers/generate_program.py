"""phi3-generate in this process."""

from collections.abc import Callable

import pytest
from absl import flags
from absl.testing import flagsaver

import phi3_jax
from phi3_jax.infer.programs import generate_main


def in_process(
    checkpoint: phi3_jax.Checkpoint, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> Callable[..., str]:
    """A function of the program's flags that runs it with weights that are loaded already -> standard output."""
    monkeypatch.setattr(phi3_jax, "load", lambda *args, **kwargs: checkpoint)

    def run(*args: str, code: int = 0) -> str:
        with flagsaver.flagsaver():
            flags.FLAGS(["phi3-generate", *args])
            assert generate_main.main() == code
        return capfd.readouterr().out

    return run

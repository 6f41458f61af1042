"""Where the commands phi3-generate, phi3-train and so on begin, before the seconds that importing jax takes.

Only what Python has loaded anyway is imported here (tests/test_imports.py). Until a program is imported and its flags
are read there is nothing to save: Ctrl-C has its default action, which ends the process without a word, also inside of
compiled code. Afterwards phi3_jax/command_line/interrupts.py takes over.
"""

import os
import signal
import sys
from importlib import import_module


def make_ready() -> None:
    """Gives Ctrl-C its default action, and what stands for closed standard streams their numbers."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where our parent ignores it
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:  # closed, as by 2>&-: or the next file gets its number, and what is meant for it
            os.open(os.devnull, os.O_RDWR)
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))  # noqa: SIM115


def benchmark() -> None:
    """phi3-benchmark."""
    _run("phi3_jax.infer.programs.benchmark_main")


def chat() -> None:
    """phi3-chat."""
    _run("phi3_jax.infer.programs.chat_main")


def evaluate() -> None:
    """phi3-evaluate."""
    _run("phi3_jax.train.programs.evaluate_main")


def export() -> None:
    """phi3-export."""
    _run("phi3_jax.infer.programs.export_main")


def fetch_data() -> None:
    """phi3-fetch-data."""
    _run("phi3_jax.train.programs.fetch_data_main")


def generate() -> None:
    """phi3-generate."""
    _run("phi3_jax.infer.programs.generate_main")


def inspect() -> None:
    """phi3-inspect."""
    _run("phi3_jax.infer.programs.inspect_main")


def quantize() -> None:
    """phi3-quantize."""
    _run("phi3_jax.infer.programs.quantize_main")


def random_checkpoint() -> None:
    """phi3-random-checkpoint."""
    _run("phi3_jax.infer.programs.random_checkpoint_main")


def serve() -> None:
    """phi3-serve."""
    _run("phi3_jax.infer.programs.serve_main")


def train() -> None:
    """phi3-train."""
    _run("phi3_jax.train.programs.train_main")


def _run(module: str) -> None:
    make_ready()
    import_module(module).run()

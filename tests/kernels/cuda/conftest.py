"""The kernels for NVIDIA cards on this CPU: compiled for the emulator once, and called by XLA as on a card."""

import ctypes
import os
from pathlib import Path

import pytest

from phi3_jax.kernels.cuda import build
from phi3_jax.kernels.native import compiler

FLAGS = ("-x", "c++", "-DPHI3_EMULATED", "-O1", "-Wno-clobbered", "-Wno-unknown-pragmas", f"-I{Path(__file__).parent}")
FLAGS += tuple(os.environ.get("PHI3_EMULATOR_FLAGS", "").split())  # test_emulator.py: a sanitizer's


@pytest.fixture(scope="session")
def emulated_library():
    """What starts kernels, with the emulator in place of the driver; in the user's cache, as it takes some seconds."""
    if (command := compiler.find()) is None:
        pytest.skip("there is no C++ compiler: apt install g++")
    made_from = compiler.source_key(build.SOURCES, Path(__file__).parent), compiler.compiler_key(command), repr(FLAGS)
    key = compiler.digest(each.encode() for each in made_from)
    folder = build.user_cache.private_cache_folder("kernels", f"emulated-{key}", told=print)
    files = sorted(build.SOURCES.glob("*.cu"))
    path = build.native.made(
        folder / "emulated.so", lambda made: build.launcher(command, files, FLAGS, made), "kernels for the emulator"
    )
    loaded = ctypes.CDLL(str(path))
    build.register(loaded, "cpu")
    return loaded


@pytest.fixture
def emulated(emulated_library, monkeypatch):
    """The kernels' Python calls run on this CPU."""
    monkeypatch.setattr(build, "_load_once", lambda: emulated_library)

"""The emulator itself: kernels run as on a card, and mistakes that hang a card are told (emulator_test.cpp)."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from phi3_jax.kernels import cuda

HERE, SOURCES = Path(__file__).parent, Path(cuda.__file__).parent
COMPILER = os.environ.get("CXX") or "g++"
FLAGS = ["-std=c++17", "-Wall", "-Wextra", "-Werror", "-Wno-clobbered", "-Wno-unknown-pragmas", "-DPHI3_EMULATED"]
# Fibers' stacks are no stacks for the sanitizer; what it is for are the buffers.
SANITIZER = ["-g", "-fsanitize=address", "--param", "asan-stack=0"]
pytestmark = pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"there is no {COMPILER}: apt install g++")


def compiled(folder, flags):
    program = folder / "emulator_test"
    command = [COMPILER, *FLAGS, *flags, f"-I{SOURCES}", f"-I{HERE}", HERE / "emulator_test.cpp", "-o", program]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return program


def test_emulator(tmp_path):
    done = subprocess.run([compiled(tmp_path, ["-O1"])], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "ok\n")


@pytest.mark.slow
def test_a_write_behind_a_buffer_is_found(tmp_path):
    program = compiled(tmp_path, ["-O1", *SANITIZER])
    done = subprocess.run([program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "ok\n")
    done = subprocess.run([program, "beyond"], capture_output=True, text=True, timeout=60)
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr


@pytest.mark.slow
def test_no_kernel_reads_or_writes_behind_a_buffer():
    """The tests of attention and of the cache, with kernels that the sanitizer watches, and XLA's buffers with them."""
    found = [
        subprocess.run([COMPILER, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
        for name in ("libasan.so", "libstdc++.so.6")  # the sanitizer looks for the second one's functions as it starts
    ]
    if not all(Path(each).is_absolute() for each in found):
        pytest.skip(f"{COMPILER} has no sanitizer of its own")
    environment = os.environ | {"LD_PRELOAD": " ".join(found), "ASAN_OPTIONS": "detect_leaks=0"}
    environment["PHI3_EMULATOR_FLAGS"] = " ".join(SANITIZER)
    tests = [HERE / "test_cache_write.py", HERE / "test_attention.py"]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests, "-k", "not 128 and not 96"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]

"""What starts kernels, with a driver of the tests' own (launch_test.cpp, fake_driver.cpp)."""

import os
import subprocess
from pathlib import Path

import jax
import pytest

from phi3_jax.kernels.cuda import build
from phi3_jax.kernels.native import compiler

HERE = Path(__file__).parent
pytestmark = pytest.mark.skipif(compiler.find() is None, reason="there is no C++ compiler: apt install g++")


def compiled(target, *arguments):
    done = subprocess.run([*compiler.find(), "-std=c++17", *arguments, "-o", target], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return target


@pytest.mark.slow
def test_what_is_asked_of_the_driver(tmp_path):
    driver = compiled(tmp_path / "libcuda.so.1", "-shared", "-fPIC", HERE / "fake_driver.cpp")
    sources = [f"-I{build.SOURCES}", "-isystem", jax.ffi.include_dir(), build.SOURCES / "launch.cpp"]
    program = compiled(tmp_path / "test", *sources, HERE / "launch_test.cpp", driver, "-ldl", "-pthread")
    environment = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path)}
    done = subprocess.run([program], capture_output=True, text=True, timeout=60, env=environment)
    assert (done.returncode, done.stdout) == (0, "ok\n"), done.stderr

"""The C++ tests of the kernels: every instruction set of this processor against float64, with guard pages.

They run without Python and XLA, so that they can be compiled with sanitizers, and for other processors.
"""

import ctypes
import os
import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import pytest

from phi3_jax.kernels import native
from phi3_jax.kernels.native.compiler import FLAGS, INSTRUCTION_SETS, compile_library

SOURCES, TESTS = Path(native.__file__).parent, Path(__file__).parent / "native"
COMPILER = os.environ.get("CXX") or "g++"
SANITIZERS = ["-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
PROGRAMS = {
    "linear": ["quick"],
    "attention": [],
    "norm": [],
    "lora": [],
}  # a folder of kernels: the arguments of its test
FAMILY = ["portable", "avx2", "avx512", "avx512_bf16"] if platform.machine() == "x86_64" else ["portable", "neon"]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"there is no {COMPILER}: apt install g++"),
]


def run_all(commands):
    def run(command):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(run, commands))


def compile_and_run(kernels, compiler, isa, folder, flags=(), runner=()):
    always = [*FLAGS, *INSTRUCTION_SETS[isa], f"-I{SOURCES}", *flags]
    sources = [*(SOURCES / kernels).glob("*.cpp"), TESTS / f"{kernels}_test.cpp"]
    objects = {str(folder / f"{path.stem}.o"): str(path) for path in sources}
    run_all([compiler, *always, "-c", path, "-o", made] for made, path in objects.items())
    program = folder / "test"
    run_all([[compiler, *flags, *objects, "-o", str(program)]])
    command = [*runner, program, *PROGRAMS[kernels]]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.fixture(scope="module")
def of_this_processor(tmp_path_factory):
    path = tmp_path_factory.mktemp("isa") / "isa.so"
    compile_library([COMPILER], [SOURCES / "isa.cpp"], (), path)
    loaded = ctypes.CDLL(str(path))
    return [name for name in INSTRUCTION_SETS if loaded.phi3_supports_isa(name.encode())]


@pytest.mark.parametrize("flags", [[], SANITIZERS], ids=["optimised", "sanitizers"])
@pytest.mark.parametrize("isa", FAMILY)
@pytest.mark.parametrize("kernels", PROGRAMS)
def test_kernels(kernels, isa, flags, of_this_processor, tmp_path):
    if isa not in of_this_processor:
        pytest.skip(f"this processor has no {isa}")
    compile_and_run(kernels, COMPILER, isa, tmp_path, flags)


def cross_compiler():
    if not shutil.which("aarch64-linux-gnu-g++"):
        pytest.skip("needs a cross compiler: apt install g++-aarch64-linux-gnu")
    return "aarch64-linux-gnu-g++"


@pytest.mark.parametrize("isa", ["portable", "neon"])
@pytest.mark.parametrize("kernels", PROGRAMS)
def test_aarch64_under_an_emulator(kernels, isa, tmp_path):
    compiler = cross_compiler()
    if not shutil.which("qemu-aarch64"):
        pytest.skip("needs an emulator: apt install qemu-user")
    compile_and_run(kernels, compiler, isa, tmp_path, runner=("qemu-aarch64", "-L", "/usr/aarch64-linux-gnu"))


def check_headers(compiler, isa, folder):
    """Compiles a file for each header that holds nothing but its #include."""
    commands = []
    for number, path in enumerate(sorted(SOURCES.rglob("*.h"))):
        owner = next((name for name in INSTRUCTION_SETS if path.stem.endswith(f"_{name}")), "")
        if not isa.startswith(owner):  # avx512_bf16 is avx512 and more
            continue
        alone = folder / f"{number}.cpp"
        alone.write_text(f'#include "{path.relative_to(SOURCES)}"\n')
        flags = [*FLAGS, *INSTRUCTION_SETS[isa], "-Werror", "-fsyntax-only"]
        commands.append([compiler, *flags, f"-I{SOURCES}", "-isystem", jax.ffi.include_dir(), str(alone)])
    run_all(commands)


@pytest.mark.parametrize("isa", FAMILY)
def test_every_header_stands_alone(isa, tmp_path):
    check_headers(COMPILER, isa, tmp_path)


def test_every_header_stands_alone_on_aarch64(tmp_path):
    check_headers(cross_compiler(), "neon", tmp_path)

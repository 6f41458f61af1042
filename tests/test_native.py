"""The C++ tests of the kernels: every instruction set of this processor against float64, with guard pages.

They run without Python and XLA, so that they can be compiled with sanitizers, and for other processors.
"""

import os
import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from phi3_jax.kernels import native
from phi3_jax.kernels.native import build

SOURCES, TESTS = Path(native.__file__).parent, Path(__file__).parent / "native"
SANITIZERS = ["-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++: apt install g++"),
]


def compile_and_run(name, compiler, sources, folder, flags=(), runner=()):
    objects = {path: folder / f"{path.stem}.o" for path in sources}
    commands = [
        [compiler, *build._FLAGS, f"-I{SOURCES}", *own, *flags, "-c", str(path), "-o", str(objects[path])]
        for path, own in sources.items()
    ]
    program = folder / name
    main = [compiler, "-O2", "-std=c++17", *flags, "-pthread", f"-I{SOURCES}", str(TESTS / f"{name}.cpp")]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for done in pool.map(lambda command: subprocess.run(command, capture_output=True, text=True), commands):
            assert done.returncode == 0, done.stderr
    linked = subprocess.run([*main, *map(str, objects.values()), "-o", str(program)], capture_output=True, text=True)
    assert linked.returncode == 0, linked.stderr
    done = subprocess.run([*runner, program, *ARGUMENTS[name]], capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


ARGUMENTS = {"linear_test": ["quick"], "attention_test": []}
FAMILY = ["portable", "avx2", "avx512", "avx512_bf16"] if platform.machine() == "x86_64" else ["portable", "neon"]
PARTS = {"linear_test": ("linear", "pack"), "attention_test": ("attention",)}


def sources_of(name, instruction_sets):
    return {
        path: flags
        for isa in instruction_sets
        for path, flags in build._sources(isa).items()
        if path.stem.startswith(PARTS[name]) and not path.stem.endswith("_ffi")
    }


@pytest.mark.parametrize("flags", [[], SANITIZERS], ids=["optimised", "sanitizers"])
@pytest.mark.parametrize("name", ARGUMENTS)
def test_every_instruction_set_of_this_processor(name, flags, tmp_path):
    out = compile_and_run(name, "g++", sources_of(name, FAMILY), tmp_path, flags)
    assert "portable" in out


@pytest.mark.parametrize("name", ARGUMENTS)
def test_neon_under_an_emulator(name, tmp_path):
    if not shutil.which("aarch64-linux-gnu-g++") or not shutil.which("qemu-aarch64"):
        pytest.skip("needs a cross compiler and an emulator: apt install g++-aarch64-linux-gnu qemu-user")
    sources = sources_of(name, ["portable", "neon"])
    out = compile_and_run(
        name, "aarch64-linux-gnu-g++", sources, tmp_path, runner=("qemu-aarch64", "-L", "/usr/aarch64-linux-gnu")
    )
    assert "neon" in out

"""Our kernels for NVIDIA cards, compiled by NVRTC for generations from Ampere on: `make test-accelerators`.

Nothing runs. What the assembler says of each kernel is printed with `pytest -s`: registers, and bytes that did not fit
into them, of which there must be none.
"""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from phi3_jax.kernels import Unavailable
from phi3_jax.kernels.cuda import build, nvrtc

# A100, H100 and RTX 50. Those between (86, 89: RTX 30, L4, RTX 40; 100: B200) are added by hand: a minute of two cores.
ARCHITECTURES = (80, 90, 120)
REPORT = re.compile(
    r"Compiling entry function '(?P<name>\w+)'.*?(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers",
    re.S,
)


@pytest.fixture(scope="module")
def compiled() -> dict[tuple[int, str], str]:
    """What the assembler says, by architecture and file."""
    try:
        nvrtc.version()
    except Unavailable as reason:
        pytest.skip(f"{reason}: make test-accelerators has an environment with it")
    headers = sorted(build.SOURCES.glob("*.h"))
    wanted = [(each, source) for source in sorted(build.SOURCES.glob("*.cu")) for each in ARCHITECTURES]
    with ThreadPoolExecutor() as pool:
        made = list(pool.map(lambda one: nvrtc.compile_cubin(one[1], headers, one[0]), wanted))
    assert all(cubin.startswith(b"\x7fELF") for cubin, _ in made)
    return {(each, source.name): log for (each, source), (_, log) in zip(wanted, made, strict=True)}


def test_no_kernel_spills(compiled: dict[tuple[int, str], str]) -> None:
    found: dict[str, dict[int, str]] = {}
    for (architecture, file), log in compiled.items():
        kernels = list(REPORT.finditer(log))
        assert kernels, file
        for kernel in kernels:
            found.setdefault(kernel["name"], {})[architecture] = kernel["registers"]
            told = (kernel["stack"], kernel["stores"], kernel["loads"])
            assert told == ("0", "0", "0"), f"{kernel['name']} for {architecture}"
    names = {f"{each} {log.count('warning')}": log for each, log in compiled.items() if "warning" in log}
    assert not names
    print("\nregisters for compute capability", *(f"{each / 10}" for each in ARCHITECTURES))
    for name, registers in sorted(found.items()):
        print(name, *(registers[each] for each in ARCHITECTURES))


@pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None,
    reason="jax_cuda13_plugin is not installed: make test-accelerators has an environment with it",
)
def test_products_with_integers_write_no_weight() -> None:
    """XLA alone writes the whole matrix as floats (96 MiB in bfloat16) for more than one row."""
    script = Path(__file__).parent / "compile_products.py"
    run = subprocess.run([sys.executable, script, "h100"], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-4000:]
    found = json.loads(run.stdout.splitlines()[-1])
    assert len(found) == 16
    for case, (temporaries, calls) in found.items():
        rows = int(case.split()[-2])
        assert calls == ["phi3_cuda_linear"], case
        assert temporaries <= rows * 16384 * 2 + 4096, case  # the product itself, before 1 is added

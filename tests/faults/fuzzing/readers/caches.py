"""What programs keep for themselves: prompt caches, the compiled kernels, XLA's compiled programs."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from prefixes import take_prefix

from phi3_jax.command_line import compiled_programs
from phi3_jax.infer.engine import PromptCache
from phi3_jax.infer.engine.prompt_cache import fingerprint
from phi3_jax.kernels.native import build, compiler

from ..reader import Read, Reader
from .parts import digest, model

_PREFIX = 11  # tokens


def _make_prompt(folder: Path, variant: int) -> None:
    checkpoint, dtype = model(), ("float32", "int8")[variant]
    ids = np.random.default_rng(variant).integers(4, 97, _PREFIX)
    prompt = take_prefix(checkpoint.config, checkpoint.params, ids, _PREFIX, 17, dtype=dtype)
    dataclasses.replace(prompt, fingerprint=fingerprint(checkpoint)).save(folder / "prompt.safetensors")


def _read_prompt(folder: Path, _: int) -> Read:
    prompt = PromptCache.load(folder / "prompt.safetensors", model())
    return {"weights": digest(prompt.tokens, prompt.is_long, *jax.tree.leaves(prompt.cache))}


# ---------------------------------------------------------------- compiled kernels


def _library(folder: Path) -> Path:
    """The library of two small sources, from a cache in this folder."""
    sources = folder.parent.parent / "sources"
    if not sources.exists():
        mine = sources.with_name(f"sources.{os.getpid()}")
        for name in ("isa.cpp", "ffi/version_ffi.cpp"):
            (mine / name).parent.mkdir(parents=True, exist_ok=True)
            (mine / name).write_text((Path(build.__file__).parent / name).read_text())
        with contextlib.suppress(OSError):  # another worker was faster
            mine.rename(sources)
    with mock.patch.object(compiler, "SOURCES", sources), mock.patch.dict(os.environ, XDG_CACHE_HOME=str(folder)):
        return build._build()


def _make_library(folder: Path, _: int) -> None:
    _library(folder)


def _read_library(folder: Path, _: int) -> Read:
    try:
        loaded = build.open_library(_library(folder))
        build.check_version(loaded)
    except build.Unavailable as error:  # which programs show in a line, and go on without
        raise ValueError(str(error)) from error
    return {"weights": [loaded.phi3_ffi_api_major(), loaded.phi3_ffi_api_minor()]}


# ---------------------------------------------------------------- XLA's programs


def _compile(folder: Path) -> Read:
    """Compiles a program, or takes it from the cache in this folder."""
    from jax.experimental.compilation_cache import compilation_cache

    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    compiled_programs.keep(str(folder), lambda text: None)
    compilation_cache.reset_cache()
    try:
        found = jax.jit(lambda x: jnp.tanh(x @ x.T).sum(0))(np.arange(12.0, dtype=np.float32).reshape(4, 3) / 9)
        return {"weights": digest(found)}
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


def _read_programs(folder: Path, _: int) -> Read:
    return _compile(folder)


def _make_programs(folder: Path, _: int) -> None:
    _compile(folder)


READERS = {
    "prompt cache": Reader(_make_prompt, _read_prompt, 2, checksums=True),
    "kernels": Reader(_make_library, _read_library, files={"*.so": 3, "*.json": 1}, cost=20, seconds=90, memory=2e9),
    "compiled programs": Reader(_make_programs, _read_programs, cost=6),
}

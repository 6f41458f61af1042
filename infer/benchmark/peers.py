"""The peers that phi3-benchmark is asked for, and the files that they load: our weights, in their formats."""

from __future__ import annotations

import contextlib
import dataclasses
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from phi3_jax.checkpoint import resolve, stored_dtype
from phi3_jax.checkpoint.gguf.header import read_header
from phi3_jax.kernels.machine import Rate, threads

from . import processes
from .model import ModelSpec
from .rounds import Side

Program = Literal["llama_cpp", "transformers"]
FLASH_ATTENTION = ("best", "on", "off")
_BY_US = {"f32": "float32", "f16": "float16", "bf16": "bfloat16", "q8_0": None, "q4_0": None}  # None: as stored
_BY_LLAMA_CPP = ("q4_k_m", "q5_k_m", "q6_k", "q4_1")
_DTYPES = ("float32", "bfloat16")
_OWN = "own"  # the GGUF file that was named as the checkpoint, as it is


@dataclasses.dataclass(frozen=True)
class Peer:
    """A program, and the type of its weights."""

    program: Program
    kind: str

    @property
    def name(self) -> str:
        """The name to print."""
        return f"{self.program.replace('_', '.')} {self.kind}"

    @property
    def rate(self) -> Rate:
        """The kind of arithmetic that its weights allow."""
        if self.kind in ("f32", "f16", "float32"):
            return "float32"
        return "bfloat16" if self.kind in ("bf16", "bfloat16") else "int8"


def parse_peers(texts: list[str], dtype: str, quantize: str | None) -> list[Peer]:
    """Peers from texts like "llama_cpp" or "llama_cpp:q4_k_m"; without a type, the nearest to our weights' own.

    Args:
      dtype, quantize: of our weights.

    Raises:
      ValueError: there is no such program or type.
    """
    peers = []
    for text in texts:
        program, _, kind = text.partition(":")
        if program not in typing.get_args(Program):
            raise ValueError(f"--peers={text}: programs are {', '.join(typing.get_args(Program))}")
        known = _DTYPES if program == "transformers" else (*_BY_US, *_BY_LLAMA_CPP, _OWN)
        if kind and kind not in known:
            raise ValueError(f"--peers={text}: types of {program} are {', '.join(known)}")
        peer = Peer(typing.cast(Program, program), kind or _nearest(program, dtype, quantize))
        if peer in peers:
            raise ValueError(f"--peers names {peer.name} twice")
        peers.append(peer)
    return peers


def rate_of(dtype: str, quantize: str | None) -> Rate:
    """The kind of arithmetic that our weights allow."""
    if quantize is not None:
        return "int8"
    return "bfloat16" if dtype == "bfloat16" else "float32"


def open_peer(
    peer: Peer,
    spec: ModelSpec,
    folder: Path,
    python: str | None,
    flash_attention: str,
    stack: contextlib.ExitStack,
    say: Callable[[str], None],
) -> tuple[Side, dict[str, Any]]:
    """Makes the peer's file, starts the peer, and loads it -> (the side, its reply).

    Args:
      folder: where files are made; those that are there already are used again.
      stack: ends the peer when it is closed.
      say: called with a message before a step that takes a while.
    """
    file = _file(peer, spec, folder, python, say)
    say(f"loading {peer.name}")
    process = stack.enter_context(processes.peer(peer.name, peer.program, python))
    request: dict[str, Any] = {"path": str(file), "threads": threads()}
    request |= {"dtype": peer.kind} if peer.program == "transformers" else {"flash_attention": flash_attention}
    reply = process.ask("load", **request)
    size = reply.get("weight_bytes") or _gguf_weight_bytes(file)
    return Side(peer.name, process, size, peer.rate, reply["cache_bytes"]), reply


def _nearest(program: str, dtype: str, quantize: str | None) -> str:
    if program == "transformers":
        return "float32" if quantize is None and dtype == "float32" else "bfloat16"
    if quantize is not None:
        return "q8_0" if quantize.startswith("int8") else "q4_0"
    return "f32" if dtype == "float32" else "bf16"


def _file(peer: Peer, spec: ModelSpec, folder: Path, python: str | None, say: Callable[[str], None]) -> Path:
    """The file or folder with our weights in the peer's format."""
    if peer.kind == _OWN:
        if spec.is_random or (path := resolve(spec.checkpoint)).is_dir():
            raise ValueError("--peers=llama_cpp:own is for a --checkpoint that is a .gguf file")
        return path
    name = spec.name if spec.window else f"{spec.name}-no-window"
    if peer.program == "transformers":
        return _export(folder / f"{name}-{peer.kind}", "folder", spec, peer.kind, say)
    if peer.kind in _BY_US:
        return _export(folder / f"{name}-{peer.kind}.gguf", peer.kind, spec, _BY_US[peer.kind] or _stored(spec), say)
    path, dtype = folder / f"{name}-{peer.kind}.gguf", _stored(spec)
    kind = next(kind for kind, floats in _BY_US.items() if floats == dtype)
    if not path.exists():
        source = _export(folder / f"{name}-{kind}.gguf", kind, spec, dtype, say)
        say(f"quantising {path.name}")
        with processes.peer(peer.name, peer.program, python) as process:
            process.ask("quantize", source=str(source), target=str(path), kind=peer.kind, threads=threads())
    return path


def _stored(spec: ModelSpec) -> str:
    """The dtype to round from."""
    return "bfloat16" if spec.is_random else stored_dtype(spec.checkpoint)


def _export(path: Path, kind: str, spec: ModelSpec, dtype: str, say: Callable[[str], None]) -> Path:
    if not path.exists():
        say(f"writing {path.name}")
        # In a process of its own, whose memory is free again when it ends.
        with processes.ours("our export") as process:
            floats = dataclasses.replace(spec, dtype=dtype, quantize=None)
            process.ask("export", spec=dataclasses.asdict(floats), path=str(path), kind=kind)
    return path


def _gguf_weight_bytes(path: Path) -> float:
    """Bytes that a step reads of a GGUF file: all tensors, without an embedding that is not also the head."""
    _, tensors = read_header(path)
    places = sorted(tensor.offset for tensor in tensors.values())
    ends = dict(zip(places, [*places[1:], path.stat().st_size], strict=True))
    sizes = {name: ends[tensor.offset] - tensor.offset for name, tensor in tensors.items()}
    return float(sum(sizes.values()) - (sizes["token_embd.weight"] if "output.weight" in sizes else 0))

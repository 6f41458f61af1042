"""Hugging Face safetensors folders: tensors are memory-mapped from one file or several, and written back.

The safetensors package says whether a file is sound. The tensors are read here, because it returns copies at 1.6 GB/s,
while a mapped file is copied at memory speed (BUILD_NOTES.md), and written here, because it writes metadata in a random
order, and does not align arrays so that JAX takes them as they are mapped.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors

from phi3_jax.checkpoint.checksums import changed, tensor_crc32
from phi3_jax.checkpoint.tensor_source import TensorSource
from phi3_jax.json_files import read_object, shown, unique
from phi3_jax.regular_file import require_regular

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
FLOATS: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
}
# Constants that older versions of transformers stored beside the parameters, integers among them.
_BUFFERS = tuple(f".rotary_emb.{name}" for name in ("inv_freq", "original_inv_freq", "cos_cached", "sin_cached"))
_BUFFERS += (".position_ids", ".masked_bias")
_ANY = FLOATS | {name: np.dtype(kind) for name, kind in {"I64": "i8", "I32": "i4", "I16": "i2"}.items()}
_ANY |= {"I8": np.dtype(np.int8), "U8": np.dtype(np.uint8), "BOOL": np.dtype(np.bool_)}
# What a folder may hold instead: a pattern, and what to do about it.
_INSTEAD = {
    "model-*-of-*.safetensors": f"shards without their {INDEX}; download that, too",
    "adapter_model.safetensors": "an adapter; name the checkpoint that it belongs to, and this folder as the adapter",
    "consolidated*.safetensors": "a file of Mistral's own programs; take the files model*.safetensors of that model",
    "model.*.safetensors": f"a variant; rename it to {SINGLE} if it is the one that you want",
    "*.safetensors": f"a file of another name; rename it to {SINGLE} if it holds the whole model",
    "*.gguf": "a GGUF file; name that",
    "*.bin": "pickled weights, which could execute code; convert them: load the folder in transformers, where you "
    "trust it, and call save_pretrained",
    "*.pt*": "pickled weights, which could execute code; save them as safetensors where you trust them",
}
_POINTER = b"version https://git-lfs"
_MAX_HEADER = 4_000_000  # bytes: Python's objects take many times their text. Models like ours have a hundredth
_ALIGNMENT = 64  # bytes
_MAX_NAME = 512  # characters, all of which an error can show in one line
_CHECKSUMS = "phi3_jax.crc32"  # in the metadata of files that are written here: JSON, the checksum of each tensor


def read_folder(folder: Path) -> dict[str, TensorSource]:
    """The tensors of `model.safetensors`, or of the shards that `model.safetensors.index.json` names.

    Raises:
      FileNotFoundError: neither is there, or a shard is missing.
      ValueError: a file is damaged, a tensor is not of a float type, or two shards have different tensors of one name.
    """
    sources: dict[str, TensorSource] = {}
    places: dict[str, str] = {}
    for file in _files(folder):
        tensors = read_file(file)
        for name in sorted(sources.keys() & tensors.keys()):
            if not _same(sources[name], tensors[name]):
                raise ValueError(
                    f"{folder}: {places[name]} and {file.name} hold different tensors {name}: download both again"
                )
        sources |= tensors
        places |= dict.fromkeys(tensors, file.name)
    return {name: source for name, source in sources.items() if not name.endswith(_BUFFERS)}


def read_file(path: Path, kinds: Mapping[str, np.dtype] = FLOATS) -> dict[str, TensorSource]:
    """The tensors of one safetensors file; every size in its header is checked against the file's.

    In files that are written here, the bytes of a tensor are compared with their checksum whenever it is read.

    `kinds` are the dtypes that are accepted, by their names in the format.

    Raises:
      ValueError: it is no regular file, the header is damaged, or larger than 4 MB, the file is shorter or longer than
        it says, or a dtype is not accepted.
    """
    require_regular(path)
    size = path.stat().st_size
    refuse_pointer(path)
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER):
            raise _damaged(path, f"its header claims {length} bytes of a file of {size}")
        text = file.read(length)
    try:
        # The package decides what is a sound file: no gaps, no overlaps, nothing behind the last tensor.
        with safetensors.safe_open(path, "numpy"):
            pass
        header = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError, safetensors.SafetensorError) as error:
        raise _damaged(path, f"its header cannot be read ({' '.join(str(error).split())[:300]})") from None
    sums = _checksums(path, header)
    if wrong := [name for name in header if len(name) > _MAX_NAME or not name.isprintable()]:
        raise _damaged(path, f"{shown(wrong[0])} is the name of a tensor")
    return {
        name: _tensor(path, name, entry, 8 + length, _ANY if name.endswith(_BUFFERS) else kinds, sums)
        for name, entry in header.items()
    }


def refuse_pointer(path: Path) -> None:
    """Raises ValueError if a file is what Git LFS leaves in the place of one that was not fetched."""
    with path.open("rb") as file:
        if file.read(len(_POINTER)) == _POINTER:
            raise ValueError(f"{path}: a pointer of Git LFS, not the weights; fetch them with: git lfs pull")


def write_folder(folder: Path, tensors: Iterable[tuple[str, np.ndarray]], max_shard_size: int) -> None:
    """Writes tensors as one file, or as shards of at most `max_shard_size` bytes (unless one tensor is larger)."""
    shards: list[dict[str, np.ndarray]] = [{}]
    for name, tensor in tensors:
        if shards[-1] and sum(t.nbytes for t in shards[-1].values()) + tensor.nbytes > max_shard_size:
            shards.append({})
        shards[-1][name] = tensor
    if len(shards) == 1:
        write_file(folder / SINGLE, shards[0])
        return
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards, start=1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        write_file(folder / file, shard)
        weight_map |= dict.fromkeys(shard, file)
    total = sum(tensor.nbytes for shard in shards for tensor in shard.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def write_file(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes tensors as one file, with their checksums; the same tensors give the same bytes.

    Those whose sizes are multiples of 64 bytes (all large ones) come first and so begin at such multiples.
    """
    names = sorted(tensors, key=lambda n: (tensors[n].nbytes % _ALIGNMENT != 0, -tensors[n].itemsize, n))
    kinds = {dtype: kind for kind, dtype in _ANY.items()}
    sums = {name: tensor_crc32(name, tensors[name]) for name in names}
    header: dict[str, Any] = {"__metadata__": {"format": "pt", _CHECKSUMS: json.dumps(sums)}}
    end = 0
    for name in names:
        array = tensors[name]
        begin, end = end, end + array.nbytes
        header[name] = {"dtype": kinds[array.dtype], "shape": array.shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            file.write(np.ascontiguousarray(tensors[name]).reshape(-1).view(np.uint8).data)


def _files(folder: Path) -> list[Path]:
    index = folder / INDEX
    if (folder / SINGLE).exists():
        if index.exists():
            warnings.warn(
                f"{folder}: {SINGLE} is read, as by transformers, and the shards of {INDEX} are not", stacklevel=4
            )
        return [folder / SINGLE]
    if not index.exists():
        found = next((f"{path.name} is {what}" for path, what in _instead(folder)), "download the weights into it")
        raise FileNotFoundError(f"{folder}: there is neither {SINGLE} nor {INDEX}; {found}")
    try:
        names = sorted(set(read_object(index)["weight_map"].values()))
    except (KeyError, TypeError, AttributeError) as error:
        raise _damaged(index, f"it has no readable weight_map ({error!r})") from None
    if outside := [name for name in names if not isinstance(name, str) or Path(name).name != name or len(name) > 255]:
        raise ValueError(f"{index}: shards must be files of the same folder, not {shown(outside)}")
    if absent := [name for name in names if not (folder / name).exists()]:
        raise FileNotFoundError(f"{folder}: shards {shown(absent)} are missing; download them again")
    return [folder / name for name in names]


def _instead(folder: Path) -> Iterator[tuple[Path, str]]:
    for pattern, what in _INSTEAD.items():
        for path in sorted(folder.glob(pattern)):
            yield path, what


def _same(one: TensorSource, other: TensorSource) -> bool:
    """Whether two tensors have the same bits."""
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    bits, others = (source.read().reshape(-1).view(np.uint8) for source in (one, other))
    return bool(np.array_equal(bits, others))


def _tensor(
    path: Path, name: str, entry: Any, start: int, kinds: Mapping[str, np.dtype], sums: Mapping[str, int] | None
) -> TensorSource:
    """The tensor of one header entry, which the package has checked."""
    kind, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    if kind not in kinds:
        raise ValueError(
            f"{path}: tensor {name} has dtype {kind}, but only {sorted(kinds)} can be loaded; "
            "take the unquantised checkpoint"
        )
    dtype = kinds[kind]

    def read() -> np.ndarray:
        # Mapped for each read and dropped with the result, so that pages do not pile up in memory.
        found = np.memmap(path, dtype, "r", start + begin, shape) if end > begin else np.zeros(shape, dtype)
        if sums is not None and tensor_crc32(name, found) != sums[name]:
            raise changed(path, name, f"remove {_CHECKSUMS} from its metadata")
        return found

    return TensorSource(shape, dtype.name, read)


def _checksums(path: Path, header: dict[str, Any]) -> dict[str, int] | None:
    """Takes the metadata out of a header -> the checksum of each tensor; None in the files of others."""
    text = (header.pop("__metadata__", None) or {}).get(_CHECKSUMS)
    if text is None:
        return None
    try:
        sums = json.loads(text)
    except (ValueError, RecursionError):
        sums = None
    if not isinstance(sums, dict) or sums.keys() != header.keys():
        raise changed(path, "its list of tensors", f"remove {_CHECKSUMS} from its metadata")
    return sums


def _damaged(path: Path, what: str) -> ValueError:
    return ValueError(f"{path}: the file is damaged or incomplete: {what}; download it again")

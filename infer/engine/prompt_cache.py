"""A prefix's keys and values, kept between runs in memory and in a file, so that a long system prompt is read once.

Axis letters: L layer, B batch, K key-value heads, S cache slot, P kept slots (one for each key), H head dim.
"""

from __future__ import annotations

import dataclasses
import errno
import functools
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from phi3_jax.checkpoint import Checkpoint
from phi3_jax.checkpoint.atomic_write import new_file
from phi3_jax.config import Phi3Config
from phi3_jax.kernels import LoraTensor
from phi3_jax.model import KVCache
from phi3_jax.model.points import Edit

from .failures import NOT_FINITE_ADVICE

_KIND = "phi3_jax prompt cache"
_VERSION = "2"
_DTYPES = ("F32", "BF16", "F16", "I8")  # what a cache may be made of, by safetensors' names
_AGAIN = "make the prompt cache again"
_SAMPLE = 4096  # elements of each weight that the fingerprint sees


@dataclasses.dataclass(frozen=True, eq=False)
class PromptCache:
    """The keys and values of a prefix. Made by `take` or `load`, and not changed afterwards.

    Attributes:
      tokens: the prefix. Keys and values of all of them were computed; a ring buffer may have lost the oldest.
      cache: one row (B = 1), with the token at position p in slot p mod S, as in every cache; zeros in empty slots.
      is_long: whether LongRoPE's long factors were used; False for a model without LongRoPE.
      fingerprint: of the model, see `fingerprint`.
    """

    tokens: tuple[int, ...]
    cache: KVCache
    is_long: bool
    fingerprint: str

    @classmethod
    def take(cls, cache: KVCache, row: int, tokens: Sequence[int], is_long: bool, fingerprint: str) -> PromptCache:
        """Copies one row out of a running batch's cache, which may be donated or overwritten afterwards.

        Args:
          tokens: the row's tokens; those that have no keys yet, such as the newest, are left out.
          is_long: whether the row's keys were written with LongRoPE's long factors.

        Raises:
          ValueError: there is no such row, it holds no keys, it holds keys of more tokens than were given, or some of
            its numbers are not finite: nobody may go on from there.
        """
        rows = cache.positions.shape[0]
        if not 0 <= row < rows:
            raise ValueError(f"row {row} is not one of the cache's {rows} rows")
        run = _newest_run(np.asarray(cache.positions[row]))
        if len(run) == 0:
            raise ValueError(f"row {row} of the cache holds no keys: read the prompt before taking them")
        length = int(run[-1]) + 1
        if len(tokens) < length:
            raise ValueError(f"row {row} of the cache has keys of {length} tokens, but {len(tokens)} token ids came")
        # A power of two, so that caches of many lengths are taken and placed by few compiled programs.
        held = _in_slot_order(run, min(1 << (len(run) - 1).bit_length(), cache.capacity))
        own = _pick(cache, row, np.where(held < 0, -1, held % cache.capacity))
        if not bool(_is_finite(own)):
            raise ValueError(f"row {row} of the cache holds numbers that are not finite: {NOT_FINITE_ADVICE}")
        return cls(tuple(int(token) for token in tokens[:length]), own, bool(is_long), fingerprint)

    def usable(self, config: Phi3Config, prompt: Sequence[int], is_long: bool) -> int:
        """How many tokens at the beginning of `prompt` need not be read again.

        That is the longest common prefix, but at most len(prompt) - 1, because the last token must be run to get
        logits. It is 0 if the keys cannot be used: they were rotated with LongRoPE's other factors, or a ring buffer
        has already lost some that are in the next token's window.

        Args:
          is_long: whether the sequence that begins with the prompt uses the long factors.
        """
        if is_long != self.is_long:
            return 0
        most = max(0, min(len(prompt) - 1, len(self.tokens)))
        count = next((i for i in range(most) if prompt[i] != self.tokens[i]), most)
        reach = count if config.sliding_window is None else config.sliding_window - 1
        needed = np.arange(max(0, count - reach), count)
        return count if np.isin(needed, np.asarray(self.cache.positions)).all() else 0

    def place(self, cache: KVCache, count: int) -> KVCache:
        """Copies the keys and values of the first `count` tokens into every row of a cache.

        It may have any number of rows and slots; with fewer slots than tokens only the newest are copied. Values are
        converted between float dtypes.

        Args:
          cache: its tokens are lost, and its memory is donated to the result.

        Raises:
          ValueError: there are not so many tokens, the cache is another model's, or only one of the two is int8.
        """
        ours, theirs = self.cache.k, cache.k
        if not 0 <= count <= len(self.tokens):
            raise ValueError(f"cannot place {count} tokens of a prompt cache of {len(self.tokens)}")
        if (ours.dtype == jnp.int8) != (theirs.dtype == jnp.int8):
            raise ValueError(
                f"the prompt cache holds {ours.dtype} but the run's cache {theirs.dtype}, and int8 is not converted: "
                f"pass cache_dtype={ours.dtype.name!r}, or make the prompt cache again with {theirs.dtype.name}"
            )
        # Our head dim may be the larger one only if the difference is a TPU's padding with zeros.
        head_dim = ours.shape[-1] if ours.shape[-1] <= theirs.shape[-1] else _head_dim(self.cache)
        if (ours.shape[0], ours.shape[2]) != (theirs.shape[0], theirs.shape[2]) or head_dim > theirs.shape[-1]:
            raise ValueError(
                f"the prompt cache's keys {list(ours.shape)} do not fit into a cache of {list(theirs.shape)}: layers, "
                "key-value heads or head dim differ; make it again with the model that is running"
            )
        # Without a wrap only the slots around the tokens are written: the others may never need memory.
        size = min(self.cache.capacity, cache.capacity) if count <= cache.capacity else cache.capacity
        begin = max(0, min(count, cache.capacity) - size)
        return _place(cache, self.cache, jnp.int32(count), jnp.int32(begin), size, head_dim)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes one safetensors file, atomically, which only its owner can read.

        It holds `tokens` int32 [tokens], `k` and `v` [L, K, P, H] in the order of their positions, the last of which is
        the last token's; with int8 also `k_scale` and `v_scale` [L, K, P]; and the SHA-256 of all of them.

        Raises:
          OSError: it cannot be written; what was at `path` before is still there.
        """
        tensors = _tensors(self)
        metadata = {"kind": _KIND, "version": _VERSION, "fingerprint": self.fingerprint}
        metadata |= {"is_long": json.dumps(self.is_long)}
        digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
        for name in sorted(tensors):
            _add(digest, name, tensors[name])
        _write(Path(path), tensors, metadata | {"sha256": digest.hexdigest()})

    @classmethod
    def load(cls, path: str | os.PathLike[str], checkpoint: Checkpoint, edits: Sequence[Edit] = ()) -> PromptCache:
        """Reads a file that `save` wrote.

        Args:
          edits: those of the run that it comes from (`Options.edits`).

        Raises:
          FileNotFoundError: there is no such file.
          ValueError: it is damaged, not a prompt cache, of another format version, or made with another model or with
            other edits; or an edit is a function, which no file can tell from another.
        """
        if any(edit.function is not None for edit in edits):
            raise ValueError(f"{path}: an edit is a function, which files do not know; read the prompt again instead")
        place, config = Path(path), checkpoint.config
        if not place.is_file():
            raise FileNotFoundError(f"{place}: there is no such file; make the prompt cache first")
        try:
            # Checks every size in the header against the file's before anything is allocated.
            opened = safetensors.safe_open(place, framework="np")
        except safetensors.SafetensorError as error:
            raise ValueError(f"{place}: not a safetensors file, or a damaged one ({error}); {_AGAIN}") from None
        with opened as file:
            own = fingerprint(checkpoint, edits)
            is_long = _read_metadata(place, file.metadata() or {}, own, config)
            slices = {name: file.get_slice(name) for name in list(file.keys())}
            shapes = {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
            _check_tensors(place, shapes, config)
            tokens = file.get_tensor("tokens")
            if outside := tokens[(tokens < 0) | (tokens >= config.vocab_size)].tolist():
                raise ValueError(
                    f"{place}: token ids {outside[:5]} are outside of the vocabulary of {config.vocab_size}; {_AGAIN}"
                )
            # One tensor after another, so that the host holds only one of them beside an accelerator's copy.
            metadata = dict(file.metadata())
            digest, arrays = metadata.pop("sha256", None), {}
            found = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
            for name in sorted(shapes):
                tensor = file.get_tensor(name)
                _add(found, name, tensor)
                if name != "tokens":
                    arrays[name] = jnp.asarray(tensor[:, None])
        run = np.arange(len(tokens) - arrays["k"].shape[3], len(tokens), dtype=np.int32)
        cache = KVCache(positions=jnp.asarray(run[None]), **arrays)
        if not bool(_is_finite(cache)):
            raise ValueError(f"{place}: holds keys or values that are not finite numbers; {_AGAIN}")
        if found.hexdigest() != digest:
            raise ValueError(f"{place}: damaged, its SHA-256 is not that of what was written; {_AGAIN}")
        if run[0] > 0:
            cache = _pick(cache, 0, _in_slot_order(run, len(run)) - run[0])
        return cls(tuple(tokens.tolist()), cache, is_long, own)


def fingerprint(checkpoint: Checkpoint, edits: Sequence[Edit] = ()) -> str:
    """A short name for a model, the same in every process: a hash of its configuration and of samples of its weights.

    Changes inside of the model (`Options.edits`) count, too; those by a function are the same in this process only.

    It depends on the name, shape and dtype of every weight, and on at most 4096 of its elements, spread evenly. So a
    change to a whole matrix is noticed, but a change to a part of one may not be: for example, a few further trained
    rows of the embedding may lie between the samples. Keys from before such a change would then be accepted.
    """
    digest = hashlib.blake2b(digest_size=16)
    digest.update(json.dumps(dataclasses.asdict(checkpoint.config), sort_keys=True).encode())
    paths = jax.tree_util.tree_flatten_with_path(checkpoint.params)[0]
    leaves = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in paths}
    names = sorted(leaves)
    for name, sample in zip(names, _samples([leaves[name] for name in names]), strict=True):
        digest.update(json.dumps([name, *leaves[name].shape, leaves[name].dtype.name]).encode())
        digest.update(sample.tobytes())
    if scalings := [
        leaf.scaling for leaf in jax.tree.leaves(checkpoint.params, is_leaf=_is_adapted) if _is_adapted(leaf)
    ]:
        digest.update(json.dumps(scalings).encode())  # of attached adapters, which are no leaves
    if edits:
        digest.update(str(jax.tree.structure(edits)).encode())
        for array in jax.tree.leaves(edits):
            digest.update(str(array.shape).encode() + np.asarray(array).tobytes())
    return digest.hexdigest()


def _is_adapted(leaf: Any) -> bool:
    return isinstance(leaf, LoraTensor)


def _samples(leaves: Sequence[jax.Array]) -> list[np.ndarray]:
    """At most 4096 elements of each array, spread over all of it."""
    # Odd strides: a multiple of the row's length would take all samples from one column. One index for each axis,
    # because a flat index does not fit into JAX's 32 bits.
    strides = [-(-leaf.size // _SAMPLE) | 1 for leaf in leaves]
    where = [np.unravel_index(np.arange(0, x.size, step), x.shape) for x, step in zip(leaves, strides, strict=True)]
    if all(map(_on_host, leaves)):
        return [np.asarray(leaf)[index] for leaf, index in zip(leaves, where, strict=True)]  # of views, not of copies
    # A program for each shape: a weight in a buffer per layer has as many leaves as layers.
    return jax.device_get([_gather(leaf, index) for leaf, index in zip(leaves, where, strict=True)])


def _on_host(leaf: jax.Array | np.ndarray) -> bool:
    return isinstance(leaf, np.ndarray) or all(device.platform == "cpu" for device in leaf.devices())


@jax.jit
def _gather(leaf: jax.Array, where: tuple[jax.Array, ...]) -> jax.Array:
    return leaf[where]


def _newest_run(positions: np.ndarray) -> np.ndarray:
    """positions [S] of a row -> the newest run of them without a gap, in order."""
    present = np.sort(positions[positions >= 0])
    gaps = np.flatnonzero(np.diff(present) != 1)
    return present[gaps[-1] + 1 :] if len(gaps) else present


def _in_slot_order(run: np.ndarray, slots: int) -> np.ndarray:
    """Consecutive positions in the order of the slots that hold them, position mod slots; -1 for an empty slot."""
    held = run[-1] - (run[-1] - np.arange(slots)) % slots
    return np.where(held >= run[0], held, -1)


def _arrays(cache: KVCache) -> dict[str, jax.Array]:
    """k and v [L, B, K, S, H], and with int8 k_scale and v_scale [L, B, K, S]."""
    arrays = {"k": cache.k, "v": cache.v, "k_scale": cache.k_scale, "v_scale": cache.v_scale}
    return {name: array for name, array in arrays.items() if array is not None}


@jax.jit
def _is_finite(cache: KVCache) -> jax.Array:
    """Whether all keys and values are finite: bool scalar."""
    return jnp.stack([jnp.isfinite(array).all() for array in _arrays(cache).values()]).all()


@jax.jit
def _pick(cache: KVCache, row: jax.typing.ArrayLike, slots: jax.Array) -> KVCache:
    """Some slots [P] of one row, in that order, -1 for an empty one: a cache of one row, with memory of its own."""
    is_there = slots >= 0

    def of(array: jax.Array) -> jax.Array:  # [L, B, K, S, ...] -> [L, 1, K, P, ...]
        taken = jnp.take(jax.lax.dynamic_index_in_dim(array, row, axis=1), slots, axis=3, mode="clip")
        # Zeros, as there may be anything in a slot that holds no token.
        return jnp.where(is_there if array.ndim == 4 else is_there[:, None], taken, 0)

    positions = jnp.where(is_there, cache.positions[row, slots], -1)
    return KVCache(positions=positions[None], **jax.tree.map(of, _arrays(cache)))


@functools.partial(jax.jit, static_argnames=("size", "head_dim"), donate_argnames="target")
def _place(target: KVCache, source: KVCache, count: jax.Array, begin: jax.Array, size: int, head_dim: int) -> KVCache:
    """`PromptCache.place`, for `size` slots of the target from `begin` on: what they hold, and where it comes from."""
    S, slots = target.capacity, begin + jnp.arange(size)
    wanted = count - 1 - (count - 1 - slots) % S  # the newest position below count whose slot this is
    origin = wanted % source.capacity
    found = (wanted >= 0) & (source.positions[0, origin] == wanted)

    def put(old: jax.Array, new: jax.Array) -> jax.Array:  # [L, B, K, S, ...], [L, 1, K, P, ...]
        mask = found if old.ndim == 4 else found[:, None]

        def one(layer: jax.Array, old: jax.Array) -> jax.Array:
            part = jax.lax.dynamic_index_in_dim(new, layer)
            part = part if old.ndim == 4 else part[..., :head_dim]
            part = jnp.where(mask, jnp.take(part, origin, axis=3, mode="clip"), 0).astype(old.dtype)
            part = jnp.broadcast_to(part, (1, old.shape[1], *part.shape[2:]))
            return jax.lax.dynamic_update_slice(old, part, (layer, 0, 0, begin, *[0] * (old.ndim - 4)))

        # Layer by layer: a scatter of all layers at once would first write the copies for all rows to other memory.
        return jax.lax.fori_loop(0, len(old), one, old)

    held = jnp.broadcast_to(jnp.where(found, wanted, -1), (len(target.positions), size))
    positions = jax.lax.dynamic_update_slice(jnp.full_like(target.positions, -1), held, (0, begin))
    return KVCache(positions=positions, **jax.tree.map(put, _arrays(target), _arrays(source)))


def _head_dim(cache: KVCache) -> int:
    """Head dim without the zeros at the end, which a TPU's cache is padded with."""
    used = [np.asarray((array != 0).any(axis=(0, 1, 2, 3))) for array in (cache.k, cache.v)]
    return int(np.flatnonzero(used[0] | used[1]).max(initial=0)) + 1


def _tensors(prompt: PromptCache) -> dict[str, np.ndarray]:
    """What the file holds."""
    cache, positions = prompt.cache, np.asarray(prompt.cache.positions[0])
    run = _newest_run(positions)
    if not np.array_equal(run, positions):
        cache = _pick(cache, 0, run % cache.capacity)
    head_dim = _head_dim(cache)
    arrays = _arrays(cache) | {"k": cache.k[..., :head_dim], "v": cache.v[..., :head_dim]}
    tensors = {name: np.ascontiguousarray(np.asarray(array)[:, 0]) for name, array in arrays.items()}
    return {"tokens": np.asarray(prompt.tokens, np.int32)} | tensors


def _add(digest: Any, name: str, tensor: np.ndarray) -> None:
    digest.update(json.dumps([name, tensor.dtype.name, *tensor.shape]).encode())
    digest.update(np.ascontiguousarray(tensor).reshape(-1).view(np.uint8))


def _write(path: Path, tensors: dict[str, np.ndarray], metadata: dict[str, str]) -> None:
    size = sum(tensor.nbytes for tensor in tensors.values())
    with new_file(path, size, overwrite=True, private=True) as partial:  # the prompt may be confidential
        try:
            safetensors.numpy.save_file(tensors, partial, metadata)
        except safetensors.SafetensorError as error:
            raise OSError(errno.EIO, str(error)) from None


def _read_metadata(path: Path, metadata: Mapping[str, str], own: str, config: Phi3Config) -> bool:
    """Checks that the file is a prompt cache of this model -> is_long."""
    if metadata.get("kind") != _KIND:
        raise ValueError(f"{path}: a safetensors file, but not a prompt cache; name one that was saved as such")
    if (version := metadata.get("version")) != _VERSION:
        raise ValueError(f"{path}: prompt cache of format version {version}, but only {_VERSION} is known; {_AGAIN}")
    if metadata.get("fingerprint") != own:
        raise ValueError(
            f"{path}: the prompt cache was made with another model (other weights, dtype, configuration or edits); "
            f"{_AGAIN}"
        )
    known = {"true": True, "false": False} if config.long_rope else {"false": False}
    if (is_long := metadata.get("is_long")) not in known:
        raise ValueError(f"{path}: is_long is {is_long!r}, but this model allows {sorted(known)} only; {_AGAIN}")
    return known[is_long]


def _check_tensors(path: Path, found: Mapping[str, tuple[str, tuple[int, ...]]], config: Phi3Config) -> None:
    """Compares dtypes and shapes with the configuration and with one another. Raises ValueError."""
    sizes = [*found.get("tokens", ("", ()))[1], *found.get("k", ("", ()))[1][2:]]
    count, kept, head_dim = sizes if len(sizes) == 3 else (0, 0, 0)
    kind = found["k"][0] if "k" in found else ""
    stack = (config.num_hidden_layers, config.num_key_value_heads, kept)
    expected = {"tokens": ("I32", (count,)), "k": (kind, (*stack, head_dim)), "v": (kind, (*stack, head_dim))}
    if kind == "I8":
        expected |= {"k_scale": ("F32", stack), "v_scale": ("F32", stack)}
    # Zeros at the end of every head may have been cut off.
    sound = 1 <= kept <= count <= config.max_position_embeddings and 1 <= head_dim <= config.head_dim
    if found != expected or not sound or kind not in _DTYPES:
        listed = ", ".join(f"{name} {dtype} {list(shape)}" for name, (dtype, shape) in sorted(found.items()))
        raise ValueError(
            f"{path}: its tensors ({listed}) do not fit one another or the model's {stack[0]} layers, {stack[1]} "
            f"key-value heads, head dim {config.head_dim} and context of {config.max_position_embeddings}; {_AGAIN}"
        )

import dataclasses
import json
import os
import random
import stat

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from prefixes import DTYPES, ids, read_prefix, take_prefix, with_window

from phi3_jax import KVCache
from phi3_jax.infer.engine import PromptCache
from phi3_jax.infer.engine.prompt_cache import fingerprint

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("slots", [29, 11])
def test_a_file_gives_back_every_bit(tiny, tmp_path, dtype, slots):
    checkpoint = dataclasses.replace(tiny, config=with_window(tiny, 7))
    prefix = ids(11, 23)
    prompt = take_prefix(checkpoint.config, tiny.params, prefix, 23, slots, 2, 1, dtype=dtype)
    prompt = dataclasses.replace(prompt, fingerprint=fingerprint(checkpoint))
    prompt.save(tmp_path / "prompt.safetensors")
    loaded = PromptCache.load(tmp_path / "prompt.safetensors", checkpoint)
    for field in ("tokens", "is_long", "fingerprint"):
        assert getattr(loaded, field) == getattr(prompt, field)
    assert (loaded.is_long, loaded.cache.k.dtype) == (True, dtype)
    assert jax.tree.structure(loaded.cache) == jax.tree.structure(prompt.cache)
    kept = min(slots, 23)
    positions = np.arange(23 - kept, 23)
    for new, old in zip(jax.tree.leaves(loaded.cache), jax.tree.leaves(prompt.cache), strict=True):
        axis = 1 if new.ndim == 2 else 3  # of the slots
        new, old = (np.take(np.asarray(x), positions % x.shape[axis], axis) for x in (new, old))
        assert (new.shape, new.dtype) == (old.shape, old.dtype)
        assert new.tobytes() == old.tobytes()
    assert (
        loaded.cache.positions == jnp.asarray([p for s in range(kept) for p in range(23 - kept, 23) if p % kept == s])
    ).all()
    assert os.listdir(tmp_path) == ["prompt.safetensors"]
    assert stat.S_IMODE((tmp_path / "prompt.safetensors").stat().st_mode) == 0o600


def test_the_file_holds_taken_slots_only_in_the_order_of_positions(tiny, tmp_path):
    """Also where a PromptCache was not made by `take`: a ring of 11 slots, and a cache with 18 free ones."""
    config, prefix = with_window(tiny, 7), ids(12, 23)
    full, ring = (read_prefix(config, tiny.params, prefix, 23, slots) for slots in (41, 11))
    for cache, kept in ((full, 23), (ring, 11)):
        PromptCache(tuple(prefix), cache, True, "model").save(tmp_path / "prompt")
        tensors = safetensors.numpy.load_file(tmp_path / "prompt")
        assert tensors["tokens"].tolist() == prefix.tolist()
        for name in "kv":
            expected = np.asarray(getattr(full, name))[:, 0, :, 23 - kept : 23]
            np.testing.assert_allclose(tensors[name], expected, atol=5e-5)


@pytest.fixture
def saved(tiny, tmp_path):
    """A good file, and what is in it."""
    prompt = take_prefix(tiny.config, tiny.params, ids(13, 11), 11, 17)
    path = tmp_path / "prompt.safetensors"
    dataclasses.replace(prompt, fingerprint=fingerprint(tiny)).save(path)
    with safetensors.safe_open(path, "np") as file:
        return path, {name: file.get_tensor(name) for name in list(file.keys())}, file.metadata()


def refused(path, checkpoint, message, error=ValueError):
    with pytest.raises(error, match=message) as caught:
        PromptCache.load(path, checkpoint)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)
    assert " make " in str(caught.value) or "name one" in str(caught.value)


def test_files_that_are_no_prompt_caches_are_refused(tiny, saved, tmp_path):
    path, tensors, metadata = saved
    assert metadata["is_long"] == "false"
    refused(tmp_path / "absent", tiny, "no such file", FileNotFoundError)
    refused(tmp_path, tiny, "no such file", FileNotFoundError)
    whole = path.read_bytes()
    for damaged in (b"", b"\n" * 99, b"hello " * 99, whole[:-1], whole[:100], whole[:7], whole + b"x", whole[8:]):
        path.write_bytes(damaged)
        refused(path, tiny, "not a safetensors file, or a damaged one")
    for other in (None, {}, {"format": "pt"}, metadata | {"kind": "phi3_jax adapter"}):
        safetensors.numpy.save_file(tensors, path, other)
        refused(path, tiny, "not a prompt cache")
    for version in ("0", "1", ""):
        safetensors.numpy.save_file(tensors, path, metadata | {"version": version})
        refused(path, tiny, f"format version {version},")
    for is_long in ("True", "1", ""):
        safetensors.numpy.save_file(tensors, path, metadata | {"is_long": is_long})
        refused(path, tiny, "is_long")
    plain = dataclasses.replace(tiny, config=dataclasses.replace(tiny.config, long_rope=None))
    metadata |= {"fingerprint": fingerprint(plain), "is_long": "true"}
    safetensors.numpy.save_file(tensors, path, metadata)
    refused(path, plain, "is_long")


def test_a_header_that_claims_more_than_there_is_is_refused_before_anything_is_allocated(tiny, saved):
    path, *_ = saved
    whole = path.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    for shape in ([2**20, 2**20, 2, 11], [3, 2, 12, 8], [2**62, 2**62, 2, 11], [0]):
        header = json.loads(whole[8 : 8 + length])
        header["k"]["shape"] = shape
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + whole[8 + length :])
        refused(path, tiny, "damaged")
    path.write_bytes((2**62).to_bytes(8, "little") + whole[8:])
    refused(path, tiny, "damaged")


def test_a_prompt_cache_of_another_model_is_refused(tiny, saved):
    path, *_ = saved
    assert PromptCache.load(path, tiny).usable(tiny.config, ids(13, 11), False) == 10
    changed = jax.tree.map(lambda leaf: leaf, tiny.params)
    changed["norm"]["weight"] = changed["norm"]["weight"] * 1.01
    refused(path, dataclasses.replace(tiny, params=changed), "another model")
    refused(path, dataclasses.replace(tiny, config=with_window(tiny, 18)), "another model")


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.int8])
def test_no_flipped_bit_is_taken(tiny, tmp_path, dtype):
    path = tmp_path / "prompt"
    prompt = take_prefix(tiny.config, tiny.params, ids(13, 11), 11, 17, dtype=dtype)
    dataclasses.replace(prompt, fingerprint=fingerprint(tiny)).save(path)
    whole, rng = path.read_bytes(), random.Random(5)
    header = 8 + int.from_bytes(whole[:8], "little")
    data = range(header, len(whole))
    assert len(data) > 1000
    for at in [*range(8), *rng.sample(range(8, header), 12), *rng.sample(data, 12)]:
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << rng.randrange(7)]) + whole[at + 1 :])
        with pytest.raises(ValueError, match=f"^{path}: [^\n]*$"):
            PromptCache.load(path, tiny)
    tokens = bytearray(whole)  # which stay in the vocabulary
    tokens[whole.index(np.asarray(prompt.tokens, np.int32).tobytes())] ^= 1
    path.write_bytes(tokens)
    refused(path, tiny, "damaged, its SHA-256 is not that of what was written")


BAD = {
    "a tensor is missing": lambda t: t.pop("v"),
    "no tokens": lambda t: t.pop("tokens"),
    "no keys": lambda t: t.pop("k"),
    "one tensor more": lambda t: t.update(x=np.zeros(2, np.float32)),
    "scales for floats": lambda t: t.update(k_scale=t["k"][..., 0].copy(), v_scale=t["k"][..., 0].copy()),
    "int8 without scales": lambda t: t.update(k=t["k"].astype(np.int8), v=t["v"].astype(np.int8)),
    "two dtypes": lambda t: t.update(v=t["v"].astype(np.float16)),
    "a dtype no cache has": lambda t: t.update(k=t["k"].astype(np.float64), v=t["v"].astype(np.float64)),
    "tokens of another dtype": lambda t: t.update(tokens=t["tokens"].astype(np.int64)),
    "tokens in two axes": lambda t: t.update(tokens=t["tokens"][None].copy()),
    "fewer tokens than keys": lambda t: t.update(tokens=t["tokens"][:10].copy()),
    "no tokens at all": lambda t: t.update(tokens=t["tokens"][:0], k=t["k"][:, :, :0], v=t["v"][:, :, :0]),
    "no keys at all": lambda t: t.update(k=t["k"][:, :, :0], v=t["v"][:, :, :0]),
    "more tokens than the context": lambda t: t.update(tokens=np.resize(t["tokens"], 65)),
    "keys and values differ": lambda t: t.update(v=t["v"][:, :, :10].copy()),
    "too few layers": lambda t: t.update(k=t["k"][:2].copy(), v=t["v"][:2].copy()),
    "too many heads": lambda t: t.update(k=np.repeat(t["k"], 2, 1), v=np.repeat(t["v"], 2, 1)),
    "too long heads": lambda t: t.update(k=np.repeat(t["k"], 2, 3), v=np.repeat(t["v"], 2, 3)),
    "too few axes": lambda t: t.update(k=t["k"][0].copy(), v=t["v"][0].copy()),
}


@pytest.mark.parametrize("change", BAD.values(), ids=BAD)
def test_tensors_that_contradict_the_model_or_one_another_are_refused(tiny, saved, change):
    path, tensors, metadata = saved
    change(tensors)
    safetensors.numpy.save_file(tensors, path, metadata)
    refused(path, tiny, "its tensors .* do not fit one another or the model's 3 layers, 2 key-value heads, head dim 8")


@pytest.mark.parametrize("token", [-1, 97, 2**31 - 1])
def test_token_ids_outside_of_the_vocabulary_are_refused(tiny, saved, token):
    path, tensors, metadata = saved
    tensors["tokens"][7] = token
    safetensors.numpy.save_file(tensors, path, metadata)
    refused(path, tiny, f"token ids .{token}. are outside of the vocabulary of 97")


def test_zeros_at_the_end_of_every_head_survive_a_file(tiny, tmp_path):
    """`save` cannot tell them from a TPU's padding."""
    cache = KVCache.create(tiny.config, 1, 2)
    cache = dataclasses.replace(cache, k=cache.k.at[..., :5].set(0.5), positions=jnp.asarray([[0, 1]], jnp.int32))
    prompt = PromptCache((5, 6), cache, False, fingerprint(tiny))
    prompt.save(tmp_path / "prompt")
    placed = PromptCache.load(tmp_path / "prompt", tiny).place(KVCache.create(tiny.config, 1, 2), 2)
    jax.tree.map(np.testing.assert_array_equal, placed, cache)


def fail(source, target):
    # Renaming does not work from one file system to another.
    assert os.path.dirname(os.path.dirname(source)) == os.path.dirname(target)
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("step", ["replace", "save_file", "interrupt"])
def test_a_write_that_fails_leaves_nothing_behind_and_the_old_file_as_it_was(tiny, saved, monkeypatch, step):
    path, *_ = saved
    before = path.read_bytes()
    prompt = PromptCache.load(path, tiny)

    def half(tensors, name, metadata):
        with open(name, "wb") as file:
            file.write(b"half")
        raise safetensors.SafetensorError("I/O error") if step == "save_file" else KeyboardInterrupt

    if step == "replace":
        monkeypatch.setattr(os, "replace", fail)
    else:
        monkeypatch.setattr(safetensors.numpy, "save_file", half)
    expected = KeyboardInterrupt if step == "interrupt" else OSError
    with pytest.raises(expected) as caught:
        prompt.save(path)
    if step != "interrupt":
        reason = "No space left on device" if step == "replace" else "I/O error"
        assert str(caught.value).startswith(f"{path}: cannot be written ({reason}); name a file in")
    assert os.listdir(path.parent) == [path.name]
    assert path.read_bytes() == before


def test_a_folder_that_cannot_be_written_to_is_named(tiny, saved):
    path, *_ = saved
    prompt = PromptCache.load(path, tiny)
    for place, reason in ((path / "x", "Not a directory"), (path.parent / "no" / "x", "No such file or directory")):
        with pytest.raises(OSError, match=f"{place}: .*{reason}"):
            prompt.save(place)
    folder = path.parent / "folder"
    folder.mkdir()
    with pytest.raises(OSError, match=f"{folder}: .*Is a directory"):
        prompt.save(folder)
    assert sorted(os.listdir(path.parent)) == ["folder", path.name]
    if os.getuid() == 0:
        return  # root may write everywhere
    folder.chmod(0o500)
    with pytest.raises(OSError, match="Permission denied"):
        prompt.save(folder / "x")

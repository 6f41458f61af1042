"""Headers, lists and sizes that lie: refused as the safetensors package does, before anything is built of them."""

import json
import math
import os
import random
import tracemalloc
from pathlib import Path

import pytest
import safetensors

import phi3_jax
from phi3_jax.checkpoint import read_config
from phi3_jax.checkpoint.safetensors_files import read_file
from phi3_jax.model import parameter_count, parameter_shapes
from phi3_jax.presets import PRESETS


def with_header(data: bytes, header: dict | str, length: int | None = None) -> bytes:
    start = 8 + int.from_bytes(data[:8], "little")
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data[start:]


def lies(data: bytes) -> dict[str, bytes]:
    """Files of one kind of lie each; {} stands for the header's entry of a tensor in the middle."""
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    header.pop("__metadata__")
    names = sorted(header, key=lambda name: header[name]["data_offsets"])
    name = names[3]
    entry = header[name]
    begin, end = entry["data_offsets"]

    def changed(**values):
        return with_header(data, header | {name: entry | values})

    behind = {n: header[n] | {"data_offsets": [o + 8 for o in header[n]["data_offsets"]]} for n in names[3:]}
    gap = with_header(data, header | behind)
    cut = len(gap) - len(data) + start + begin
    return {
        "a gap": gap[:cut] + bytes(8) + gap[cut:],
        "an overlap": changed(data_offsets=header[names[2]]["data_offsets"]),
        "a shift": changed(data_offsets=[begin - 4, end - 4]),
        "a missing tensor": with_header(data, {n: header[n] for n in names if n != name}),
        "trailing bytes": data + bytes(64),
        "a shorter file": data[:-4],
        "an empty tensor in another": with_header(data, header | {"e": entry | {"shape": [0], "data_offsets": [4, 4]}}),
        "a negative shape": changed(shape=[-n for n in entry["shape"]]),
        "a shape beyond 64 bits": changed(shape=[2**32, 2**32]),
        "a number beyond 64 bits": changed(shape=[2**64, 0]),
        "a shape of floats": changed(shape=[float(n) for n in entry["shape"]]),
        "a shape of text": changed(shape="24"),
        "a truth value": changed(shape=[True, *entry["shape"]]),
        "no shape": changed(shape=None),
        "offsets that end first": changed(data_offsets=[end, begin]),
        "three offsets": changed(data_offsets=[begin, end, end]),
        "an unknown type": changed(dtype="F31"),
        "a list as an entry": with_header(data, header | {name: [entry]}),
        "metadata that is a list": with_header(data, header | {"__metadata__": []}),
        "metadata that is text": with_header(data, header | {"__metadata__": "x"}),
        "metadata of numbers": with_header(data, header | {"__metadata__": {"a": 1}}),
        "metadata of objects": with_header(data, header | {"__metadata__": {"a": {"b": "c"}}}),
        "a list as the header": with_header(data, json.dumps([header])),
        "a comma too many": with_header(data, json.dumps(header)[:-1] + ",}"),
        "text behind the header": with_header(data, json.dumps(header) + "{}"),
        "zeros behind the header": with_header(data, json.dumps(header) + "\0"),
        "a mark before the header": with_header(data, "\ufeff" + json.dumps(header)),
        "not a number": with_header(data, json.dumps(header | {name: entry | {"shape": [float("nan")]}})),
        "a deep header": with_header(data, "[" * 100_000),
        "bytes that are no text": data[:9] + b"\xff" + data[10:],
        "a length too short": with_header(data, header, 100),
        "a length of nothing": with_header(data, header, 0),
        "a length beyond the file": with_header(data, header, len(data)),
        "a length beyond all": with_header(data, header, 2**64 - 1),
        "no header": data[:7],
        "nothing": b"",
    }


def test_what_the_package_refuses_is_refused_in_one_line(tiny_folder, tmp_path):
    path = tmp_path / "x.safetensors"
    for what, content in lies((tiny_folder / "model.safetensors").read_bytes()).items():
        with pytest.raises(safetensors.SafetensorError):
            safetensors.deserialize(content)
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"x\.safetensors: ") as caught:
            read_file(path)
        assert "\n" not in str(caught.value), what


def test_random_damage_is_refused_wherever_the_package_refuses_it(tiny_folder, tmp_path):
    data, path = (tiny_folder / "model.safetensors").read_bytes(), tmp_path / "x.safetensors"
    start, chance, outcomes = 8 + int.from_bytes(data[:8], "little"), random.Random(3), []
    for _ in range(300):
        copy, position = bytearray(data), chance.randrange(start)
        copy[position : position + chance.choice([0, 1, 1, 1, 2])] = chance.randbytes(chance.choice([0, 1, 1, 1, 8]))
        path.write_bytes(copy)
        try:
            safetensors.deserialize(bytes(copy))
            theirs = True
        except safetensors.SafetensorError:
            theirs = False
        try:
            read_file(path)
            outcomes.append((theirs, True))
        except ValueError:
            outcomes.append((theirs, False))
    assert (False, True) not in outcomes
    assert outcomes.count((False, False)) > 150


def test_what_is_refused_beyond_the_package(tiny_folder):
    """Two tensors of one name, of which the package takes the last, and headers that fill the memory as objects."""
    path = tiny_folder / "model.safetensors"
    data = path.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    text, name = json.dumps(header), "model.norm.weight"
    for content, message in (
        (with_header(data, f'{text[:-1]}, "{name}": {json.dumps(header[name])}}}'), "is there twice"),
        (with_header(data, text + " " * 4_000_000), "its header claims"),
    ):
        safetensors.deserialize(content)
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            phi3_jax.load(tiny_folder)


def test_indices_that_lie(tiny, tmp_path):
    phi3_jax.save(tiny, tmp_path / "x", 9_000)
    index = tmp_path / "x" / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    names = content["weight_map"]
    name = min(names)
    for place, message in {
        "/etc/passwd": "files of the same folder",
        "../x/model.safetensors": "files of the same folder",
        "..": "is a folder",
        "": "is a folder",
        None: "no readable weight_map",
    }.items():
        index.write_text(json.dumps(content | {"weight_map": names | {name: place}}))
        with pytest.raises(ValueError, match=message):
            phi3_jax.load(tmp_path / "x")


def test_an_index_that_names_a_tensor_twice(tiny, tmp_path):
    phi3_jax.save(tiny, tmp_path / "x", 9_000)
    index = tmp_path / "x" / "model.safetensors.index.json"
    first = 'weight_map": {'
    index.write_text(index.read_text().replace(first, first + '"model.norm.weight": "other.safetensors",'))
    with pytest.raises(ValueError, match=r"index\.json: .*model\.norm\.weight"):
        phi3_jax.load(tmp_path / "x")


@pytest.mark.parametrize("kind", ["floats", "int4"])
@pytest.mark.parametrize(
    "lie",
    [
        {"vocab_size": 8_000_000_000},
        {"head_dim": 10**9, "rope_scaling": None},
        {"hidden_size": 2**63},
        {"intermediate_size": 10**12},
        {"num_hidden_layers": 10**9},
        {"num_attention_heads": 10**9, "num_key_value_heads": 10**9},
    ],
)
def test_sizes_are_compared_with_the_weights_before_anything_is_built(int4_folder, kind, lie, tmp_path):
    given = int4_folder.parent / kind
    (tmp_path / "config.json").write_text(json.dumps(json.loads((given / "config.json").read_text()) | lie))
    for weights in given.glob("*.safetensors"):
        (tmp_path / weights.name).symlink_to(weights)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=next(iter(lie))):
            phi3_jax.load(tmp_path, layout="rows")
        assert tracemalloc.get_traced_memory()[1] < 20_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", ["phi-3-mini-4k", "phi-3-medium-128k", "phi-4-mini"])
def test_parameters_are_counted_without_being_built(name):
    config = PRESETS[name]
    assert parameter_count(config) == sum(map(math.prod, parameter_shapes(config).values()))


def test_pipes_where_files_belong_do_not_block(tiny, tiny_folder, tmp_path):
    def pipe(path: Path) -> Path:
        path.unlink(missing_ok=True)
        os.mkfifo(path)
        return path

    with pytest.raises(ValueError, match=r"x\.gguf: is a named pipe"):
        phi3_jax.load(pipe(tmp_path / "x.gguf"))
    with pytest.raises(ValueError, match=r"y\.gguf: is a named pipe"):
        read_config(pipe(tmp_path / "y.gguf"))
    with pytest.raises(ValueError, match=r"model\.safetensors: is a named pipe"):
        phi3_jax.load(pipe(tiny_folder / "model.safetensors").parent)
    (tiny_folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"index\.json: is a named pipe"):
        phi3_jax.load(pipe(tiny_folder / "model.safetensors.index.json").parent)
    phi3_jax.save(tiny, tmp_path / "z")
    (tmp_path / "z" / "adapter").mkdir()
    (tmp_path / "z" / "adapter" / "adapter_config.json").write_text('{"peft_type": "LORA", "target_modules": "all"}')
    pipe(tmp_path / "z" / "adapter" / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="adapter"):
        phi3_jax.load(tmp_path / "z", adapter=tmp_path / "z" / "adapter")

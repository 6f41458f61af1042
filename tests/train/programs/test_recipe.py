"""Recipes by path and by module, and the settings as --help and the guide list them."""

import dataclasses
import re
import sys
from pathlib import Path

import pytest

import phi3_jax
from phi3_jax.train.programs.recipe import read_recipe
from phi3_jax.train.programs.settings_help import TOPICS, descriptions, settings_help
from phi3_jax.train.settings import Settings

ROOT = Path(phi3_jax.__file__).parent.parent
IMPORT = "from phi3_jax.train.settings import Settings\n"


def test_a_file_anywhere_is_a_recipe(tmp_path, monkeypatch):
    """It imports what lies beside it, and is read anew each time."""
    folder, path = tmp_path / "my recipes", sys.path[:]
    folder.mkdir()
    monkeypatch.chdir(tmp_path)
    (folder / "common_of_mine.py").write_text("STEPS = 30\n")
    mine = folder / "my-recipe.py"
    for lr in ("1e-3", "2e-3"):
        mine.write_text(
            "from __future__ import annotations\nimport dataclasses\nfrom common_of_mine import STEPS\n"
            f"{IMPORT}@dataclasses.dataclass\nclass Mine:\n    lr: float\n"
            f"SETTINGS = Settings(steps=STEPS, lr=Mine({lr}).lr)\n"
        )
        for name in (str(mine), "my recipes/my-recipe.py", "./my recipes/../my recipes/my-recipe.py"):
            assert read_recipe(name) == Settings(steps=30, lr=float(lr))
    monkeypatch.chdir(folder)
    assert read_recipe("my-recipe.py").lr == 2e-3
    assert sys.path == path
    assert [each.name for each in folder.iterdir() if "my-recipe" in each.name] == ["my-recipe.py"]


@pytest.mark.parametrize("name", ["lora_demo", "full_tiny", "lora_phi3_mini", "qlora_phi4"])
def test_a_copy_of_a_published_recipe_is_one(name, tmp_path):
    (tmp_path / "copy.py").write_bytes((ROOT / "train" / "recipes" / f"{name}.py").read_bytes())
    assert read_recipe(str(tmp_path / "copy.py")) == read_recipe(f"phi3_jax.train.recipes.{name}")


def test_a_module_here_is_a_recipe(tmp_path, monkeypatch):
    (tmp_path / "recipes_of_mine").mkdir()
    (tmp_path / "recipes_of_mine" / "first.py").write_text(f"{IMPORT}SETTINGS = Settings(steps=3)\n")
    monkeypatch.chdir(tmp_path)
    assert read_recipe("recipes_of_mine.first").steps == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"it has no SETTINGS; write from phi3_jax\.train\.settings import Settings; SETTINGS = Settings\("),
        (f"{IMPORT}settings = Settings()\n", r"it has no SETTINGS; it has settings; write"),
        ("SETTINGS = {'lr': 1}\n", r"its SETTINGS are of type dict; write"),
        ("a = 1\nb = (\n", r"mine\.py, line 2: '\(' was never closed$"),
        (f"{IMPORT}\nSETTINGS = Settings(lern_rate=1)\n", r"line 3: there is no setting lern_rate$"),
        (f"{IMPORT}SETTINGS = Settings(learning_rate=1)\n", r"there is no setting learning_rate; did you mean lr\?$"),
        (f"{IMPORT}SETTINGS = Settings(\n    lr='1e-4')\n", r"mine\.py, line 2: lr='1e-4': must be a number"),
        ("from ..settings import Settings\n", r"line 1: attempted relative import .*; write from phi3_jax\.train\."),
        ("import no_such_thing\n", r"mine\.py, line 1: No module named 'no_such_thing'$"),
        ("\n\n1 / 0\n", r"mine\.py, line 3: ZeroDivisionError: division by zero$"),
        ("open('/no/file')\n", r"line 1: FileNotFoundError: "),
        ("\0", r"null byte"),
    ],
)
def test_a_recipe_that_cannot_be_used(text, message, tmp_path):
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        read_recipe(str(tmp_path / "mine.py"))
    assert str(caught.value).startswith(f"--recipe {tmp_path}/mine.py: ")
    assert "\n" not in str(caught.value)


def test_a_recipe_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken_recipe.py").write_text("import no_such_thing\n")
    for name, message in (
        ("mine.py", r"--recipe mine\.py: no such file; name a Python file, or a module with dots between"),
        ("recipes/mine", r"--recipe recipes/mine: no such file"),
        (".", r"--recipe \.: "),
        ("no.where", r"--recipe no\.where: there is no module no; name one that is here or installed, or a file that"),
        ("phi3_jax.train.recipes.lora_dmo", r"recipes\.lora_dmo; name one .*did you mean phi3_.*recipes\.lora_demo\?$"),
        ("lora_demo", r"there is no module lora_demo; name one .*; did you mean phi3_jax\.train\.recipes\.lora_demo\?"),
        ("broken_recipe", r"broken_recipe\.py, line 1: No module named 'no_such_thing'"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            read_recipe(name)


# ---------------------------------------------------------------------------------------------------------- the lists


def test_help_lists_each_setting_once_with_type_default_and_sentence():
    names = [field.name for field in dataclasses.fields(Settings)]
    assert sorted(name for topic in TOPICS.values() for name in topic) == sorted(names)
    assert descriptions().keys() == set(names)
    assert all(text.endswith(".") and len(text) > 10 for text in descriptions().values())
    lines = settings_help().splitlines()
    assert max(map(len, lines)) <= 96
    for line in (
        "  train=all|lora (lora)",
        "  lora_targets=TEXT,... (qkv_proj,o_proj,gate_up_proj,down_proj)",
        "  lr=X (0.0001)",
        "  pack=true|false (true)",
        "  mixture=X,...",
        "  train_file=TEXT,...",
        "  batch_size=N|auto (auto)",
    ):
        assert line in lines
    assert lines[lines.index("  sequence_length=N (512)") + 1] == "      Tokens of a row."


def test_the_guide_lists_the_same_topics():
    table = re.findall(r"^\| ([^|]+) \| (`.*`[^|]*) \|$", (ROOT / "train" / "README.md").read_text(), re.MULTILINE)
    listed = {topic: tuple(re.findall(r"`(\w+)`", fields)) for topic, fields in table if topic in TOPICS}
    assert listed == TOPICS

import re
import typing
from pathlib import Path

import pytest

import phi3_jax
from phi3_jax.train import values
from phi3_jax.train.settings import Settings

ROOT = Path(phi3_jax.__file__).parent.parent
FOLDERS = ("phi3_jax", "infer", "train")


@pytest.mark.slow
def test_the_python_of_the_readme_runs_as_printed(demo, capsys):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 6
    names: dict = {}
    for block in blocks:
        exec(block, names)
    assert "Paris" in capsys.readouterr().out
    assert names["seen"]["attn.pattern"].shape == (30, 1, 9, 2, 2)
    assert [call.name for call in names["reply"].calls][:1] == ["weather"]
    assert names["cache"].lengths.tolist() == [2]


def test_the_files_that_the_documents_name_exist():
    guides = ("train", "phi3_jax/kernels", "phi3_jax/inspection", "infer/inspection", "infer/serving")
    for document in ("README.md", "CONTRIBUTING.md", *(f"{folder}/README.md" for folder in guides)):
        path = ROOT / document
        for name in re.findall(r"\]\(([\w/.]+)\)", path.read_text()):
            assert (path.parent / name).exists(), (document, name)


def test_the_guides_write_settings_as_they_are():
    hints = typing.get_type_hints(Settings)
    for document in ("README.md", "train/README.md"):
        _, _, text = (ROOT / document).read_text().partition("Fine-tun")
        found = re.findall(r"(?:--set |`)([a-z]\w+)=([^\s`]+)", text.partition("## From Python")[0])
        assert len(found) > 2
        for name, value in (each for each in found if each != ("name", "value")):
            values.check(name, values.parse(name, value, hints[name]), hints[name])


def test_the_modules_that_comments_name_exist():
    """A name may leave out the folders above the room that it is in."""
    known = {path.name for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")}
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*.py"):
            for name in re.findall(r"(?<![\w/.\"])((?:\w+/)*\w+\.py)\b", path.read_text(encoding="utf-8")):
                where = [(above / name).exists() for above in (ROOT, *path.parents)]
                assert any(where) or ("/" not in name and name in known), (path, name)

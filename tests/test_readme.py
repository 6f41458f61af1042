import re
from pathlib import Path

import pytest

import phi3_jax

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
    assert names["seen"]["attention"].shape == (30, 1, 9, 2, 2)
    assert [call.name for call in names["reply"].calls][:1] == ["weather"]
    assert names["cache"].lengths.tolist() == [2]


def test_the_files_that_the_documents_name_exist():
    for document in ("README.md", "CONTRIBUTING.md"):
        for name in re.findall(r"\]\(([\w/.]+)\)", (ROOT / document).read_text()):
            assert (ROOT / name).exists(), (document, name)


def test_the_modules_that_comments_name_exist():
    """A name may leave out the folders above the room that it is in."""
    known = {path.name for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")}
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*.py"):
            for name in re.findall(r"(?<![\w/.\"])((?:\w+/)*\w+\.py)\b", path.read_text(encoding="utf-8")):
                where = [(above / name).exists() for above in (ROOT, *path.parents)]
                assert any(where) or ("/" not in name and name in known), (path, name)

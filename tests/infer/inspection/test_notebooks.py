import functools
import re
import runpy
from pathlib import Path

import numpy as np
import pytest

import phi3_jax

FOLDER = Path(phi3_jax.__file__).parent.parent / "infer" / "inspection" / "notebooks"
GUIDE = FOLDER.parent / "README.md"
NOTEBOOKS = sorted(FOLDER.glob("*.py"))
PICTURES = {
    "first_walk": ["attention", "lens", "next"],
    "heads_that_copy": ["heads", "silenced", "surprise"],
    "patching": ["patching", "patching_heads"],
    "steering": ["steering"],
    "what_int4_does": ["int4"],
}


@pytest.fixture(scope="module")
def load(demo):
    """`phi3_jax.load`, which loads the same model once."""
    load = phi3_jax.load
    return functools.cache(lambda name, **options: demo if (name, options) == ("demo", {}) else load(name, **options))


@pytest.mark.slow
@pytest.mark.parametrize("name", PICTURES)
def test_a_notebook_runs_from_top_to_bottom_and_draws(name, load, monkeypatch, capsys):
    """They check what they say themselves."""
    pytest.importorskip("matplotlib").use("agg")
    import matplotlib.pyplot as plt

    monkeypatch.delenv("DISPLAY", raising=False)  # a figure that cannot be shown is none to warn of
    monkeypatch.setattr(phi3_jax, "load", load)
    try:
        runpy.run_path(str(FOLDER / f"{name}.py"))
        assert sorted(plt.get_figlabels()) == PICTURES[name]
    finally:
        plt.close("all")
    assert len(capsys.readouterr().out.splitlines()) > 5


def test_a_notebook_is_text_and_code_in_turn_and_claims_what_it_asserts():
    assert [path.stem for path in NOTEBOOKS] == sorted(PICTURES)
    for path in NOTEBOOKS:
        cells = re.split(r"^# %%", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
        assert cells[0] == "", path  # jupytext would make a cell without a title of what stands before
        assert cells[1].startswith(" [markdown]\n# # "), path
        code = [cell for cell in cells[1:] if not cell.startswith(" [markdown]\n")]
        assert sum("assert" in cell for cell in code) > 3, path
        for cell in cells[1:]:
            assert len(cell.splitlines()) < 40, (path, cell)


@pytest.mark.slow
def test_the_python_of_the_guide_runs_as_printed(load, monkeypatch, capsys):
    monkeypatch.setattr(phi3_jax, "load", load)
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL):
        exec(block, names)
    assert capsys.readouterr().out.startswith(" Paris  Rome\n Rome")
    assert names["seen"]["resid_post"].shape == (30, 1, 5, 576)
    assert 0.85 < names["seen"]["attn.pattern"][23, 0, 4, -1, 3] < 0.95
    places = names["lens"]["resid_post"].target_rank[:, 0, 0]
    assert (places[-1], places[0] > 1000) == (0, True)
    heads = np.asarray(names["parts"].heads)[:, 0, 0]
    assert divmod(int(heads.argmax()), heads.shape[1]) == (23, 4)
    heat, layers = np.asarray(names["heat"]) > 0, np.arange(30)
    assert (heat == np.stack([layers < 0, layers < 0, layers < 0, layers < 23, layers >= 23], axis=1)).all()
    assert names["scores"].induction[18, 6] > 0.5


def test_the_guide_shows_the_pictures_that_there_are_and_they_are_small():
    shown = re.findall(r"!\[.+\]\(pictures/(\w+\.png)\)", GUIDE.read_text())
    pictures = sorted((GUIDE.parent / "pictures").iterdir())
    assert sorted(shown) == [path.name for path in pictures]
    for path in pictures:
        data = path.read_bytes()
        assert data.startswith(b"\x89PNG"), path
        assert len(data) < 150_000, path


def test_the_guide_knows_every_point():
    text = GUIDE.read_text()
    untold = {name for name in phi3_jax.inspection.POINTS if f"`{name}`" not in text}
    assert untold == {"ln2.scale", "ln2.normalized", "ln2.out"}  # `ln2.*`
    for name in re.findall(r"`(?:inspection\.)?(\w+)\(config", text):
        assert callable(getattr(phi3_jax.inspection, name)), name
    analyses = text.partition("### Analyse")[2].partition("## The notebooks")[0]
    rows = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \|", analyses, re.MULTILINE)
    assert len(rows) > 9
    for name in re.findall(r"\w+", " ".join(rows)):
        assert callable(getattr(phi3_jax.inspection, name)), name

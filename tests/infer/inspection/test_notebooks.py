import functools
import re
import runpy
from pathlib import Path

import pytest

import phi3_jax

FOLDER = Path(phi3_jax.__file__).parent.parent / "infer" / "inspection" / "notebooks"
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

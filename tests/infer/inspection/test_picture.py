import copy
import sys

import numpy as np
import pytest
from inspection_reports import random_report
from matplotlib.image import imread

from phi3_jax.infer.inspection.picture import first_head, save_png, shown


@pytest.fixture(scope="module")
def report():
    return random_report(length=5)


@pytest.mark.slow
def test_the_picture_is_drawn_with_whatever_the_texts_say_and_shows_the_numbers(report, tmp_path):
    save_png(report, tmp_path / "a.png")
    drawn = imread(tmp_path / "a.png")
    assert drawn.shape == (1140, 1950, 4)
    other = copy.deepcopy(report)
    layer, head = first_head(report)
    other["attention"]["thousandths"][layer][head][4] = [0, 0, 0, 0, 1000]
    save_png(other, tmp_path / "b.png")
    different = np.argwhere((imread(tmp_path / "b.png") != drawn).any(axis=-1))
    assert len(different)
    (top, left), (bottom, right) = different.min(axis=0), different.max(axis=0)
    assert bottom < 600  # only the last row of the triangle, at the left
    assert right < 975
    assert bottom - top < 100
    assert left > 100


def test_a_picture_of_a_bare_report_has_empty_places(report, tmp_path):
    save_png(
        {key: report[key] for key in ("format", "version", "model", "prompt", "tokens", "vocabulary")},
        tmp_path / "a.png",
    )
    assert imread(tmp_path / "a.png").min() < 0.3  # its title


def test_the_answer_has_a_place_behind_however_long_tokens(tmp_path):
    names = ("format", "version", "model", "prompt", "tokens", "vocabulary", "next")
    report = {key: value for key, value in random_report(16, texts=(" characterise",) * 2).items() if key in names}
    save_png(report, tmp_path / "a.png")
    line = imread(tmp_path / "a.png")[140:175]
    blue = np.argwhere((np.abs(line[..., :3] - np.array([0x1F, 0x5F, 0xA8]) / 255) < 0.02).all(axis=-1))[:, 1]
    assert blue.min() > 975
    assert blue.max() < 1930


def test_the_first_head_is_the_one_that_said_most(report):
    heads = np.array(report["attribution"]["heads"])
    assert first_head(report) == np.unravel_index(heads.argmax(), heads.shape)
    assert first_head({}) == (0, 0)
    assert first_head({"attribution": {"heads": [[None, -2.0], [-1.0, None]]}}) == (1, 0)


def test_texts_are_shown_on_one_line():
    assert [shown(text) for text in (" France", "a ", "  ", "", "a\n\tb", "\u202ex", " characterisation")] == [
        "·France", "a·", "··", "∅", "a↵⇥b", "U+202Ex", "·characteri…",
    ]  # fmt: skip


def test_without_matplotlib_the_remedy_is_named(report, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'phi3_jax\[plot\]'"):
        save_png(report, tmp_path / "a.png")

"""The page in Chromium, driven by scripts that are appended to its own; what has become of it is read as text."""

import base64
import copy
import importlib
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from browser import browse
from inspection_reports import random_report

from phi3_jax.infer.sampling import Sampling, SamplingArrays
from phi3_jax.infer.sampling.pick import process

OPTIONAL = (
    "embedding", "attention", "residual", "lens", "heads", "rollout", "attribution", "surprise", "entropy", "next",
    "generation", "comparison", "code",
)  # fmt: skip

page = importlib.import_module("phi3_jax.infer.inspection.html")  # the package has a function of this name


@pytest.fixture(scope="module")
def report():
    return random_report()


# Sliders, by the places of their steps: temperature, top-p and min-p in hundredths, top-k the sixth step.
PLACES = [
    {"temperature": 70, "topK": 5, "topP": 99, "minP": 0},
    {"temperature": 150, "topK": 0, "topP": 69, "minP": 40},
]
MEANT = [(0.7, 5, 1.0, 0.0), (1.5, 0, 0.7, 0.4)]
SAID = [["0.70", "5", "1.00, off", "0.00, off"], ["1.50", "off", "0.70", "0.40"]]

# Every token, layer, head and way to look is shown in turn; what has stood there is written down.
DRIVE = """
const BUTTONS = [".choices button:not(.main)", "#generation .line button, .layers button"]; // choices make some
const seen = {}, words = {}, stops = [];
function countStops() {
  for (const group of document.querySelectorAll(".line, .heads, table.layers")) {
    const all = [...group.querySelectorAll("button:not([tabindex='-1'])")];
    stops.push(all.filter((button) => button.getClientRects().length).length);
  }
}
countStops();
const unsaid = document.querySelectorAll(".choices[role=group] button:not([aria-pressed])").length;
function note() {
  for (const e of document.querySelectorAll("[data-path]")) {
    const text = e.matches(".num, text") ? e.textContent : (e.getAttribute("aria-label") ?? e.textContent);
    (seen[e.dataset.path] ??= {})[text] = e.dataset.unit ?? 1;
  }
  for (const e of document.querySelectorAll("[data-looked]")) (seen[e.dataset.looked] ??= {})[e.title] = 1000;
}
note();
for (const some of BUTTONS)
  for (const button of document.querySelectorAll(some)) {
    button.focus?.();
    button.click?.();
    note();
  }
for (let token = 0; token < report.tokens.length; token++)
  for (let layer = 0; layer < report.model.layers; layer++)
    for (let head = 0; head < report.model.heads; head++) { choose({ token, layer, head }); note(); }
document.querySelector(".choices .main")?.click();
for (const e of document.querySelectorAll("[data-lens]"))
  words[e.dataset.lens] = [e.querySelector("bdi").dataset.id, e.style.getPropertyValue("--p"), e.textContent];
document.querySelector("#lens .choices button")?.click();
document.querySelector("#attention .choices button")?.click();
const pattern = document.querySelector("#attention .heads button")?.title;
const keys = [], moved = [];
function focused() { // a window that has not the focus sends no events of it
  if (document.hasFocus()) return;
  document.activeElement.dispatchEvent(new FocusEvent("focus"));
  document.activeElement.dispatchEvent(new FocusEvent("focusin", { bubbles: true }));
}
const PRESSES = [
  [".line", 1, "ArrowRight"], [".heads", 2, "ArrowDown"], [".heads", 2, "End"], ["#lens table", 1, "ArrowDown"],
];
for (const [group, first, key] of PRESSES) {
  const button = document.querySelector(group)?.querySelectorAll("button")[first];
  button?.focus();
  focused();
  button?.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
  focused();
  keys.push({ ...chosen });
}
countStops();
const live = [...document.querySelectorAll("main [aria-live=polite]")].map((each) => each.closest("section").id);
for (const places of report.next ? PLACES : []) {
  for (const slider of document.querySelectorAll(".sliders input")) {
    slider.value = places[slider.id.split("-")[0]];
    slider.dispatchEvent(new Event("input"));
  }
  const outputs = [...document.querySelectorAll(".sliders output")].map((each) => each.textContent);
  moved.push([outputs, [...document.querySelectorAll("td.live")].map((cell) => cell.textContent)]);
}
const record = { seen, words, keys, stops, moved, unsaid, pattern, live };
document.body.append(el("pre", { id: "seen" }, JSON.stringify(record)));
"""


def driven(report, monkeypatch) -> str:
    original = page.text_of
    monkeypatch.setattr(
        page,
        "text_of",
        lambda name: original(name) + (DRIVE.replace("PLACES", json.dumps(PLACES)) if name == "page.js" else ""),
    )
    return page.html(report)


def check_number(shown: str, value: float | None, where: str) -> None:
    """The last word of what is shown is the value, rounded."""
    text = shown.split(" ")[-1].replace(",", "").replace("−", "-")
    if value is None:
        assert text == "–", where
        return
    if not text:  # a triangle has no room for zeros
        assert value < 0.005, where
        return
    mantissa, _, exponent = text.partition("e")
    ulp = 10.0 ** (int(exponent or 0) - len(mantissa.partition(".")[2]))
    assert abs(float(text) - value) <= 0.5001 * ulp, (where, shown, value)


@pytest.mark.slow
def test_every_number_on_the_page_is_that_of_the_report(report, monkeypatch, tmp_path):
    elements, console = browse(driven(report, monkeypatch), tmp_path)
    assert console == ""
    ((_, _, problems),) = elements.all(id="problems")
    assert problems == ""
    ((_, _, text),) = elements.all(id="seen")
    record = json.loads(text)
    for path, texts in record["seen"].items():
        value = report
        for key in path.split("."):
            value = value[int(key) if isinstance(value, list) else key]
        for shown, unit in texts.items():
            check_number(shown, None if value is None else value / float(unit), path)
    # Left out are ids, which stand there as words, and what has no number of its own on the page.
    ids = r"(\bid|(nearest\.\d+|lens\.\w+\.\d+\.\d+|top|runners)\.\d+\.0)$"
    words = r"version|model\.window|next\.sampling|generation\.(temperature|seed)|comparison\.note|code\."
    words += r"|tokens\.\d+\.bytes|residual\.mid"
    numbers = {path for path, value in leaves(report) if not isinstance(value, str | bool)}
    tokens = {f"tokens.{t}.id" for t in range(len(report["tokens"]))}
    expected = {path for path in numbers if not re.search(ids, path) and not re.match(words, path)} | tokens
    assert set(record["seen"]) == expected
    for kind in ("mid", "post"):
        for layer, rows in enumerate(report["lens"][kind]):
            for t, [[token, probability], *_] in enumerate(rows):
                shown_id, share, word = record["words"][f"{kind}.{layer}.{t}"]
                assert (int(shown_id), float(share)) == (token, pytest.approx(probability, abs=5.1e-5))
                assert not re.search(r"[\x00-\x1f\u202e\u2066\u2028]", word)
    check_dots(report, [attributes for tag, attributes, _ in elements.all(cx=None) if tag == "circle"])
    cells = [(attributes, text) for tag, attributes, text in elements.all(style=None) if tag == "rect" and text]
    assert len(cells) == 22
    for attributes, text in cells:  # the darker, the more
        share = float(re.search(r"--p: ([\d.]+)", attributes["style"])[1])
        check_number(text, round(share**2, 3), text)
    outside = [attributes for tag, attributes, _ in elements.all() if attributes.get("class") == "cell outside"]
    assert len(outside) == sum(t - k >= 4 for t in range(7) for k in range(t + 1))  # the window is 4
    assert record["keys"] == [
        {"token": 2, "layer": 2, "head": 4},  # where the loop above has ended
        {"token": 2, "layer": 1, "head": 2},
        {"token": 2, "layer": 2, "head": 4},
        {"token": 1, "layer": 2, "head": 4},
    ]
    assert set(record["stops"]) == {1}  # Tab goes on to the next group
    assert set(record["live"]) == {"lens"}  # of the parts that follow, a screen reader reads only where the focus is
    assert record["unsaid"] == 0
    assert record["pattern"] == "layer 0, head 0"
    for meant, said, (outputs, texts) in zip(MEANT, SAID, record["moved"], strict=True):
        assert outputs == said
        expected = reshaped(report, *meant)
        for (token, *_), text in zip(report["next"]["top"], texts, strict=True):
            if expected[token] == 0:
                assert text == "out", meant
            else:
                check_number(text, expected[token], str(meant))
    (link,) = [attributes["href"] for _, attributes, text in elements.all(href=None) if "tokenizer.py:110" in text]
    assert link.startswith("file:")


def check_dots(report, dots: list[dict[str, str]]) -> None:
    """Each dot is at its layer, and at the logarithm of its number."""
    assert len(dots) == 3 * report["model"]["layers"] + 1
    rows = []
    for dot in dots:
        key, *layer, t = dot["data-path"].split(".")[1:]
        values = report["residual"][key]
        value = values[int(layer[0])][int(t)] if layer else values[int(t)]
        rows.append((int(layer[0]) if layer else -1, np.log10(value), float(dot["cx"]), float(dot["cy"])))
    layer, size, x, y = np.array(rows).T
    for number, place, sign in ((layer, x, 1), (size, y, -1)):
        slope, start = np.polyfit(number, place, 1)
        assert slope * sign > 0
        np.testing.assert_allclose(slope * number + start, place, atol=0.1)


def reshaped(report, temperature: float, top_k: int, top_p: float, min_p: float) -> np.ndarray:
    """The probabilities of drawing each token, by sorting; there are no ties."""
    logits = np.frombuffer(base64.b64decode(report["next"]["logits"]), "<f4").astype(np.float64) / temperature
    weights = np.exp(logits - logits.max())
    order = np.argsort(-weights)
    if top_k:
        weights[order[top_k:]] = 0
    before = np.cumsum(weights[order] / weights.sum()) - weights[order] / weights.sum()
    weights[order[before >= top_p]] = 0
    weights[weights < min_p * weights.max()] = 0
    return weights / weights.sum()


def leaves(value, path=""):
    """(path, number or string) of all that a report holds."""
    if isinstance(value, dict | list):
        for key, each in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(each, f"{path}.{key}" if path else str(key))
    else:
        yield path, value


@pytest.mark.slow
def test_sections_that_a_report_has_not_are_left_out(report, monkeypatch, tmp_path):
    bare = copy.deepcopy({key: value for key, value in report.items() if key not in OPTIONAL})
    elements, console = browse(driven(bare, monkeypatch), tmp_path)
    assert console == ""
    assert [text for _, _, text in elements.all(id="problems")] == [""]
    assert {attributes["id"] for tag, attributes, _ in elements.all(id=None) if tag == "section"} == {
        "tokens",
        "parameters",
    }


@pytest.mark.slow
def test_a_text_of_one_token_and_sections_that_lack_a_part(monkeypatch, tmp_path):
    report = random_report(length=1, window=None)
    report["heads"] = {name: [[None] * 5] * 3 for name in report["heads"]}  # there is no token before the only one
    report["attribution"]["heads"] = report["heads"]["self"]
    for key in ("rollout", "entropy", "residual", "code"):
        del report[key]
    del report["generation"]["sampled"]
    report["generation"]["texts"] = {"greedy": "<i>\U0001f9ed</i>"}
    report["comparison"] |= {"layers": [], "note": "<b>models of other sizes</b>", "parted": None}
    elements, console = browse(driven(report, monkeypatch), tmp_path)
    assert console == ""
    assert [text for _, _, text in elements.all(id="problems")] == [""]
    sections = {attributes["id"]: text for tag, attributes, text in elements.all(id=None) if tag == "section"}
    assert "residual" not in sections
    assert "<b>models of other sizes</b>" in sections["comparison"]
    assert "By chance" not in sections["generation"]
    assert "<i>\U0001f9ed</i>" in sections["generation"]
    assert "no sliding window" in sections["attention"]


SETTINGS = [
    {},
    {"temperature": 0.0, "top_k": 3, "min_p": 0.5},
    {"temperature": 0.3},
    {"temperature": 2.7},
    {"top_k": 1},
    {"top_k": 17},
    {"top_k": 1000},
    {"top_p": 0.01},
    {"top_p": 0.5},
    {"top_p": 0.9},
    {"top_p": 0.997},
    {"min_p": 0.02},
    {"min_p": 1.0},
    {"temperature": 0.7, "top_k": 50, "top_p": 0.9},
    {"temperature": 1.3, "top_k": 200, "top_p": 0.8, "min_p": 0.05},
    {"temperature": 1.7, "top_p": 0.6, "min_p": 0.3},
]
DRAWS = np.linspace(0, 0.999, 23).tolist()
RUN = """
const [rows, settings, draws] = CASES;
const results = rows.map((row) => settings.map((each) => {
  const logits = decodeLogits(row), chances = chancesOf(logits, each), left = shapeLogits(logits, each);
  const kept = Array.from(left, (x) => x > -Infinity ? 1 : 0).join("");
  return { kept, chances: [...chances], draws: draws.map((u) => draw(chances, u)) };
}));
const ends = keepTopP(Float32Array.of(NaN, 1), 0.5).length;
document.body.textContent = JSON.stringify([ends, ...results]);
"""


@pytest.mark.slow
def test_the_sliders_compute_what_the_sampler_computes(tmp_path, quick_compilation):
    """Kept tokens and probabilities, with ties (of which top-p keeps some) and without."""
    rng = np.random.default_rng(3)
    V = 1031
    logits = (2.5 * rng.normal(size=(2, V))).astype("<f4")
    logits[1] = np.round(4 * logits[1]) / 4
    cases = [{"temperature": 1.0, "top_k": None, "top_p": None, "min_p": None} | each for each in SETTINGS]
    in_page = [
        {"temperature": c["temperature"], "topK": c["top_k"] or 0, "topP": c["top_p"] or 1, "minP": c["min_p"] or 0}
        for c in cases
    ]
    encoded = [base64.b64encode(row.tobytes()).decode() for row in logits]
    script = page.text_of("sampler.js") + RUN.replace("CASES", json.dumps([encoded, in_page, DRAWS]))
    elements, console = browse(f"<!doctype html><body><script>{script}</script></body>", tmp_path)
    assert console == ""
    ((_, _, text),) = [each for each in elements.all() if each[0] == "body"]
    ends, *results = json.loads(text)
    assert ends == 2

    params = SamplingArrays.of([Sampling(**case) for case in cases], V)
    ones = jnp.ones(len(cases), jnp.int32)
    run = jax.jit(lambda logits: process(logits, params, ones[:, None], ones, ones, jnp.zeros(1, jnp.int32)))
    for row, found in zip(logits, results, strict=True):
        left = np.asarray(run(jnp.tile(row, (len(cases), 1))), np.float64)
        for case, ours, theirs in zip(cases, left, found, strict=True):
            np.testing.assert_array_equal(list(map(int, theirs["kept"])), np.isfinite(ours), err_msg=str(case))
            if case["temperature"] == 0:
                expected = np.eye(V)[row.argmax()]
            else:
                expected = np.exp(ours - ours.max()) / np.exp(ours - ours.max()).sum()
            np.testing.assert_allclose(theirs["chances"], expected, rtol=1e-5, atol=1e-9, err_msg=str(case))
            edges = np.cumsum(expected)
            for uniform, drawn in zip(DRAWS, theirs["draws"], strict=True):
                if np.abs(edges - uniform).min() > 1e-6:
                    assert drawn == np.searchsorted(edges, uniform), (case, uniform)

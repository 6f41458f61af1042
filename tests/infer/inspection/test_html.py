import base64
import hashlib
import importlib
import json
import re
from pathlib import Path
from urllib.parse import unquote, urlparse

import pytest
from browser import Elements
from inspection_reports import HOSTILE, random_report

page = importlib.import_module("phi3_jax.infer.inspection.html")  # the package has a function of this name


@pytest.fixture(scope="module")
def report():
    return random_report()


def test_no_text_of_a_report_becomes_an_element_or_runs(report):
    elements = Elements(page.html(report))
    plain = Elements(page.html(random_report(texts=("a",) * len(HOSTILE))))
    assert [(tag, attributes.keys()) for tag, attributes, _ in elements.found] == [
        (tag, attributes.keys()) for tag, attributes, _ in plain.found
    ]
    ((_, _, embedded),) = elements.all(id="report")
    assert json.loads(embedded) == report
    assert not re.search("[<>&]", embedded)
    assert embedded.isascii()


def test_the_policy_allows_the_page_s_own_script_and_style_and_no_connection(report):
    text = page.html(report)
    ((_, attributes, _),) = Elements(text).all(http_equiv="Content-Security-Policy")
    policy = dict(rule.split(" ", 1) for rule in attributes["content"].split("; "))
    assert policy["default-src"] == "'none'"
    assert policy["base-uri"] == policy["form-action"] == "'none'"
    (style,), (script,) = (
        re.findall(r"<style>(.*?)</style>", text, re.S),
        re.findall(r"<script>(.*?)</script>", text, re.S),
    )
    for rule, content in (("style-src", style), ("script-src", script)):
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert policy[rule] == f"'sha256-{digest}'"
    assert set(re.findall(r"https?://[^\s\"'<]+", text)) == {"http://www.w3.org/2000/svg"}  # a name, not an address
    assert not re.search(r"innerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function", script)


def test_links_lead_to_the_installed_files(report):
    ((_, _, text),) = Elements(page.html(report)).all(id="links")
    links = json.loads(text)
    assert links.keys() == {"tokens", "next"}  # there is no phi3_jax/nowhere.py
    for key, start in (("tokens", "    def encode("), ("next", "def pick(")):
        place, (path, words) = report["code"][key], links[key].split("#:~:text=")
        file = Path(unquote(urlparse(path).path))
        assert file.name == Path(place["module"]).name
        assert unquote(words) == start.strip()
    assert "-" not in links["tokens"].split("=")[1]  # as in `->`: it would mean something there


def test_other_formats_and_numbers_that_json_has_not_are_refused(report):
    with pytest.raises(ValueError, match=r"version 2.*make it anew"):
        page.html(report | {"version": 2})
    with pytest.raises(ValueError, match="not JSON compliant"):
        page.html(report | {"rollout": [float("nan")]})


def test_a_page_of_32_tokens_of_the_largest_models_has_less_than_3_mb():
    report = random_report(32, 2, 2, 32064, window=2047, steps=20)
    report["vocabulary"] = {str(i): " characters" for i in range(32 * 32 * 6)}  # if no guess of the lens came twice
    report["attention"]["thousandths"] = [[report["attention"]["thousandths"][0][0]] * 32] * 32  # Phi-3-mini's
    assert len(page.html(report)) < 3e6

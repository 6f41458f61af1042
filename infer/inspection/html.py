"""A report as one HTML file that opens from disk: the texts, the style and the script of page/, and the report in it.

The page fetches nothing, and nothing in it can run but its own script: a Content-Security-Policy forbids all
connections, and names the script and the style by their SHA-256. The report is JSON in which `<`, `>` and `&` are
escaped, so that no text of a prompt or a vocabulary can end the element that holds it.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import quote

import phi3_jax

# In the order in which they are read and run. All of them are one script: names are shared.
SCRIPTS = ("sampler.js", "parts.js", "words.js", "attention.js", "layers.js", "answer.js", "page.js")
_ESCAPES = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026"}


def html(report: dict[str, Any]) -> str:
    """The page of a report (report.py describes it); sections that it lacks are left out.

    Raises:
      ValueError: it is of another format or version; or it has numbers that are not finite, which JSON has not.
    """
    if (report.get("format"), report.get("version")) != ("phi3-inspect", 1):
        found = f"format {report.get('format')!r}, version {report.get('version')!r}"
        raise ValueError(
            f"this is no report of phi3-inspect, version 1, but has {found}: make it anew with phi3-inspect"
        )
    style = text_of("page.css")
    script = "\n".join(text_of(name) for name in SCRIPTS)
    parts = {
        "policy": f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(style)}; base-uri 'none'; "
        "form-action 'none'",
        "style": style,
        "script": script,
        "report": embedded(report),
        "links": embedded(_links(report.get("code", {}))),
    }
    # In one pass: what is put in is not looked at again.
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], text_of("template.html"))


def text_of(name: str) -> str:
    """One of the files of page/."""
    return (resources.files(__package__) / "page" / name).read_text(encoding="utf-8")


def embedded(value: Any) -> str:
    """JSON, in ASCII, that a `<script type="application/json">` can hold whatever the strings in it say.

    Raises:
      ValueError: a number is NaN or infinite.
    """
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return re.sub("[<>&]", lambda match: _ESCAPES[match[0]], text)


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _links(code: dict[str, dict[str, Any]]) -> dict[str, str]:
    """The address of each place in the code, as far as its file is on this machine."""
    links = {}
    for key, place in code.items():
        if path := _installed(place["module"]):
            # The browser goes to the text that follows `:~:text=`, in which a hyphen would mean something else.
            where = quote(_opening(path, place["line"], place["name"]), safe="").replace("-", "%2D")
            links[key] = f"{path.as_uri()}#:~:text={where}"
    return links


def _opening(path: Path, line: int, name: str) -> str:
    """The line in which a function or class begins: `line`, or one soon after it where decorators come first."""
    last = name.split(".")[-1]
    lines = path.read_text(encoding="utf-8").splitlines()[line - 1 : line + 9]
    return next((text.strip() for text in lines if last in text), last)


def _installed(module: str) -> Path | None:
    """The file of "phi3_jax/model/decoder.py" or "phi3_jax/infer/sampling/pick.py"; infer/ may lie beside phi3_jax/."""
    root = Path(phi3_jax.__file__).parent.parent
    for path in (root / module, root / module.removeprefix("phi3_jax/"), root / "phi3_jax" / module):
        if path.is_file():
            return path
    return None

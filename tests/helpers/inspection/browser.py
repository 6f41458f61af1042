"""A page as Chromium makes it, and HTML taken apart."""

import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest


class Elements(HTMLParser):
    """All elements of a text as (tag, attributes, text directly inside)."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.found: list[tuple[str, dict[str, str | None], list[str]]] = []
        self.open: list[tuple[str, dict[str, str | None], list[str]]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs), []))
        if tag not in ("meta", "br", "input", "link", "img"):
            self.open.append(self.found[-1])

    def handle_endtag(self, tag):
        while self.open and self.open.pop()[0] != tag:
            pass

    def handle_data(self, data):
        for element in self.open:
            element[2].append(data)

    def all(self, **wanted: str | None):
        """(attributes, text, all of it) of the elements with an attribute, of any value where it is None."""
        for tag, attributes, text in self.found:
            names = {name.replace("_", "-"): value for name, value in wanted.items()}
            if all(name in attributes and value in (None, attributes[name]) for name, value in names.items()):
                yield tag, attributes, "".join(text)


def browse(text: str, folder: Path) -> tuple[Elements, str]:
    """What Chromium makes of a page -> (its elements, what it said on its console)."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no chromium is installed")
    (folder / "page.html").write_text(text, encoding="utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}", "--dump-dom"]
    flags += ["--enable-logging=stderr", "--virtual-time-budget=20000", "--window-size=1400,2000"]
    done = subprocess.run([chromium, *flags, (folder / "page.html").as_uri()], capture_output=True, timeout=120)
    console = "\n".join(line for line in done.stderr.decode().splitlines() if "CONSOLE" in line)
    return Elements(done.stdout.decode()), console

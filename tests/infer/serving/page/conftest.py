"""One browser for all tests of the page, and for each a server that replays answers."""

from collections.abc import Iterator

import pytest
from chromium import Chromium
from recorded_server import Recorded


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    with Chromium(tmp_path_factory.mktemp("chromium")) as found:
        yield found


@pytest.fixture
def server() -> Iterator[Recorded]:
    with Recorded() as found:
        yield found
        found.shutdown()


@pytest.fixture
def page(browser: Chromium, server: Recorded) -> Iterator[Chromium]:
    """The page, ready. Whatever a test does with it, it stays with its server, and says nothing on the console."""
    browser.console.clear()
    browser.requests.clear()
    browser.open(server.url)
    browser.wait("document.querySelector('#model').textContent")
    yield browser
    assert all(url.startswith((server.url, "data:image/svg+xml,")) for url in browser.requests)
    assert browser.console == []

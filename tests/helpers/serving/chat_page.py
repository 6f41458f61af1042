"""What one does on the chat page, and sees there."""

from chromium import Chromium

IDLE = "!document.querySelector('#send').hidden"
LOG = "document.querySelector('#log').innerText"


def ask(page: Chromium, text: str) -> None:
    """Types and sends a message."""
    page.run("document.querySelector('#message').focus()")
    page.type(text)
    page.press("Enter")


def last(page: Chromium, selector: str) -> str | None:
    """The text of the last element that fits."""
    return page.run(f"[...document.querySelectorAll('{selector}')].at(-1)?.textContent")

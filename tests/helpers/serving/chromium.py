"""Chromium without a window, driven by its DevTools protocol through a pipe: https://chromedevtools.github.io."""

from __future__ import annotations

import base64
import json
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

FLAGS = "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-extensions"
FLAGS += " --disable-component-update --disable-sync --remote-debugging-pipe --hide-scrollbars"
NOWHERE = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"
KEYS = {"Enter": (13, "\r"), "Escape": (27, ""), "Tab": (9, "")}
SHIFT = 8


class Chromium:
    """One page. What it says on the console, and what it asks for on the network, is collected."""

    def __init__(self, folder: Path, size: tuple[int, int] = (1000, 800)):
        program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
        if program is None:
            pytest.skip("no chromium is installed")
        self.console: list[str] = []
        self.requests: list[str] = []
        self.last_id = 0
        self.session = ""
        self.rest = b""
        # The protocol is spoken through the descriptors 3 and 4: ours of standard input and output.
        pipes = ["sh", "-c", 'exec "$0" "$@" 3<&0 4>&1 </dev/null >/dev/null 2>&1', program]
        flags = [*FLAGS.split(), NOWHERE, f"--user-data-dir={folder / 'profile'}", f"--window-size={size[0]},{size[1]}"]
        self.process = subprocess.Popen([*pipes, *flags], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.send(f"{domain}.enable")

    def __enter__(self) -> Chromium:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        self.last_id += 1
        message = {"id": self.last_id, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        self.process.stdin.write(json.dumps(message).encode() + b"\0")
        self.process.stdin.flush()
        while (reply := self._next()).get("id") != self.last_id:
            pass
        assert "error" not in reply, (method, reply)
        return reply["result"]

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self.rest:
            assert select.select([self.process.stdout], [], [], 30)[0], "Chromium says nothing"
            read = self.process.stdout.read1(1 << 20)
            assert read, "Chromium has ended"
            self.rest += read
        text, self.rest = self.rest.split(b"\0", 1)
        message = json.loads(text)
        self._note(message.get("method"), message.get("params"))
        return message

    def _note(self, method: str | None, params: Any) -> None:
        if method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            self.console.append(str(params["exceptionDetails"]))
        elif method == "Runtime.consoleAPICalled":
            self.console.append(str(params["args"]))
        elif method == "Log.entryAdded":
            self.console.append(f"{params['entry']['text']} {params['entry'].get('url', '')}")

    def open(self, url: str) -> None:
        self.send("Page.navigate", url=url)
        self.wait("document.readyState === 'complete'")

    def run(self, script: str) -> Any:
        """The value of an expression, waited for if it is a promise."""
        done = self.send("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in done, done
        return done["result"].get("value")

    def wait(self, condition: str, seconds: float = 15) -> Any:
        """The value of an expression once it is true."""
        end = time.monotonic() + seconds
        while not (value := self.run(condition)):
            assert time.monotonic() < end, (condition, self.run("document.body.innerText"), self.console)
            time.sleep(0.02)
        return value

    def type(self, text: str) -> None:
        self.send("Input.insertText", text=text)

    def press(self, key: str, modifiers: int = 0) -> None:
        code, text = KEYS[key]
        common = {"key": key, "code": key, "windowsVirtualKeyCode": code, "modifiers": modifiers}
        self.send("Input.dispatchKeyEvent", type="keyDown", text=text, **common)
        self.send("Input.dispatchKeyEvent", type="keyUp", **common)

    def click(self, selector: str) -> None:
        """With the mouse, where the element is: it has to be seen, and not be covered."""
        box = f"document.querySelector({json.dumps(selector)}).getBoundingClientRect()"
        x, y = self.run(f"(() => {{ const b = {box}; return [b.x + b.width / 2, b.y + b.height / 2]; }})()")
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def shot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.send("Page.captureScreenshot")["data"]))

    def tree(self) -> list[tuple[str, str]]:
        """What a screen reader gets: (role, name) of everything that it does not ignore."""
        nodes = self.send("Accessibility.getFullAXTree")["nodes"]
        seen = [node for node in nodes if not node["ignored"]]
        return [(node["role"]["value"], node.get("name", {}).get("value", "")) for node in seen]

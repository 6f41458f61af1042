"""A server on this machine with just enough of the Hugging Face hub's HTTP interface to download from."""

import contextlib
import json
import re
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

COMMIT = "0" * 40


class Hub(BaseHTTPRequestHandler):
    """Answers for one repository, whose revisions are all the same.

    Attributes:
      repository: "models/owner/name" or "datasets/owner/name".
      folder: its files.
      asked: the paths that were asked for.
    """

    repository: str
    folder: Path
    asked: list[str]

    def do_GET(self):
        self.answer(body=True)

    def do_HEAD(self):
        self.answer(body=False)

    def answer(self, body: bool) -> None:
        self.asked.append(self.path)
        files = {str(path.relative_to(self.folder)): path for path in sorted(self.folder.rglob("*")) if path.is_file()}
        if re.match(rf"/api/{self.repository}($|/revision/(main|v2|refs%2Fpr%2F3)$|/tree/)", self.path):
            tree = [{"type": "file", "path": n, "size": f.stat().st_size, "oid": n} for n, f in files.items()]
            info = {"id": self.repository, "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]}
            content = json.dumps(tree if "/tree/" in self.path else info).encode()
        else:
            place = self.repository.removeprefix("models/")
            found = re.fullmatch(rf"/{place}/resolve/{COMMIT}/(.*)", self.path)
            if not found or found[1] not in files:
                self.send_error(404)
                return
            content = files[found[1]].read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{Path(self.path).name}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *args):
        pass


def forget_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes huggingface_hub read its settings again, which it does when it is imported."""
    for name in [name for name in sys.modules if name.split(".")[0] == "huggingface_hub"]:
        monkeypatch.delitem(sys.modules, name)


@contextlib.contextmanager
def serve(repository: str, folder: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    """Yields the handler of a hub that has this one repository; `home` is where downloads are kept."""
    handler = type("OneRepository", (Hub,), {"repository": repository, "folder": folder, "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    Thread(target=server.serve_forever, daemon=True).start()
    forget_hub(monkeypatch)
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_HOME", str(home))
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    yield handler
    server.shutdown()
    server.server_close()

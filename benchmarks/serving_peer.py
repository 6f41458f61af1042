"""OpenVINO GenAI's continuous batching behind /v1/completions, for benchmarks/serving.py.

    python benchmarks/serving_peer.py FILE.gguf PORT PREFIXES

It runs in a Python with openvino-genai, without phi3_jax, and takes only what the benchmark sends: prompts of token
ids, greedy, streamed. PREFIXES is 1 where shared beginnings of prompts are kept, else 0.
"""

from __future__ import annotations

import http.server
import json
import queue
import sys
import threading
import time
from typing import Any

import numpy as np
import openvino
import openvino_genai

_GIGABYTES = 2  # for keys and values


class Engine:
    """The pipeline, and a thread that steps it while there is something to do."""

    def __init__(self, file: str, keeps_prefixes: bool) -> None:
        """Loads the file."""
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.enable_prefix_caching = keeps_prefixes
        scheduler.cache_size = _GIGABYTES
        self._pipeline = openvino_genai.ContinuousBatchingPipeline(file, scheduler, "CPU")
        self.tokenizer = self._pipeline.get_tokenizer()
        self._lock, self._work, self._number = threading.Lock(), threading.Event(), 0
        self._handles: dict[int, tuple[Any, queue.SimpleQueue[list[int] | None]]] = {}
        threading.Thread(target=self._run, daemon=True).start()

    def submit(self, prompt: list[int], most: int) -> queue.SimpleQueue[list[int] | None]:
        """A queue of the answer's tokens as they come, and None at its end."""
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens, config.do_sample = most, False
        pieces: queue.SimpleQueue[list[int] | None] = queue.SimpleQueue()
        with self._lock:
            self._number += 1
            ids = openvino.Tensor(np.array([prompt], np.int64))
            self._handles[self._number] = (self._pipeline.add_request(self._number, ids, config), pieces)
        self._work.set()
        return pieces

    def _run(self) -> None:
        while True:
            self._work.wait()
            with self._lock:
                if self._pipeline.has_non_finished_requests():
                    self._pipeline.step()
                for number, (handle, pieces) in list(self._handles.items()):
                    while handle.can_read():
                        pieces.put([token for output in handle.read().values() for token in output.generated_ids])
                    if handle.get_status() != openvino_genai.GenerationStatus.RUNNING:
                        pieces.put(None)
                        del self._handles[number]
                if not self._handles:
                    self._work.clear()
            time.sleep(0)  # who submits gets the lock


class Handler(http.server.BaseHTTPRequestHandler):
    """Its two paths."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # an event that waits for an acknowledgement would count as the engine's time
    engine: Engine

    def do_GET(self) -> None:
        """Whether it is ready."""
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_POST(self) -> None:
        """An answer, streamed."""
        fields = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        pieces, tokens = self.engine.submit(fields["prompt"], fields["max_tokens"]), list[int]()
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        told = ""
        while (piece := pieces.get()) is not None:
            tokens += piece
            text = self.engine.tokenizer.decode(tokens)
            if not text.endswith("\N{REPLACEMENT CHARACTER}"):
                self._send({"choices": [{"text": text[len(told) :], "finish_reason": None}]})
                told = text
        self._send({"choices": [{"text": "", "finish_reason": "stop"}], "usage": {"completion_tokens": len(tokens)}})
        self._write(b"data: [DONE]\n\n")
        self.wfile.write(b"0\r\n\r\n")

    def _send(self, event: dict[str, Any]) -> None:
        self._write(b"data: " + json.dumps(event).encode() + b"\n\n")

    def _write(self, data: bytes) -> None:
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        self.wfile.flush()

    def log_message(self, *args: Any) -> None:
        """Nothing."""


class Server(http.server.ThreadingHTTPServer):
    """With room for a crowd that connects at the same time: else some would try again a second later."""

    request_queue_size = 128


if __name__ == "__main__":
    Handler.engine = Engine(sys.argv[1], sys.argv[3] == "1")
    Server(("127.0.0.1", int(sys.argv[2])), Handler).serve_forever()

"""phi3-serve as a process: what it refuses, how it ends."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
from chats import small_chat

import phi3_jax
from phi3_jax.infer.programs import serve_main

ENVIRONMENT = {**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
PROGRAM = [sys.executable, "-m", "phi3_jax.infer.programs.serve_main"]
HI = {"messages": [{"role": "user", "content": "Hi"}]}


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    checkpoint = small_chat(tiny, folder / "tokenizer")
    phi3_jax.save(checkpoint, folder / "small")
    return folder / "small"


def program(change=""):
    """The program without a warm-up, so that it compiles only what it uses, and with a change."""
    script = [
        "from phi3_jax.infer.programs import serve_main",
        "from phi3_jax.infer.serving.engine import Engine",
        "Engine.warm_up = lambda self, told: told(1, 1)",
        change,
        "serve_main.run()",
    ]
    return [sys.executable, "-c", "\n".join(script)]


def run(program, folder, *args):
    """What becomes of a program that ends by itself."""
    return subprocess.run(
        [*program, f"--checkpoint={folder}", "--port=0", "--slots=1", "--room=64", "--prefix_memory=0", *args],
        capture_output=True,
        text=True,
        timeout=60,
        env=ENVIRONMENT,
    )


class Started:
    """A server that is ready."""

    def __init__(self, folder, *args, program=PROGRAM):
        self.process = subprocess.Popen(
            [*program, f"--checkpoint={folder}", "--port=0", "--slots=1", "--room=512", "--prefix_memory=0", *args],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=ENVIRONMENT,
        )
        line = self.process.stdout.readline()
        assert line.startswith("phi3-serve: small at http://127.0.0.1:"), (line, self.process.stderr.read())
        self.url = line.split()[3].rstrip(",")
        self.while_warming = httpx.get(f"{self.url}/ready").status_code, httpx.get(f"{self.url}/health").status_code
        assert self.process.stdout.readline() == "phi3-serve: ready\n", self.process.stderr.read()

    def end(self, number):
        """The exit code, and the lines of its log."""
        self.process.send_signal(number)
        _, log = self.process.communicate(timeout=20)
        return self.process.returncode, log


@pytest.fixture
def parsed():
    """A function that sets the program's flags as a command line would."""
    kept = serve_main.flags.FLAGS
    taken = [holder for holders in serve_main._TOPICS.values() for holder in holders]

    def parse(*args):
        for holder in taken:
            kept[holder.name].unparse()
        kept(["phi3-serve", *args])

    yield parse
    parse()


def test_only_who_says_insecure_twice_lets_everyone_in(parsed, monkeypatch):
    monkeypatch.delenv("PHI3_API_KEYS", raising=False)
    parsed("--host=0.0.0.0", "--insecure", "--insecure")
    assert serve_main._access().hosts is None
    for said in (["--insecure"], ["--noinsecure"] * 2, ["--insecure", "--noinsecure"], ["--insecure=false"] * 2, []):
        parsed("--host=0.0.0.0", *said)
        with pytest.raises(ValueError, match="--insecure --insecure"):
            serve_main._access()


def test_names_and_origins_are_those_that_requests_have(parsed):
    parsed("--allow_host=AI.example.com", "--allow_host=[FE80::1]", "--cors=http://[::1]:8080", "--cors=*")
    access = serve_main._access()
    assert (access.hosts, access.origins) == (["ai.example.com", "fe80::1"], ["http://[::1]:8080", "*"])
    for wrong in (
        "--cors=https://example.com/", "--cors=https://Example.com", "--cors=example.com", "--cors=https://",
        "--cors=https://a@example.com", "--allow_host=a:80", "--allow_host=http://a", "--allow_host=",
    ):  # fmt: skip
        parsed(wrong)
        with pytest.raises(ValueError, match=re.escape(wrong)):
            serve_main._access()


def test_the_guide_has_the_flags_with_their_defaults(parsed):
    parsed()
    known = serve_main.flags.FLAGS
    text = (Path(serve_main.__file__).parents[1] / "serving/README.md").read_text()
    found = re.findall(r"^\| `--(\w+) (\w+)`", text, re.MULTILINE) + re.findall(r"`--(\w+) (\w+)` of the answer", text)
    assert len(found) == 10
    for name, value in found:
        default = 4096 if name == "max_new_tokens" else known[name].default  # `run` sets that one
        assert value == (f"{default:g}" if isinstance(default, float) else str(default)), name


@pytest.mark.slow
def test_it_refuses_an_address_where_everyone_could_use_it(folder):
    done = run(PROGRAM, folder, "--host=0.0.0.0", "--insecure")
    assert (done.returncode, done.stdout) == (1, "")
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert "--insecure --insecure" in done.stderr


@pytest.mark.slow
def test_an_engine_that_dies_takes_the_process_down(folder):
    done = run(program("Engine.run = lambda self: 1 / 0"), folder)
    assert done.returncode == 1
    said = "phi3-serve: the engine has failed, and the server with it: ZeroDivisionError: division by zero"
    assert done.stderr.splitlines()[-1] == said


@pytest.mark.slow
def test_it_answers_what_it_has_begun_and_ends_with_0(folder):
    server = Started(folder, "--drain_seconds=20")
    assert server.while_warming == (503, 200)
    asked = {**HI, "max_tokens": 400, "min_tokens": 400, "stream": True}
    with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=asked, timeout=20) as response:
        lines = response.iter_lines()
        next(lines)
        server.process.send_signal(signal.SIGTERM)
        rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]"
    assert len(rest) > 5
    _, log = server.process.communicate(timeout=20)
    assert server.process.returncode == 0
    assert '"event": "request"' in log
    with pytest.raises(httpx.ConnectError):
        httpx.get(server.url)


@pytest.mark.slow
def test_a_second_signal_ends_it_at_once(folder):
    server = Started(folder, "--drain_seconds=60", program=program())
    asked = {**HI, "max_tokens": 500, "min_tokens": 500, "n": 16, "stream": True}
    with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=asked, timeout=20):
        server.process.send_signal(signal.SIGINT)
        time.sleep(0.2)
        begin = time.monotonic()
        code, _ = server.end(signal.SIGINT)
    assert (code, time.monotonic() - begin < 3) == (-signal.SIGINT, True)

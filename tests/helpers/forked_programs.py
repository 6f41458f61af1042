"""Programs that start in milliseconds, because they are forked from a process that has imported them; to be killed."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

# A process for each request, a line of JSON; the kernels and jax's devices are not there before the fork.
PARENT = """
import importlib, json, os, sys
program = importlib.import_module(sys.argv[1])
for line in sys.stdin:
    request = json.loads(line)
    child = os.fork()
    if not child:
        code = 70
        try:
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(log, 1), os.dup2(log, 2)
            for key, value in request["limits"].items():
                import resource
                resource.setrlimit(getattr(resource, key), (value, value))
            sys.argv = [sys.argv[1].rpartition(".")[2], *request["arguments"]]
            program.run()
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 0 if error.code is None else 1
            if isinstance(error.code, str):
                print(error.code, file=sys.stderr)
        except BaseException:
            import traceback
            traceback.print_exc()
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Forked:
    """A program of ours, `phi3_jax.infer.programs.export_main`, say."""

    def __init__(self, process: subprocess.Popen[str], log: Path):
        self._process, self._log = process, log

    def start(self, *arguments: str, **limits: int) -> int:
        """-> the process's number. limits: of the module `resource`."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        request = {"arguments": arguments, "log": str(self._log), "limits": limits}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def wait(self) -> int:
        """-> its exit code, or the negative signal."""
        assert self._process.stdout is not None
        return int(self._process.stdout.readline())

    def run(self, *arguments: str, **limits: int) -> tuple[int, str, float]:
        """-> the exit code, all that it printed, and the seconds."""
        begin = time.monotonic()
        self.start(*arguments, **limits)
        return self.wait(), self._log.read_text(), time.monotonic() - begin

    def kill(self, rng: random.Random, folder: Path, seconds: float, *arguments: str) -> int:
        """Kills it at a random moment: of all its time, or of that in which it writes into the folder -> exit code."""
        before, begin = entries(folder), time.monotonic()
        number = self.start(*arguments)
        if rng.random() < 0.3:
            time.sleep(rng.uniform(0, seconds))
        else:
            while entries(folder) == before and time.monotonic() < begin + 2 * seconds:
                time.sleep(0.001)
            time.sleep(rng.choice([0.0, 0.005, 0.03, 0.2, 1.0]) * rng.random() * min(1.0, seconds))
        with contextlib.suppress(ProcessLookupError):
            os.kill(number, signal.SIGKILL)
        return self.wait()


@contextlib.contextmanager
def forked(module: str, log: Path, cache: str) -> Iterator[Forked]:
    """cache: where compiled programs and kernels are kept."""
    environment = {**os.environ, "XDG_CACHE_HOME": cache, "PYTHONWARNINGS": "ignore:os.fork"}
    command = [sys.executable, "-c", PARENT, module]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            yield Forked(process, log)
        finally:
            process.kill()


def entries(folder: Path) -> set[str]:
    """All that is in a folder, and below it."""
    found: set[str] = set()
    for place, folders, files in os.walk(folder):
        found.update(str(Path(place, name).relative_to(folder)) for name in (*folders, *files))
    return found

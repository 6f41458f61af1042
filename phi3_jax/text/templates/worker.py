"""The process in which chat templates run; `process` starts this file, asks, and says what is asked and answered.

It runs as a file: importing the package phi3_jax would import jax, which takes seconds.
"""

import gc
import json
import os
import signal
import struct
import sys
import types
from typing import Any, BinaryIO

HEADER = struct.Struct("<QdQ")  # of a request: its bytes, seconds of processor time, bytes of memory on top
LENGTH = struct.Struct("<Q")  # of a reply
OUT_OF_MEMORY = 77  # the exit status
_MOST_SAID = 500  # characters: a template may write its own error


def main() -> None:
    """Answers until the other end of the socket, which is standard input, is closed."""
    signal.pthread_sigmask(signal.SIG_SETMASK, [])  # what the program that starts us blocks or ignores is inherited
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    requests, replies = open(0, "rb", closefd=False), open(0, "wb", closefd=False)  # noqa: SIM115
    try:
        sandbox = _import(_read(requests))
        at_start = _address_space()
        _write(replies, {"result": None})
        while True:
            _answer(sandbox, requests, replies, at_start)
    except (EOFError, BrokenPipeError, ConnectionError):
        os._exit(0)
    except MemoryError:  # what is left over may be too little to go on with
        os._exit(OUT_OF_MEMORY)
    except ImportError as error:
        _write(replies, {"failed": str(error)})


def _import(path: list[str]) -> types.ModuleType:
    """The module sandbox; its package is found without running the `__init__` of those that it lies in."""
    sys.path[:] = path
    folder = os.path.dirname(os.path.abspath(__file__))
    for name in ("phi3_jax.text.templates", "phi3_jax.text", "phi3_jax"):
        package = types.ModuleType(name)
        package.__path__ = [folder]
        sys.modules[name] = package
        folder = os.path.dirname(folder)
    from phi3_jax.text.templates import sandbox

    return sandbox


def _answer(sandbox: types.ModuleType, requests: BinaryIO, replies: BinaryIO, at_start: int | None) -> None:
    length, seconds, memory = HEADER.unpack(_exactly(requests, HEADER.size))
    if at_start is not None:
        _limit_address_space(at_start + memory)
    # The signal's default action ends the process, also inside of one step of Python's that takes for ever.
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        request = json.loads(_exactly(requests, length).decode("utf-8", "surrogatepass"))
        reply = {"result": getattr(sandbox, request.pop("function"))(**request)}
    except (EOFError, MemoryError):
        raise
    except Exception as error:  # whatever a template can cause ends here
        said = sandbox.explain(error)
        reply = {"failed": said if len(said) <= _MOST_SAID else f"{said[:_MOST_SAID]}..."}
        gc.collect()  # what the template held may hang on its frames
    _write(replies, reply)
    signal.setitimer(signal.ITIMER_PROF, 0)


def _address_space() -> int | None:
    """Bytes of address space in use, None where the system does not say; there it would not limit them either."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return None


def _limit_address_space(most: int) -> None:
    import resource  # not on Windows, where `process` needs only the constants above

    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


def _read(requests: BinaryIO) -> Any:
    length, _, _ = HEADER.unpack(_exactly(requests, HEADER.size))
    return json.loads(_exactly(requests, length))


def _exactly(requests: BinaryIO, count: int) -> bytes:
    read = requests.read(count)
    if len(read) < count:
        raise EOFError
    return read


def _write(replies: BinaryIO, reply: Any) -> None:
    data = json.dumps(reply, ensure_ascii=False).encode("utf-8", "surrogatepass")
    replies.write(LENGTH.pack(len(data)) + data)
    replies.flush()


if __name__ == "__main__":
    main()

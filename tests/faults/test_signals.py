"""Signals at random moments of a program's life, and standard streams that are closed, full, slow or gone.

PHI3_FAULTS_SIGNALS=150 sends as many signals, and shows what came of them.
"""

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from cache_folders import own_cache
from training_runs import write_run

TRIALS = int(os.environ.get("PHI3_FAULTS_SIGNALS", "10"))
SIGNALS = [signal.SIGINT, signal.SIGINT, signal.SIGTERM, signal.SIGHUP]  # Ctrl-C is the most frequent one
LONGEST = 30  # seconds from a signal to the end, on a machine that does much else
PROMPT = ["--prompt", "12+7", "--max_new_tokens", "40"]


@dataclasses.dataclass(frozen=True)
class Place:
    """A folder with a model and data, and an environment with a cache of its own."""

    folder: Path
    env: dict[str, str]

    def command(self, program: str, output: Path) -> list[str]:
        """A program that does all that it can do; what it writes goes to `output`."""
        model, eval_file = ["--checkpoint", str(self.folder / "model")], str(self.folder / "eval.jsonl")
        settings = write_run(self.folder, output=str(output / "run"), steps=6)
        changed = {
            field.name: getattr(settings, field.name)
            for field in dataclasses.fields(settings)
            if getattr(settings, field.name) != field.default
        }
        rest = {
            "generate": [*model, *PROMPT],
            "generate_file": [*model, "--input", str(self.folder / "in.jsonl"), "--output", str(output / "out.jsonl")],
            "generate_api_file": [
                *model,
                "--input",
                str(self.folder / "api.jsonl"),
                "--output",
                str(output / "out.jsonl"),
            ],
            "chat": [*model, "--max_new_tokens", "20"],
            "quantize": [*model, "--quantize", "int8", "--output", str(output / "out")],
            "export": [*model, "--output", str(output / "out"), "--format", "safetensors"],
            "evaluate": [*model, "--data", eval_file, "--json", str(output / "out.json")],
            "benchmark": [*model, "--prompt_lengths", "8", "--contexts", "8", "--new_tokens", "4", "--rounds", "2"],
            "train": ["--tell_every", "0", *(f"--set={name}={value}" for name, value in changed.items())],
            "random_checkpoint": ["--preset", "phi-3-mini-4k", "--layers", "1", "--output", str(output / "out")],
        }[program]
        name = program.removesuffix("_file").removesuffix("_api")
        start = f"import sys, phi3_start; sys.argv[0] = 'phi3-{name}'; phi3_start.{name}()"
        return [sys.executable, "-c", start, *rest]

    def start(self, program: str, output: Path, *more: str, **streams: object) -> subprocess.Popen[bytes]:
        streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | streams
        return subprocess.Popen([*self.command(program, output), *more], env=self.env, **streams)

    def shell(self, script: str, program: str, output: Path, *more: str) -> subprocess.CompletedProcess[str]:
        """Runs a shell's script, in which "$@" is the program."""
        command = ["bash", "-c", script, "bash", *self.command(program, output), *more]
        return subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=240)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("signals")
    write_run(folder)
    lines = [json.dumps({"prompt": f"{n}+{n}", "max_new_tokens": 20}) for n in range(24)]
    (folder / "in.jsonl").write_text("\n".join(lines) + "\n")
    bodies = [{"prompt": f"{n}+{n}", "max_tokens": 20} for n in range(24)]
    asked = [
        {"custom_id": f"{n}", "method": "POST", "url": "/v1/completions", "body": body} for n, body in enumerate(bodies)
    ]
    (folder / "api.jsonl").write_text("".join(json.dumps(line) + "\n" for line in asked))
    (folder / "cache").mkdir()
    # What the tests ignore, as a shell's background jobs do Ctrl-C, programs that they start would ignore, too.
    before = {number: signal.signal(number, signal.SIG_DFL) for number in set(SIGNALS) - {signal.SIGINT}}
    before[signal.SIGINT] = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield Place(folder, {**os.environ, "XDG_CACHE_HOME": own_cache(folder / "cache"), "PYTHONDONTWRITEBYTECODE": "1"})
    for number, handler in before.items():
        signal.signal(number, handler)


def handles_signals(process: subprocess.Popen[bytes]) -> bool:
    """Whether it has our handlers."""
    status = Path(f"/proc/{process.pid}/status")
    if not status.exists():  # not on macOS
        return True
    (caught,) = (line for line in status.read_text().splitlines() if line.startswith("SigCgt:"))
    return int(caught.split()[1], 16) >> (signal.SIGURG - 1) & 1 == 1


def what_is_wrong(code: int, errors: str, number: signal.Signals, seconds: float, output: Path) -> list[str]:
    """What a program must not do that has got a signal."""
    if "Traceback" in errors and "phi3_start.py" not in errors and errors.endswith("KeyboardInterrupt\n"):
        errors, code = "", -number  # Python itself was starting, and nothing of ours was there
    wrong = [f"exit code {code}"] if code not in (0, -number, 128 + number) else []
    wrong += [f"it took {seconds:.1f} s"] if seconds > LONGEST else []
    strange = [
        line
        for line in errors.splitlines()
        if not line.startswith(("phi3-", "prefill ", "stopped after ", str(output)))
    ]
    wrong += [f"it says {strange}"] if strange else []
    left = [str(path) for path in output.rglob(".*.partial")]
    return wrong + ([f"it leaves {left}"] if left else [])


@pytest.mark.slow
def test_a_signal_at_any_moment_ends_a_program_in_good_order(place, tmp_path):
    programs = ["generate", "generate_file", "quantize", "export", "evaluate", "train"]
    programs += ["generate_api_file", "chat", "benchmark"] if TRIALS > 20 else []
    rng, outcomes, failures = random.Random(TRIALS), Counter(), []
    for trial in range(TRIALS):
        program, number = programs[trial % len(programs)], SIGNALS[trial // len(programs) % len(SIGNALS)]
        output = tmp_path / f"{program}{trial}"
        output.mkdir()
        with place.start(program, output) as process:
            if trial % 3:  # from when it has been imported
                while process.poll() is None and not handles_signals(process):
                    time.sleep(0.005)
            time.sleep(rng.uniform(0, 2))
            sent = time.monotonic()
            process.send_signal(number)
            try:
                _, errors = process.communicate(timeout=LONGEST)
            except subprocess.TimeoutExpired:
                process.kill()
                _, errors = process.communicate()
        wrong = what_is_wrong(process.returncode, errors.decode(), number, time.monotonic() - sent, output)
        if TRIALS > 20:
            print(program, number.name, process.returncode, errors.decode()[-200:], wrong, flush=True)
        outcomes[number.name, process.returncode, len(errors.splitlines()) if program != "train" else -1] += 1
        failures += [f"{program} {number.name}: {'; '.join(wrong)}"] if wrong else []
    for (name, code, lines), count in sorted(outcomes.items()):
        told = "any number of" if lines < 0 else lines
        print(f"{name}: {count} times exit code {code}, with {told} lines on standard error")
    assert not failures, "\n".join(failures)


# ---- what can get lost ----

WAIT = "tell(); time.sleep(5)"
LOST = {
    "in __del__": f"class Slow:\n def __del__(self): {WAIT}\nSlow()",
    "in a callback of gc": f"def f(phase, info): {WAIT}\ngc.callbacks.append(f); gc.collect(); gc.callbacks.clear()",
    "in a callback of XLA": f"logging.disable()\ndef f(x): {WAIT}; return x\nprint(jax.pure_callback(f, x, x))",
    "by an except": f"try: {WAIT}\nexcept BaseException: pass",
    "by another exception": f"try: {WAIT}\nexcept BaseException: raise RuntimeError('other') from None",
    "by a generator": f"def g():\n try: yield; {WAIT}\n except BaseException: pass\nlist(g())",
}


def start_script(body: str, **streams: object) -> subprocess.Popen[str]:
    """A program of its own, whose `main` this is; it prints "now" when the signal is to come."""
    script = (
        "import gc, hashlib, logging, os, sys, time\n"
        "import jax, numpy as np\n"
        "from phi3_jax.command_line.program import run_program\n"
        "from phi3_jax.command_line.interrupts import interruptible\n"
        "x = np.float32(1)\n"
        "def tell(): print('now', flush=True)\n"
        f"def main():\n exec({body!r}, globals())\n time.sleep(30)\n return 0\n"
        "run_program('phi3-x', main, {})\n"
    )
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | streams
    return subprocess.Popen([sys.executable, "-c", script], text=True, **streams)


@pytest.mark.slow
def test_an_interrupt_is_never_lost(place):
    for how, body in LOST.items():
        with start_script(body) as process:
            assert process.stdout.readline() == "now\n", how
            process.send_signal(signal.SIGINT)
            begun = time.monotonic()
            _, errors = process.communicate(timeout=LONGEST)
        assert (process.returncode, errors) == (-signal.SIGINT, ""), how
        assert time.monotonic() - begun < LONGEST / 2, how


@pytest.mark.slow
def test_a_second_interrupt_ends_a_program_inside_of_compiled_code(place):
    """Python's handlers wait for the end of the call."""
    with start_script("tell(); hashlib.pbkdf2_hmac('sha256', b'x', b'y', 10**8)") as process:
        process.stdout.readline()
        time.sleep(1)  # until it is in there
        process.send_signal(signal.SIGINT)
        time.sleep(0.5)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=10) == -signal.SIGINT
    flagged = "with interruptible() as asked:\n tell()\n while not asked(): pass\n tell()\n time.sleep(30)"
    with start_script(flagged) as process:
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == "now\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=10) == -signal.SIGINT


# ---- standard streams ----

STREAMS = {  # what the shell does with the program -> exit code, and what it says; "..." is its answer
    "closed": ('"$@" <&- >&- 2>&-', 0, "", ""),
    "no errors": ('"$@" 2>&-', 0, "...", ""),
    "full errors": ('"$@" 2>/dev/full', 0, "...", ""),
    "full output": ('"$@" >/dev/full', 1, "", "phi3-generate: cannot write to standard output: [Errno 28] "),
    "a reader that has left": ('"$@" | true; exit ${PIPESTATUS[0]}', 141, "", ""),
    "the same for errors": ('"$@" 2>&1 | true; exit ${PIPESTATUS[0]}', 141, "", ""),
    "other letters": ('LC_ALL=C PYTHONIOENCODING=ascii TERM=dumb COLUMNS=0 "$@"', 0, "?", ""),
}


@pytest.fixture(scope="module")
def answer(place, tmp_path_factory):
    done = place.shell('"$@"', "generate", tmp_path_factory.mktemp("answer"))
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("how", STREAMS)
def test_standard_streams(place, answer, tmp_path, how):
    script, code, output, errors = STREAMS[how]
    done = place.shell(script, "generate", tmp_path)
    assert done.returncode == code, done.stderr
    assert done.stdout == {"": "", "...": answer, "?": answer.encode("ascii", "replace").decode()}[output]
    lines = [line for line in done.stderr.splitlines() if not line.startswith("prefill ")]
    assert len(lines) == bool(errors), done.stderr
    assert "".join(lines).startswith(errors)


@pytest.mark.slow
def test_output_waits_for_a_slow_reader_also_where_it_need_not():
    """As on a pipe that another program has set so."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    with start_script("print('x' * 300_000); tell(); sys.exit(0)", stdout=writing) as process:
        os.close(writing)
        seen = b""
        while piece := os.read(reading, 50_000):
            seen += piece
            time.sleep(0.1)
        os.close(reading)
        assert (process.wait(), process.stderr.read()) == (0, "")
    assert seen == b"x" * 300_000 + b"\nnow\n"


@pytest.mark.slow
def test_what_a_parent_ignores_stays_ignored():
    """As nohup has it, and a shell for what it starts in the background."""
    ignored = [(number, signal.signal(number, signal.SIG_IGN)) for number in (signal.SIGINT, signal.SIGHUP)]
    script = "import os, signal; [os.kill(os.getpid(), n) for n in (1, 2)]; tell(); sys.exit(0)"
    with start_script(script) as process:
        for number, handler in ignored:
            signal.signal(number, handler)
        assert process.communicate(timeout=LONGEST) == ("now\n", "")
    assert process.returncode == 0

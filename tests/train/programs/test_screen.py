"""What phi3-train shows: bars on a terminal, lines in a file."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import time
from typing import Any

import pytest

from phi3_jax.train.programs import train_main
from phi3_jax.train.programs.screen import Screen, told_seconds


def record(step: int, **more: Any) -> dict[str, Any]:
    return {"step": step, "loss": 4 / step, "tokens_per_second": 5400.3, "passes": step / 8, **more}


def test_lines_in_a_file(capsys, monkeypatch):
    """The clock is turned by hand; whatever is done when it is time to tell is in the line."""
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    screen = Screen(tell_every=10)

    def line() -> str:
        return ", ".join(screen._line())

    assert line() == ""
    screen.progress("loading", 10, 40)
    now[0] += 12
    assert line() == "loading: 25%, 12 s"
    screen.progress("loading", 40, 40)
    screen.progress("compiling the step", 0, 1)
    now[0] += 14
    assert line() == "compiling the step: 14 s"
    screen.progress("compiling the step", 1, 1)
    with screen:
        screen.begin(4, 100)
        screen.record({"step": 4, "eval_loss": 2.5})
        screen.progress("answering sample prompts", 0, 1)
        now[0] += 300
        assert line() == "step 4/100, answering sample prompts: 300 s".replace("300 s", "5 min 0 s")
        screen.progress("answering sample prompts", 1, 1)
        screen.sample(4, "What\nis this?", "x\x1b[2Jé" + "x " * 60)
        now[0] += 5
        screen.record(record(5))
        assert line() == "step 5/100, loss 0.8, 5400 tokens/s, 7 min 55 s left, pass 0.6 of 12.5"
        now[0] += 3
        screen.record(record(6, mfu=0.314))
        now[0] += 2
        assert line() == "step 6/100, loss 0.6667, 5400 tokens/s, MFU 31%, 6 min 14 s left, pass 0.8 of 12.5"
        now[0] += 20
        assert line() == "step 6/100 (22 s ago), loss 0.6667, 5400 tokens/s, MFU 31%, 5 min 54 s left, pass 0.8 of 12.5"
    told = f"x\ufffd[2Jé{'x ' * 40}x..."
    assert capsys.readouterr().err.splitlines() == [
        "phi3-train: step 4: held-out loss 2.5000",
        f"phi3-train: step 4: What is this? -> {told}",
    ]


@pytest.mark.parametrize(("tell_every", "most"), [(0, 0), (0.02, 100)])
def test_lines_come_by_themselves(tell_every, most, capsys):
    with Screen(tell_every) as screen:
        screen.progress("compiling the step", 0, 1)
        begun, text = time.perf_counter(), ""
        while time.perf_counter() - begun < (20 if most else 0.2) and text.count("\n") < 2:
            time.sleep(0.01)
            text += capsys.readouterr().err
    lines = text.splitlines()
    assert bool(most) == (len(lines) >= 2)
    assert all(line == "phi3-train: compiling the step: 0 s" for line in lines)


@pytest.mark.slow
@pytest.mark.parametrize("columns", [100, 0])
def test_a_bar_on_a_terminal(columns):
    """One whose size is not known has 80 columns."""
    script = """
import time
from phi3_jax.train.programs import train_main
from phi3_jax.train.programs.screen import Screen
with Screen() as screen:
    screen.progress("compiling the step", 0, 1)
    time.sleep(3.5)
    screen.progress("compiling the step", 1, 1)
    screen.begin(0, 100)
    for step in (1, 2, 3):
        time.sleep(0.2)
        screen.record({"step": step, "loss": 2.5, "tokens_per_second": 54.0, "passes": step / 8})
    screen.sample(3, "Hm?", "Yes.")
"""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 30 if columns else 0, columns, 0, 0))
    with subprocess.Popen([sys.executable, "-c", script], stderr=theirs) as process:
        os.close(theirs)
        content = b""
        while True:
            try:
                content += os.read(ours, 4096)
            except OSError:  # the end of a terminal
                break
    assert process.returncode == 0
    text = content.decode()
    assert re.search(r"compiling the step: 00:0[23]", text), text
    assert re.search(r"3/100 \|.*\| loss 2.5, 54 tokens/s, \d+ s left, pass 0.4 of 12.5", text), text
    assert "phi3-train: step 3: Hm? -> Yes." in text


def test_times():
    assert [told_seconds(s) for s in (0.4, 59.6, 200, 3599.4, 7500)] == [
        "0 s", "1 min 0 s", "3 min 20 s", "59 min 59 s", "2 h 5 min",
    ]  # fmt: skip


def test_an_interrupt_is_told_once(capsys):
    with Screen(0.01) as screen:
        screen.begin(3, 9)
        screen.interrupted = lambda: True
        begun = time.perf_counter()
        text = ""
        while time.perf_counter() - begun < 20 and text.count("step 3/9") < 3:
            time.sleep(0.01)
            text += capsys.readouterr().err
    told = "phi3-train: stops after this step, and saves it; Ctrl-C once more stops at once, and saves nothing\n"
    assert text.count(told) == text.count("Ctrl-C") == 1


def test_closed_standard_error_is_no_obstacle(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stderr", None)
    monkeypatch.setattr(sys, "argv", ["phi3-train", "--help"])
    with pytest.raises(SystemExit) as ended:
        train_main.run()
    assert ended.value.code == 0
    with Screen() as screen:
        screen.note("nobody reads this")
    sys.stderr.close()
    assert "nobody" not in capsys.readouterr().out

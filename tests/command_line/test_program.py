"""What every program does, tried on one of them."""

import os
import signal
import subprocess
import sys
import threading

import jax
import numpy as np
import pytest

import phi3_jax
from phi3_jax.checkpoint import as_floats
from phi3_jax.command_line import interrupts


def test_only_the_main_thread_can_handle_signals():
    """Elsewhere nothing is changed, and no thread remains."""

    def handle():
        with pytest.raises(ValueError, match="main thread"), interrupts.interruptible():
            pass

    hook, threads = sys.unraisablehook, threading.active_count()
    other = threading.Thread(target=handle)
    other.start()
    other.join()
    assert sys.unraisablehook is hook
    assert threading.active_count() <= threads
    with interrupts.interruptible() as asked:
        os.kill(os.getpid(), signal.SIGINT)
        assert asked()
    assert sys.unraisablehook is hook


def test_only_ctrl_c_is_forgotten(monkeypatch):
    monkeypatch.setattr(interrupts._interrupts, "asked", None)  # which it is again afterwards
    with interrupts.handled():
        with interrupts.interruptible():
            os.kill(os.getpid(), signal.SIGINT)
        assert interrupts.asked() == signal.SIGINT
        interrupts.forget()
        assert interrupts.asked() is None
        with interrupts.interruptible():
            os.kill(os.getpid(), signal.SIGTERM)
        interrupts.forget()
        pytest.fail("the program would go on")
    assert interrupts.asked() == signal.SIGTERM


def export(*arguments):
    command = [sys.executable, "-m", "phi3_jax.infer.programs.export_main", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def test_a_flag_that_came_with_an_imported_module_is_refused():
    command = [sys.executable, "-m", "phi3_jax.infer.programs.benchmark_main", "--temperature", "0.7"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "phi3-benchmark: there is no --temperature; see phi3-benchmark --help\n"


def test_the_version_is_told_before_flags_are_checked():
    done = export("--version")  # --output is required
    assert done.returncode == 0
    assert done.stdout.startswith(f"phi3-export {phi3_jax.__version__} (jax ")


def test_a_reader_that_has_left_ends_the_program_without_a_word():
    """As in `phi3-export --help | head -1`, when the reader is gone before anything is written, or after it."""
    command = [sys.executable, "-m", "phi3_jax.infer.programs.export_main", "--help"]
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "wb") as gone:
        done = subprocess.run(command, stdout=gone, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")
    if os.path.exists("/dev/full"):
        with open("/dev/full", "wb") as full:
            done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
        assert (done.returncode, done.stderr.count("\n")) == (1, 1)
        assert done.stderr.startswith("phi3-export: cannot write to standard output: [Errno 28]")
    script = (
        "from phi3_jax.command_line.program import run_program\n"
        "def main():\n"
        "    for _ in range(100_000): print('word')\n"
        "    return 0\n"
        "run_program('phi3-words', main, {})\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "word\n"
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait() == 128 + signal.SIGPIPE


def test_a_warning_is_one_line_and_told_once():
    script = (
        "import warnings\n"
        "from phi3_jax.command_line.program import run_program\n"
        "def main():\n"
        "    for text in ('this', 'that', 'this'): warnings.warn(text)\n"
        "    warnings.warn('old', FutureWarning)\n"
        "    return 0\n"
        "run_program('phi3-warns', main, {})\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    first, second, third, *_ = done.stderr.splitlines()
    assert (first, second) == ("phi3-warns: warning: this", "phi3-warns: warning: that")
    assert third.endswith("FutureWarning: old")
    assert (done.returncode, done.stdout) == (0, "")


def test_integers_are_exported_as_the_floats_that_they_stand_for(tiny_folder, tmp_path):
    integers = phi3_jax.load(tiny_folder, "bfloat16", quantize="int8", layout="rows")
    phi3_jax.save(integers, tmp_path / "q")
    done = export("--checkpoint", str(tmp_path / "q"), "--format", "safetensors", "--output", str(tmp_path / "out"))
    assert (done.returncode, done.stderr) == (0, f"{tmp_path}/out: the int8 weights as floats\n")
    written = phi3_jax.load(tmp_path / "out", "float32").params
    expected = as_floats(integers.params, written["norm"]["weight"].dtype)
    for (path, one), other in zip(jax.tree.leaves_with_path(written), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=2**-8, err_msg=jax.tree_util.keystr(path))


COMPILES = """
import sys
from phi3_jax.command_line import program
import jax
def main():
    print(float(jax.jit(lambda x: x * 3 + 1)(2.0)))
    return 0
program.run_program("compiles", main, {})
"""


@pytest.mark.slow
def test_a_compiled_program_that_a_kill_has_left_half_is_made_again(tmp_path):
    command = [sys.executable, "-c", COMPILES, "--compilation_cache_dir", str(tmp_path)]
    heard = []
    for _ in range(3):
        done = subprocess.run(command, capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (0, "7.0\n")
        heard.append(done.stderr)
        if len(heard) == 1:
            (path,) = tmp_path.glob("jit__lambda-*-cache")
            whole = path.read_bytes()
            path.write_bytes(whole[: len(whole) // 2])
    assert heard == [
        "",
        f"compiles: warning: damaged entries among the compiled programs in {tmp_path} were removed, and are compiled "
        "again\n",
        "",
    ]
    assert len(path.read_bytes()) > len(whole) // 2

"""What every program does, tried on one of them."""

import os
import signal
import subprocess
import sys

import phi3_jax


def export(*arguments):
    command = [sys.executable, "-m", "phi3_jax.infer.programs.export_main", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def test_a_flag_that_came_with_an_imported_module_is_refused(tmp_path):
    done = export("--quantize", "int4", "--output", str(tmp_path / "out.gguf"))
    assert done.returncode == 1
    assert done.stderr == "phi3-export: there is no --quantize; see phi3-export --help\n"
    assert not list(tmp_path.iterdir())


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


def test_integers_are_not_exported_as_if_they_were_a_checkpoint_for_others(tiny_folder, tmp_path):
    phi3_jax.save(phi3_jax.load(tiny_folder, "bfloat16", quantize="int8"), tmp_path / "q")
    done = export("--checkpoint", str(tmp_path / "q"), "--format", "safetensors", "--output", str(tmp_path / "out"))
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "q: weights that are integers are not exported: name what they were made from" in done.stderr
    assert not (tmp_path / "out").exists()

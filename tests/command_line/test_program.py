"""What every program does, tried on one of them."""

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

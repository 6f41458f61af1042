import re
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

import phi3_jax

ROOT = Path(phi3_jax.__file__).parent.parent
NOTEBOOKS = ROOT / "infer" / "inspection" / "notebooks"  # documents, which stay in the repository
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_every_folder_with_code_is_in_the_package_list():
    setuptools = PROJECT["tool"]["setuptools"]
    folders = {path.parent for top in ("phi3_jax", "infer", "train") for path in (ROOT / top).rglob("*.py")}
    names = {".".join(folder.relative_to(ROOT).parts) for folder in folders - {NOTEBOOKS}}
    names = {name if name.startswith("phi3_jax") else f"phi3_jax.{name}" for name in names}
    assert names == set(setuptools["packages"])
    for name, folder in setuptools["package-dir"].items():
        assert (ROOT / folder / "__init__.py").exists(), name


def test_nothing_imports_a_second_name():
    """`import infer` would load a module twice, and absl would refuse its flags the second time."""
    for folder in ("phi3_jax", "infer", "train", "tests", "benchmarks"):
        for path in (ROOT / folder).rglob("*.py"):
            for line in path.read_text().splitlines():
                assert not re.match(r"\s*(import|from) (infer|train)\b", line), (path, line)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    shutil.rmtree(ROOT / "build" / "lib", ignore_errors=True)  # setuptools would ship what earlier builds left there
    build = [sys.executable, "-m", "build", "--wheel", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = folder.glob("*.whl")
    return path


def test_the_wheel_holds_the_library_and_both_applications_once(wheel):
    names = [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".py")]
    sources = {"phi3_start.py"} | {str(path.relative_to(ROOT)) for path in (ROOT / "phi3_jax").rglob("*.py")}
    for top in ("infer", "train"):
        paths = [path for path in (ROOT / top).rglob("*.py") if path.parent != NOTEBOOKS]
        sources |= {f"phi3_jax/{path.relative_to(ROOT)}" for path in paths}
    assert sorted(names) == sorted(sources)
    others = {
        str(path.relative_to(ROOT)) for kind in ("cpp", "h", "typed") for path in ROOT.glob(f"phi3_jax/**/*.{kind}")
    }
    others |= {f"phi3_jax/{path.relative_to(ROOT)}" for path in ROOT.glob("infer/*/page/*")}
    assert others <= set(zipfile.ZipFile(wheel).namelist())


@pytest.mark.slow
def test_the_wheel_works_in_a_clean_environment_with_the_core_dependencies(wheel, tiny_folder, tmp_path):
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    install = subprocess.run([python, "-m", "pip", "install", "-q", wheel], capture_output=True, text=True)
    assert install.returncode == 0, install.stderr
    script = (
        "import sys, phi3_jax\n"
        "checkpoint = phi3_jax.load(sys.argv[1])\n"
        "print(phi3_jax.infer.generate(checkpoint, [[5, 1, 7]], max_new_tokens=6)[0].token_ids)\n"
        "import phi3_jax.train\n"
    )
    done = subprocess.run([python, "-c", script, tiny_folder], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    expected = phi3_jax.infer.generate(phi3_jax.load(tiny_folder), [[5, 1, 7]], max_new_tokens=6)[0].token_ids
    assert done.stdout.strip() == str(expected)

    for program in PROJECT["project"]["scripts"]:
        helped = subprocess.run([python.parent / program, "--help"], capture_output=True, text=True, cwd=tmp_path)
        assert helped.stdout.startswith(f"{program}: "), helped.stderr
        assert "checkpoint" in helped.stdout or "--preset" in helped.stdout or "--archive" in helped.stdout
    # All say it by the same lines (test_program.py).
    version = subprocess.run([python.parent / program, "--version"], capture_output=True, text=True, cwd=tmp_path)
    assert version.stdout.startswith(f"{program} {PROJECT['project']['version']} (jax "), version.stderr
    command = [python.parent / "phi3-serve", "--checkpoint", tiny_folder]
    refused = subprocess.run(command, capture_output=True, text=True)
    assert refused.returncode == 1
    assert "pip install 'phi3_jax[serve]'" in refused.stderr
    # Reading GGUF is an extra: without it the message says how to get it.
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    command = [python.parent / "phi3-generate", "--checkpoint", tmp_path / "x.gguf", "--prompt", "hello"]
    refused = subprocess.run(command, capture_output=True, text=True)
    assert refused.returncode == 1
    assert "pip install 'phi3_jax[gguf]'" in refused.stderr

"""phi3-inspect, in this process where only its words matter, and started as a program where that does."""

import base64
import json
import os
import pty
import subprocess
import sys

import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver
from cache_folders import own_cache
from inspection_reports import random_report

import phi3_jax
from phi3_jax.infer.inspection import summary
from phi3_jax.infer.programs import inspect_main
from phi3_jax.infer.sampling import Sampling

PROMPT = "The capital of France is"


@pytest.fixture(scope="module", autouse=True)
def own_compilation_cache(tmp_path_factory):
    """The programs' compilation cache, apart from the user's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", own_cache(tmp_path_factory.mktemp("cache")))
        yield


def in_process(*args):
    with flagsaver.flagsaver():
        flags.FLAGS(["phi3-inspect", *args])
        return inspect_main.main()


@pytest.mark.parametrize(
    ("args", "told"),
    [
        ([], 'give one of --prompt and --prompt_file, as in --prompt "The capital of France is"'),
        (["--prompt", "a", "--prompt_file", "b"], "give one of --prompt and --prompt_file"),
        (["--prompt", "a", "--output", "/nowhere/there"], "--output=/nowhere/there: there is no folder /nowhere"),
        (["--prompt", "a", "--output", "/tmp"], "--output=/tmp: that is a folder; name a file in it"),
        (["--prompt", "a", "--system", "b"], "--system needs --chat"),
        (["--prompt", "a", "--seed", "3"], "--seed needs --generate"),
        (["--prompt", "a", "--generate", "3", "--seed", "-1"], "seed=-1"),
        (["--prompt", ""], "the prompt is empty: give it some words"),
        (["--prompt_file", "/dev/null"], "the prompt is empty: give it some words"),
        (["--weights", "--output", "b"], "--output is for the file of --format=json, give both"),
        (["--prompt", "a", "--preset", "phi-4"], "--preset needs --weights"),
        (["--prompt", "a", "--chat", "--parse_special"], "--parse_special is for a text as it is"),
        (["--weights", "--prompt", "a"], "--weights is about the model alone: leave --prompt out"),
        (["--weights", "--generate", "3"], "--weights is about the model alone: leave --generate out"),
        (["--weights", "--format", "html"], "--weights prints its table, and writes --format=json"),
        (["--weights", "--preset", "phi-4", "--checkpoint", "demo"], "--preset is the sizes alone"),
    ],
)
def test_flags_that_do_not_go_together(args, told, monkeypatch):
    monkeypatch.setattr(phi3_jax, "load", lambda *args, **kwargs: pytest.fail("a model is loaded"))
    with pytest.raises(ValueError, match=told.replace("(", r"\(")):
        in_process(*args)


def test_another_model_that_is_not_there_is_told_before_ours_is_loaded(monkeypatch):
    monkeypatch.setattr(phi3_jax, "load", lambda *args, **kwargs: pytest.fail("a model is loaded"))
    with pytest.raises(FileNotFoundError, match="/nowhere/there: no such folder or file"):
        in_process("--prompt", "a", "--compare", "/nowhere/there")


def test_a_preset_needs_no_weights(tmp_path, capfd):
    assert in_process("--weights", "--preset", "phi-3-mini", "--format", "json", "--output", f"{tmp_path}/mini") == 0
    table = json.loads((tmp_path / "mini.json").read_text(encoding="utf-8"))
    assert table["total"]["count"] == 3_821_079_552
    assert "phi-3-mini: 3.82 billion parameters" in capfd.readouterr().out


def test_names_of_files(monkeypatch, tmp_path):
    def places(*args):
        with flagsaver.flagsaver():
            flags.FLAGS(["phi3-inspect", *args])
            return {kind: str(place) for kind, place in inspect_main._places().items()}

    monkeypatch.chdir(tmp_path)
    assert places("--prompt", "a") == {"html": "inspect.html"}
    assert places("--format", "json", "--output", "some.json") == {"json": "some.json"}
    assert places("--format", "json", "--output", "some.v2") == {"json": "some.v2.json"}
    assert places("--format", "html", "--format", "json", "--output", "a.html") == {"html": "a.html", "json": "a.json"}
    os.mkfifo("pipe")
    assert places("--format", "json", "--output", "pipe") == {"json": "pipe"}
    assert places("--format", "json", "--output", "/dev/stdout") == {"json": "/dev/stdout"}
    with pytest.raises(ValueError, match="takes one --format, not 2"):
        places("--format", "json", "--format", "html", "--output", "/dev/stdout")


def test_no_text_moves_the_cursor():
    assert summary.shown("a\033[2Jb\n", 18) == "|a\\x1b[2Jb\\n|     "
    assert summary.shown("a long text, which is cut", 18) == "|a long text, wh~|"
    assert summary.shown("日本語", 10) == "|日本語|  "
    assert summary.shown("\u202ea") == "|\\u202ea|"
    lines = summary.lines(random_report())
    assert all(line.isprintable() for line in lines[1:])  # but for the model's name
    assert "  greedy   |</script><img src=x onerror=alert(1)>|" in lines


class Loaded(str):
    """What stands for a checkpoint: how it was loaded."""

    tokenizer = None


def test_what_is_loaded_run_and_compared(monkeypatch, tmp_path):
    """Each flag reaches what it is for; nothing is computed."""
    calls = []

    def load(path, dtype, *, quantize, adapter, on_progress):
        calls.append(("load", path, quantize, adapter))
        return Loaded(f"{path} {quantize} {adapter}")

    def recorded(name, result):
        return lambda *args, **kwargs: calls.append((name, *args)) or result

    monkeypatch.setattr(phi3_jax, "load", load)
    monkeypatch.setattr(inspect_main, "resolve", lambda path: path)
    monkeypatch.setattr(inspect_main, "_ids", lambda checkpoint, text: [len(text)])
    monkeypatch.setattr(inspect_main, "require_size", lambda *args: None)
    monkeypatch.setattr(inspect_main, "sampling_defaults", lambda checkpoint: Sampling(temperature=0.6))
    monkeypatch.setattr(
        inspect_main, "collect", lambda *args, sampling, **kwargs: {"temperature": sampling.temperature}
    )
    monkeypatch.setattr(inspect_main.texts, "add_vocabulary", lambda *args: None)
    monkeypatch.setattr(inspect_main.summary, "lines", lambda *args: [])
    for name in ("compare", "timeline"):
        monkeypatch.setattr(inspect_main, name, recorded(name, name))
    base = ["--prompt", "abc", "--format", "json", "--output", f"{tmp_path}/out", "--checkpoint", "/a/m.gguf"]

    def result(*args):
        calls.clear()
        assert in_process(*base, *args) == 0
        return json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))

    monkeypatch.setattr("phi3_jax.infer.programs.flags.holds_integers", lambda path: False)
    assert result() == {"temperature": 0.6}
    assert calls == [("load", "/a/m.gguf", None, None)]
    ours = "/a/m.gguf int8 x/y"
    assert result(
        "--quantize", "int8", "--adapter", "x/y", "--generate", "5", "--temperature", "0.9", "--seed", "4"
    ) == {
        "temperature": 0.9,
        "generation": "timeline",
    }
    assert calls == [("load", "/a/m.gguf", "int8", "x/y"), ("timeline", ours, [3], 5, 0.9, 4)]
    assert result("--quantize", "int8", "--adapter", "x/y", "--compare_quantize", "int4")["comparison"] == "compare"
    assert calls[1:] == [
        ("load", "/a/m.gguf", "int4", "x/y"),
        ("compare", ours, "/a/m.gguf int4 x/y", [3], "m with y, int4"),
    ]
    result("--quantize", "int8", "--adapter", "x/y", "--compare_adapter", "z/")
    assert calls[1:] == [
        ("load", "/a/m.gguf", "int8", "z/"),
        ("compare", ours, "/a/m.gguf int8 z/", [3], "m with z, int8"),
    ]
    result("--quantize", "int8", "--adapter", "x/y", "--compare", "/a/m.gguf")
    assert calls[1:] == [
        ("load", "/a/m.gguf", None, None),
        ("compare", ours, "/a/m.gguf None None", [3], "m"),
    ]


def started(*args, **options):
    command = [sys.executable, "-m", "phi3_jax.infer.programs.inspect_main", *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, **options)


@pytest.mark.slow
def test_as_a_user_runs_it(demo, tmp_path):
    (tmp_path / "prompt.txt").write_text(PROMPT, encoding="utf-8")
    (tmp_path / "out.json").write_text("old", encoding="utf-8")
    done = started("--prompt_file", f"{tmp_path}/prompt.txt", "--format", "json", "--output", f"{tmp_path}/out")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert sorted(os.listdir(tmp_path)) == ["out.json", "prompt.txt"]  # and nothing half written
    ids = demo.tokenizer.encode(PROMPT)
    logits = np.asarray(phi3_jax.Phi3(demo.config).apply({"params": demo.params}, np.asarray([ids])))[0]
    np.testing.assert_allclose(np.frombuffer(base64.b64decode(report["next"]["logits"]), "<f4"), logits[-1], 0, 2e-3)
    assert [report["vocabulary"][str(token)] for token, *_ in report["next"]["top"][:3]] == [
        " Paris",
        " the",
        " London",
    ]
    assert [token["text"] for token in report["tokens"]] == ["The", " capital", " of", " France", " is"]
    assert report["model"]["name"] == "demo"
    lines = done.stdout.splitlines()
    assert lines[0] == "demo: 134.5 million parameters, 30 layers x 9 heads, width 576, float32"
    assert any("| Paris|" in line and "77.2" in line for line in lines)
    assert "looks at | France| 0.90" in done.stdout
    assert "\033" not in done.stdout
    assert f"{tmp_path}/out.json: 0.3 MB" in done.stderr


def test_colours_only_where_they_are_wanted(monkeypatch):
    leader, follower = pty.openpty()
    with os.fdopen(follower, "w") as terminal:
        monkeypatch.setattr(sys, "stdout", terminal)
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.delenv("NO_COLOR", raising=False)
        assert inspect_main._is_coloured()
        monkeypatch.setenv("NO_COLOR", "1")
        assert not inspect_main._is_coloured()
    os.close(leader)


@pytest.mark.slow
def test_errors_are_one_line(tmp_path):
    for args, told in [
        (["--prompt", "a", "--format", "svg"], "--format=svg: value should be one of <html|png|json>"),
        (["--prompt", "a", "--checkpoint", f"{tmp_path}/none"], "no such folder or file"),
        (["--weights", "--preset", "phi-4", "--format", "json", "--output", "/dev/full"], "No space left on device"),
    ]:
        done = started(*args)
        assert done.returncode == 1
        assert done.stderr.count("\n") <= 2
        assert told in done.stderr, done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_file_may_go_to_standard_output(tmp_path):
    for place in ("/dev/stdout", f"{tmp_path}/pipe"):
        if "pipe" in place:
            os.mkfifo(place)
            reader = os.open(place, os.O_RDONLY | os.O_NONBLOCK)
        done = started("--weights", "--preset", "phi-4", "--format", "json", "--output", place)
        assert done.returncode == 0, done.stderr
        text, told = (done.stdout, done.stderr) if "pipe" not in place else (os.read(reader, 1 << 16), done.stdout)
        assert json.loads(text)["format"] == "phi3-weights"
        assert told.startswith("phi-4: 14.66 billion parameters")

"""phi3-generate, in this process where only its answers matter, and started as a program where that does."""

import json
import os
import pty
import signal
import subprocess
import sys
import time

import pytest
from absl import flags
from absl.testing import flagsaver
from cache_folders import own_cache
from forked_programs import forked
from generate_program import in_process

from phi3_jax.infer import generate
from phi3_jax.infer.programs import generate_main

PROMPT = "The capital of France is"
CHAT = ["--chat", "--prompt", "What is the capital of France?"]


@pytest.fixture(scope="module", autouse=True)
def own_compilation_cache(tmp_path_factory):
    """The programs' compilation cache, apart from the user's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", own_cache(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def program(demo, monkeypatch, capfd):
    """Runs the program's `main` with the weights that are loaded already -> standard output."""
    return in_process(demo, monkeypatch, capfd)


@pytest.mark.slow
@pytest.mark.parametrize(
    "option",
    [
        ["--stop", "answer"],
        ["--repetition_penalty", "1.5"],
        ["--presence_penalty", "2"],
        ["--frequency_penalty", "2"],
        ["--no_repeat_ngram_size", "1"],
        ["--max_new_tokens", "7"],
        ["--beams", "3"],
        ["--choice", "Lyon", "--choice", "Nice"],
        ["--regex", "[a-z ]+"],
        ["--temperature", "2"],
    ],
)
def test_every_option_reaches_the_model(program, demo, option):
    plain = program("--prompt", PROMPT, "--max_new_tokens", "24")
    assert plain == generate(demo, PROMPT, max_new_tokens=24)[0].text + "\n"
    other = program("--prompt", PROMPT, "--max_new_tokens", "24", *option)
    assert other != plain
    expected = {"--stop": plain[: plain.index("answer")], "--max_new_tokens": " Paris.\n\nThe answer is"}
    if option[0] in expected:
        assert other == expected[option[0]] + "\n"
    if option[0] == "--choice":
        assert other in ("Lyon\n", "Nice\n")


def test_tokens_by_number(program, demo):
    (paris,) = demo.tokenizer.encode(" Paris")
    (rome,) = demo.tokenizer.encode(" Rome")
    assert program("--prompt", PROMPT, "--max_new_tokens", "1") == " Paris\n"
    assert program("--prompt", PROMPT, "--max_new_tokens", "1", "--banned_tokens", f"{paris}") != " Paris\n"
    assert program("--prompt", PROMPT, "--max_new_tokens", "1", "--forced_tokens", f"{rome}") == " Rome\n"
    assert program("--prompt", PROMPT, "--max_new_tokens", "1", "--logit_bias", f"{rome}=1e4") == " Rome\n"


def test_a_json_schema_from_a_pipe(program):
    schema = {"type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}}, "required": ["city"]}
    read, write = os.pipe()  # as by a shell's <(...)
    with os.fdopen(read), os.fdopen(write, "w") as file:
        file.write(json.dumps({**schema, "additionalProperties": False}))
        file.close()
        assert json.loads(program(*CHAT, "--json_schema", f"/dev/fd/{read}"))["city"] in ("Paris", "Rome")


def test_special_tokens_in_the_prompt(program):
    text = ["--prompt", "The capital of France is<|im_end|>", "--max_new_tokens", "9"]
    assert program(*text, "--parse_special") != program(*text)


def test_a_prompt_in_a_file(program, tmp_path):
    (tmp_path / "prompt.txt").write_text(PROMPT)
    assert program("--prompt_file", str(tmp_path / "prompt.txt"), "--max_new_tokens", "1") == " Paris\n"


def test_a_prompt_file_that_is_no_text(program, tmp_path):
    (tmp_path / "prompt.txt").write_bytes(b"caf\xe9 au lait")
    with pytest.raises(ValueError, match=r"prompt\.txt: not a text in UTF-8 .*at byte 3"):
        program("--prompt_file", str(tmp_path / "prompt.txt"))


def test_a_minimum_length_keeps_the_answer_from_ending(program, demo):
    longer = program(*CHAT, "--min_new_tokens", "20", "--max_new_tokens", "24")
    assert longer.startswith("The capital of France is Paris.")
    assert len(longer) > 50


def test_options_that_shape_a_draw_reach_the_model(program):
    """At a temperature of 5 nearly anything comes, unless the rest is cut away: then it is the greedy answer."""
    for option in (["--top_k", "1"], ["--top_p", "1e-6"], ["--min_p", "1"]):
        assert program(*CHAT, "--temperature", "5", *option) == "The capital of France is Paris.\n", option


def test_a_prompt_cache_is_made_and_used(program, demo, tmp_path, capfd):
    cache = str(tmp_path / "cache.safetensors")
    system = ["--system", "You are a geographer. " * 5]
    plain = program(*CHAT, *system)
    assert program(*CHAT, *system, "--save_prompt_cache", cache) == plain
    other = ["--chat", "--prompt", "What is the highest mountain?", "--max_new_tokens", "12", *system]
    expected = program(*other)
    with flagsaver.flagsaver():
        flags.FLAGS(["phi3-generate", *other, "--prompt_cache", cache])
        assert generate_main.main() == 0
    out, err = capfd.readouterr()
    assert out == expected
    assert int(err[: err.index(" tokens from the prompt cache")]) > 30


@pytest.mark.slow
def test_guessing_is_reported_and_changes_nothing(program, capfd):
    text = [
        "--chat",
        "--prompt",
        "Repeat this: one two three four five six seven eight nine ten",
        "--max_new_tokens",
        "30",
    ]
    plain = program(*text)
    with flagsaver.flagsaver():
        flags.FLAGS(["phi3-generate", *text, "--speculate", "lookup", "--guesses", "5"])
        generate_main.main()
    out, err = capfd.readouterr()
    assert out == plain
    right, guessed = err[err.index("| ", err.index("decode")) + 2 :].split(" guesses right")[0].split(" of ")
    assert 0 < int(right) <= int(guessed)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "give one of --prompt"),
        (["--prompt", "x", "--prompt_file", "y"], "give one of --prompt"),
        (["--input", "x"], "--input and --output belong together"),
        (["--prompt", "x", "--logprobs", "1"], "--logprobs goes into the lines of --output"),
        (["--prompt", "x", "--system", "y"], "--system needs --chat"),
        (["--prompt", "x", "--beams", "2", "--save_prompt_cache", "y"], "--save_prompt_cache is for one prompt"),
        (["--prompt", "x", "--save_prompt_cache", "nowhere/y"], "there is no folder nowhere; make it first"),
        (["--prompt", "x", "--length_penalty", "2"], "--length_penalty needs --beams"),
        (["--prompt", "x", "--beams", "2", "--temperature", "1"], "beam search has no --temperature"),
        (["--prompt", "x", "--guesses", "2"], "--guesses needs --speculate"),
        (["--prompt", "x", "--regex", "a", "--choice", "b"], "only one of --regex, --choice"),
        (["--prompt", "x", "--top_k", "0"], "top_k=0 must be"),
        (["--prompt", "x", "--deadline", "nan"], "deadline=nan must be"),
        (["--input", "x", "--output", "y", "--deadline", "-1"], "deadline=-1.0 must be"),
        (
            ["--input", "x", "--output", "y", "--speculate", "demo"],
            "--speculate=demo is for one prompt: .* give lookup",
        ),
        (["--input", "x", "--output", "y", "--prompt_cache", "z"], "--prompt_cache=z is for one prompt"),
        (["--input", "x", "--output", "y", "--rope_policy", "batch"], "--rope_policy=batch is for one prompt"),
        (["--prompt", "x", "--ray", "auto"], "--ray is for --input and --output"),
        (["--input", "x", "--output", "y", "--beams", "2", "--ray", "auto"], "--ray is for .* without beams"),
        (["--input", "x", "--output", "y", "--ray_actors", "2"], "--ray_actors needs --ray"),
        (["--prompt", "x", "--logit_bias", "5"], "--logit_bias=5: give a token id and a number"),
        (["--prompt", "x", "--banned_tokens", "1,two"], "--banned_tokens: \\['two'\\] are not token ids"),
    ],
)
def test_flags_that_contradict(program, args, message, monkeypatch):
    monkeypatch.setattr(generate_main.common, "load_checkpoint", None)  # before it is called
    with pytest.raises(ValueError, match=message):
        program(*args)


# The program itself.


def run_program(*args: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "phi3_jax.infer.programs.generate_main", *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=240)


@pytest.mark.slow
def test_a_second_start_does_not_compile_again(demo, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", own_cache(tmp_path))
    compiled = tmp_path / "phi3_jax" / "compiled"
    args = ["--checkpoint", "demo", "--prompt", "Water boils at", "--max_new_tokens", "4"]
    run_program(*args)
    assert len(first := {path.name for path in compiled.iterdir()}) > 3
    run_program(*args)  # a program that were not found would be written under a new name
    assert {path.name for path in compiled.iterdir()} == first


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """The program, started in milliseconds; what it says on both of its streams comes together."""
    folder = tmp_path_factory.mktemp("started")
    with forked("phi3_jax.infer.programs.generate_main", folder / "log", own_cache(folder)) as forks:
        yield forks


def test_program_answers_and_reports(demo, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", own_cache(tmp_path))
    done = run_program("--checkpoint", "demo", *CHAT, "--compilation_cache_dir=")
    assert not (tmp_path / "phi3_jax" / "compiled").exists()
    assert done.returncode == 0, done.stderr
    assert done.stdout == "The capital of France is Paris.\n"
    assert "prefill" in done.stderr
    assert "decode 7 tokens in" in done.stderr
    assert "compile" in done.stderr


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--checkpoint", "nowhere", "--prompt", "x"], "phi3-generate: nowhere: no such folder or file"),
        (["--checkpoint", "demo", "--prompt", ""], "phi3-generate: prompt 0 is empty"),
        (["--checkpoint", "demo", "--prompt", "x", "--top_k", "many"], "phi3-generate: flag --top_k=many"),
        (["--checkpoint", "demo", "--prompt", "two", "words"], "unexpected arguments ['words']; quote text"),
    ],
)
def test_program_errors_are_one_line(demo, started, args, message):
    code, told, _ = started.run(*args)
    assert (code, len(told.strip().splitlines())) == (1, 1)
    assert message in told


@pytest.mark.slow
def test_ctrl_c_prints_what_there_is(demo):
    """On a real terminal: the interrupt comes in the middle of a long answer."""
    leader, follower = pty.openpty()
    command = [sys.executable, "-m", "phi3_jax.infer.programs.generate_main", "--checkpoint", "demo"]
    command += ["--prompt", "Once upon a time", "--max_new_tokens", "2000"]
    process = subprocess.Popen(command, stdout=follower, stderr=subprocess.PIPE, text=True)
    seen, deadline = b"", time.time() + 120
    while len(seen.split()) < 10 and time.time() < deadline:
        seen += os.read(leader, 100)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    os.close(follower), os.close(leader)
    assert process.returncode == -signal.SIGINT
    assert "decode" in errors
    assert "Traceback" not in errors


OTHERS = ("benchmark", "chat", "export", "inspect", "quantize", "random", "serve")  # programs with flags of their own


def test_help_is_grouped_by_topic(started):
    code, told, _ = started.run("--help")
    lines = told.splitlines() if code == 0 else []
    topics = [line for line in lines if line and not line.startswith(" ")]
    assert topics[0].startswith("phi3-generate: ")
    assert {"Prompt", "Many prompts", "Model", "Drawing tokens", "Beam search", "Starting faster"} <= set(topics)
    shown = {line.strip().lstrip("-").partition("=")[0] for line in lines if line.startswith("  --")}
    own = {
        flag.name
        for module, module_flags in flags.FLAGS.flags_by_module_dict().items()
        if module.startswith(("phi3_jax.infer", "phi3_jax.command_line"))
        and not any(other in module for other in OTHERS)
        for flag in module_flags
    }
    assert own | {"output"} == shown  # in this process, phi3-inspect's may have taken its place

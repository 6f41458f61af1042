"""phi3-generate's --input and --output: a file of requests, or many on the machines of a cluster."""

from __future__ import annotations

import dataclasses
import logging
import sys
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

from absl import flags
from tqdm import tqdm

import phi3_jax
from phi3_jax.command_line.interrupts import settle
from phi3_jax.command_line.progress import progress_bar

from ..beam import MOST_BEAMS, beam_search
from ..engine import Options
from ..sampling import Sampling
from ..serving.batch import AnswerFile, Defaults, Request, answer_all, room_for
from ..serving.batch.json_lines import open_file
from ..serving.batch.openai_form import MOST_CHOICES, ApiRequest, answer_lines, lengths_of
from ..serving.batch.ray_pipeline import FolderRun, find_inputs
from ..serving.batch.workers import Plan
from ..serving.engine import Engine
from . import flags as common

INPUT = flags.DEFINE_string(
    "input",
    None,
    'JSON lines, each with "prompt" or with "messages" of a chat, and what else it wants: "id", "max_new_tokens", '
    '"temperature", "seed" and the other flags about tokens.',
)
OUTPUT = flags.DEFINE_string(
    "output",
    None,
    "Where the lines go with their answers. An interrupted run goes on where it stopped, with the same command.",
)
RAY = flags.DEFINE_string(
    "ray",
    None,
    "The address of a Ray cluster, auto for that of this machine, or local for a new one: --input names several files, "
    "such as 'questions/*.jsonl' or 's3://bucket/questions/*.jsonl', and --output a folder. Needs the extra ray.",
)
RAY_ACTORS = flags.DEFINE_integer(
    "ray_actors",
    None,
    "With --ray: how many copies of the model answer. By default one for each GPU or TPU, or else each machine.",
    lower_bound=1,
    upper_bound=1 << 16,
)
BATCH_SIZE = flags.DEFINE_integer(
    "batch_size",
    8,
    "How many lines are answered at a time: one that ends makes room for the next.",
    lower_bound=1,
    upper_bound=4096,
)
LOGPROBS = flags.DEFINE_integer(
    "logprobs",
    None,
    "Add each token's log-probability and those of the n most likely ones.",
    lower_bound=0,
    upper_bound=1 << 20,
)
ECHO = flags.DEFINE_bool("echo", False, "With --logprobs: add the prompt's, too.")
BEAMS = flags.DEFINE_integer(
    "beams", 1, "Above 1: beam search with so many beams.", lower_bound=1, upper_bound=MOST_BEAMS
)
LENGTH_PENALTY = flags.DEFINE_float(
    "length_penalty", 1.0, "The power of the length that a beam's log-probability is divided by."
)
# The shared flags that change no answer: an interrupted run may go on with other values of them.
_ONLY_SPEED = [
    flag.name for flag in (common.PREFILL_CHUNK, common.SPECULATE, common.GUESSES, common.PROMPT_CACHE, common.VERBOSE)
]
_NOT_FOR_FILES: list[tuple[flags.FlagHolder[Any], str]] = [
    (common.PROMPT_CACHE, "what lines of a file begin with is read once by itself; leave it out"),
    (common.ROPE_POLICY, "the lines of a file come and go, so each goes by its own length; leave it out"),
]
_BODIES_SAY = [  # in OpenAI's form, what in ours is said by these
    *(common.CHAT, common.SYSTEM, common.PARSE_SPECIAL, LOGPROBS, ECHO, BEAMS),
    *(flag for topic in common.TOPICS if topic not in ("Model", "Speed and memory") for flag in common.TOPICS[topic]),
]
_BODIES_LEAVE_OPEN = ("deadline", "seed")


def check() -> None:
    """Raises ValueError for flags that contradict one another, or that would have no effect."""
    if (INPUT.value is None) != (OUTPUT.value is None):
        raise ValueError("--input and --output belong together")
    for flag in (LOGPROBS, ECHO):
        if flag.present and INPUT.value is None:
            raise ValueError(f"--{flag.name} goes into the lines of --output: give --input and --output")
    if RAY.value is not None and (INPUT.value is None or BEAMS.value > 1):
        raise ValueError("--ray is for --input and --output, without beams")
    if RAY.value == "":
        raise ValueError("--ray= names no cluster: give its address, auto or local")
    if RAY_ACTORS.value is not None and RAY.value is None:
        raise ValueError("--ray_actors needs --ray")
    if INPUT.value is not None and BEAMS.value == 1:
        if common.SPECULATE.value not in (None, "lookup"):
            raise ValueError(f"--speculate={common.SPECULATE.value} is for one prompt: with files give lookup")
        for flag, why in _NOT_FOR_FILES:
            if flag.value != flag.default:
                raise ValueError(f"--{flag.name}={flag.value} is for one prompt: {why}")


def answer() -> int:
    """Answers what --input names -> exit code: 1 if an answer ended with an error, which its line tells."""
    output = Path(OUTPUT.value or "")
    if RAY.value:
        return answer_folder(INPUT.value or "", output, RAY.value)
    return answer_file(Path(INPUT.value or ""), output)


def answer_file(input_: Path, output: Path) -> int:
    """Answers every line of a file -> exit code."""
    plan = _plan()
    requests = plan.read(open_file(input_))
    for request in requests:
        _check_request(request, plan.defaults, f"{input_}:{request.line}")
    checkpoint = common.load_checkpoint()
    ours = [(f"{input_}:{request.line}", request) for request in requests if isinstance(request, Request)]
    plan.defaults.check_grammars(ours, checkpoint)
    prompts = []
    with progress_bar("reading", "line") as on_progress:
        for name, request in ours:
            # A list of numbers would take nine times the memory.
            prompts.append(array("i", plan.defaults.prompt_of(request, checkpoint, name)))
            on_progress(len(prompts), len(ours))
    with (
        AnswerFile(output, requests, _settings()) as file,
        tqdm(total=len(requests), initial=file.done, unit="answer", disable=None) as bar,
    ):
        try:
            for index, answer in _answers(checkpoint, plan, requests, prompts, file.missing):
                file.write(index, answer)
                bar.update()
        except KeyboardInterrupt:  # or another signal
            return _stopped(file.done, len(requests))
    return _finished(file.failed, len(requests), output)


def answer_folder(pattern: str, output: Path, address: str) -> int:
    """Answers the lines of several files on the machines of a cluster -> exit code."""
    plan = _plan()
    run = FolderRun(
        find_inputs(pattern),
        output,
        plan,
        _settings(),
        lambda request, name: _check_request(request, plan.defaults, name),
    )
    with tqdm(total=run.total, initial=run.done, unit="answer", disable=None) as bar:
        try:
            for _ in run.answer(address, RAY_ACTORS.value):
                bar.update()
        except KeyboardInterrupt:  # or another signal
            return _stopped(int(bar.n), run.total)
    return _finished(run.failed, run.total, output)


def _stopped(done: int, total: int) -> int:
    settle()
    print(f"stopped after {done} of {total}: the same command goes on", file=sys.stderr)
    return 1  # rather, the program ends by the signal


def _finished(failed: int, total: int, output: Path) -> int:
    if failed:
        print(
            f'phi3-generate: {failed} of {total} answers ended with an error: see "error" in {output}', file=sys.stderr
        )
    return int(failed > 0)


_Indexed = Iterator[tuple[int, dict[str, Any]]]


def _answers(
    checkpoint: phi3_jax.Checkpoint,
    plan: Plan,
    requests: Sequence[Request] | Sequence[ApiRequest],
    prompts: Sequence[Sequence[int]],
    missing: Sequence[int],
) -> _Indexed:
    """The output fields of the missing answers, as they end, with their indices."""
    plan = dataclasses.replace(plan.with_lists_of(requests), slots=max(1, min(plan.slots, len(missing))))
    defaults = plan.defaults
    theirs = [(index, request) for index in missing if isinstance(request := requests[index], ApiRequest)]
    ours = [(index, request) for index in missing if isinstance(request := requests[index], Request)]

    def engine(lengths: list[tuple[int, int]], choices: int = 1) -> Engine:
        room = room_for(checkpoint, plan.slots, lengths, plan.cache_dtype)
        return Engine(checkpoint, plan.engine_options(room, choices))

    if theirs:
        logging.getLogger("phi3_jax.serving").setLevel(logging.WARNING)  # a server's log has a line for each request
        lengths = lengths_of(checkpoint, [request for _, request in theirs])
        return answer_lines(checkpoint, engine(lengths, MOST_CHOICES), theirs, defaults.seconds)
    if BEAMS.value > 1:
        return _searched(checkpoint, [(index, prompts[index], defaults.limit_of(request)) for index, request in ours])
    lengths = [(len(prompts[index]), defaults.limit_of(request)) for index, request in ours]
    jobs = (((index, request), defaults.job_of(request, prompts[index])) for index, request in ours)
    results = answer_all(engine(lengths), jobs)
    return ((index, defaults.answer_to(request, result, checkpoint)) for (index, request), result in results)


def _searched(checkpoint: phi3_jax.Checkpoint, prompts: Sequence[tuple[int, Sequence[int], int]]) -> _Indexed:
    """The same by beam search, in batches, of indices, prompts and limits."""
    options = dataclasses.replace(common.options(checkpoint), logprobs=LOGPROBS.value, echo=ECHO.value)
    for begin in range(0, len(prompts), BATCH_SIZE.value):
        indices, batch, limits = zip(*prompts[begin : begin + BATCH_SIZE.value], strict=True)
        yield from zip(indices, search(checkpoint, batch, limits, options), strict=True)


def _defaults() -> Defaults:
    """What the flags say for lines that do not say it themselves."""
    tools = common.tools()
    return Defaults(
        common.MAX_NEW_TOKENS.value,
        common.CHAT.value,
        common.SYSTEM.value,
        common.PARSE_SPECIAL.value,
        tuple(common.STOP.value),
        common.DEADLINE.value,
        tools,
        cast(Any, common.TOOL_CHOICE.value),
        common.grammar(tools) if common.TOOL_CHOICE.value == "auto" else None,
        LOGPROBS.value,
        ECHO.value,
    )


def _plan() -> Plan:
    """What a machine has to know beside the lines."""
    chunk = common.PREFILL_CHUNK.value if common.PREFILL_CHUNK.present else None
    return Plan(
        common.load_arguments(),
        _defaults(),
        common.sampling(),
        BATCH_SIZE.value,
        chunk,
        common.CACHE_DTYPE.value,
        common.guesses(),
    )


def _settings() -> dict[str, object]:
    """The flags that answers depend on: an interrupted run goes on only with the same."""
    own = {flag.name: flag.value for flag in (common.CHAT, common.PARSE_SPECIAL, LOGPROBS, ECHO, BEAMS, LENGTH_PENALTY)}
    shared = {name: value for name, value in common.settings().items() if name not in _ONLY_SPEED}
    if (tools := common.tools()) is not None:
        shared[common.TOOLS.name] = tools  # what the file says, not only its name
    return {**shared, **own, common.SYSTEM.name: common.SYSTEM.value}


def search(
    checkpoint: phi3_jax.Checkpoint, prompts: Sequence[Sequence[int]], limits: Sequence[int], options: Options
) -> list[dict[str, Any]]:
    """What --beams finds for prompts: the fields of the best answer to each."""
    found = beam_search(checkpoint, prompts, limits, BEAMS.value, length_penalty=LENGTH_PENALTY.value, options=options)
    # An answer has a score, or an error.
    return [
        {
            name: value
            for name, value in dataclasses.asdict(best).items()
            if name != ("error" if best.error is None else "score")
        }
        for best, *_ in found
    ]


def _check_request(request: Request | ApiRequest, defaults: Defaults, name: str) -> None:
    """Raises ValueError with the line's number, before the model is loaded, for what no model can answer."""
    if isinstance(request, ApiRequest):
        if changed := [
            f"--{flag.name}"
            for flag in _BODIES_SAY
            if flag.value != flag.default and flag.name not in _BODIES_LEAVE_OPEN
        ]:
            raise ValueError(f"{name}: in OpenAI's form a line's body says this: leave {' and '.join(changed)} out")
        return
    own = request.fields.keys() & {"tools", *(field.name for field in dataclasses.fields(Sampling))}
    if BEAMS.value > 1 and own:
        raise ValueError(f"{name}: beam search has no {', '.join(sorted(own))}; leave it out, or --beams")
    try:
        defaults.check(request)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error

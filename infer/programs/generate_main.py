"""phi3-generate: continues a prompt, or answers it as a chat; one on the terminal, or a file of them.

phi3-generate --checkpoint demo --prompt "The capital of France is"
phi3-generate --checkpoint demo --chat --prompt "Who wrote Hamlet?" --temperature 0.7
phi3-generate --checkpoint microsoft/Phi-4-mini-instruct --chat --tools tools.json --prompt "Is it raining in Rome?"
phi3-generate --checkpoint demo --input questions.jsonl --output answers.jsonl --batch_size 8
phi3-generate --checkpoint demo --input 's3://bucket/questions/*.jsonl' --output answers --ray auto
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

from absl import flags
from tqdm import tqdm

import phi3_jax
from phi3_jax.checkpoint import require_tokenizer
from phi3_jax.command_line.interrupts import asked, interruptible, settle
from phi3_jax.command_line.program import run_program
from phi3_jax.text import ToolCallParser

from ..answer import Answer, write_answers
from ..beam import MOST_BEAMS, beam_search
from ..engine import Options, Run
from ..sampling import Sampling
from ..serving.batch import AnswerFile, Defaults, Request, answer_all, room_for
from ..serving.batch.json_lines import open_file
from ..serving.batch.openai_form import MOST_CHOICES, ApiRequest, answer_lines, lengths_of
from ..serving.batch.ray_pipeline import FolderRun, find_inputs
from ..serving.batch.workers import Plan
from ..serving.engine import Engine
from . import flags as common
from .calls import print_calls

_INPUT = flags.DEFINE_string(
    "input",
    None,
    'JSON lines, each with "prompt" or with "messages" of a chat, and what else it wants: "id", "max_new_tokens", '
    '"temperature", "seed" and the other flags about tokens.',
)
_OUTPUT = flags.DEFINE_string(
    "output",
    None,
    "Where the lines go with their answers. An interrupted run goes on where it stopped, with the same command.",
)
_RAY = flags.DEFINE_string(
    "ray",
    None,
    "The address of a Ray cluster, auto for that of this machine, or local for a new one: --input names several files, "
    "such as 'questions/*.jsonl' or 's3://bucket/questions/*.jsonl', and --output a folder. Needs the extra ray.",
)
_RAY_ACTORS = flags.DEFINE_integer(
    "ray_actors",
    None,
    "With --ray: how many copies of the model answer. By default one for each GPU or TPU, or else each machine.",
    lower_bound=1,
    upper_bound=1 << 16,
)
_BATCH_SIZE = flags.DEFINE_integer(
    "batch_size",
    8,
    "How many lines are answered at a time: one that ends makes room for the next.",
    lower_bound=1,
    upper_bound=4096,
)
_LOGPROBS = flags.DEFINE_integer(
    "logprobs",
    None,
    "Add each token's log-probability and those of the n most likely ones.",
    lower_bound=0,
    upper_bound=1 << 20,
)
_ECHO = flags.DEFINE_bool("echo", False, "With --logprobs: add the prompt's, too.")
_BEAMS = flags.DEFINE_integer(
    "beams", 1, "Above 1: beam search with so many beams.", lower_bound=1, upper_bound=MOST_BEAMS
)
_LENGTH_PENALTY = flags.DEFINE_float(
    "length_penalty", 1.0, "The power of the length that a beam's log-probability is divided by."
)
_SAVE_PROMPT_CACHE = flags.DEFINE_string(
    "save_prompt_cache", None, "Where to keep what the model makes of the prompt, for --prompt_cache."
)

_TOPICS: dict[str, list[flags.FlagHolder[Any]]] = {
    "Prompt": [common.PROMPT, common.PROMPT_FILE, common.CHAT, common.SYSTEM, common.PARSE_SPECIAL],
    "Many prompts": [_INPUT, _OUTPUT, _BATCH_SIZE, _LOGPROBS, _ECHO, _RAY, _RAY_ACTORS],
    **{topic: list(holders) for topic, holders in common.TOPICS.items()},
    "Beam search": [_BEAMS, _LENGTH_PENALTY],
}
_TOPICS["Speed and memory"].append(_SAVE_PROMPT_CACHE)
# The shared flags that change no answer: an interrupted run may go on with other values of them.
_ONLY_SPEED = [
    flag.name for flag in (common.PREFILL_CHUNK, common.SPECULATE, common.GUESSES, common.PROMPT_CACHE, common.VERBOSE)
]
_NOT_FOR_FILES: list[tuple[flags.FlagHolder[Any], str]] = [
    (common.PROMPT_CACHE, "what lines of a file begin with is read once by itself; leave it out"),
    (common.ROPE_POLICY, "the lines of a file come and go, so each goes by its own length; leave it out"),
]
_BODIES_SAY = [  # in OpenAI's form, what in ours is said by these
    *(common.CHAT, common.SYSTEM, common.PARSE_SPECIAL, _LOGPROBS, _ECHO, _BEAMS),
    *(flag for topic in common.TOPICS if topic not in ("Model", "Speed and memory") for flag in common.TOPICS[topic]),
]
_BODIES_LEAVE_OPEN = ("deadline", "seed")
_FOR_BEAMS = ("Model", "Speed and memory")  # topics of the shared flags that beam search takes, with --max_new_tokens


def main() -> int:
    """Loads, answers, reports."""
    _check_flags()
    common.check()
    if _INPUT.value and _OUTPUT.value and _RAY.value:
        return answer_folder(_INPUT.value, Path(_OUTPUT.value), _RAY.value)
    if _INPUT.value and _OUTPUT.value:
        return answer_file(Path(_INPUT.value), Path(_OUTPUT.value))
    text, tools = common.prompt_text(), common.tools() if common.CHAT.value else None
    common.grammar(tools)  # raises before the model is loaded
    checkpoint = common.load_checkpoint()
    tokenizer, most = require_tokenizer(checkpoint), checkpoint.config.max_position_embeddings
    if common.CHAT.value:
        ids = phi3_jax.encode_chat(tokenizer, _with_system([_user(text)]), tools=tools, most=most)
        return answer_prompt(checkpoint, ids, tools)
    ids = tokenizer.encode(text, parse_special=common.PARSE_SPECIAL.value, add_eos=False, most=most)
    return answer_prompt(checkpoint, ids)


def answer_prompt(checkpoint: phi3_jax.Checkpoint, ids: list[int], tools: list[Any] | None = None) -> int:
    """Streams the answer to standard output, and reports on standard error where the time went -> exit code.

    With tools, the calls come behind the rest of the answer.
    """
    limit, options = common.MAX_NEW_TOKENS.value, common.options(checkpoint)
    if _BEAMS.value > 1:
        (found,) = _search(checkpoint, [ids], [limit], options)
        if "error" in found:
            raise ValueError(found["error"])
        print(found["text"])
        return 0
    run = Run(checkpoint, [ids], [limit], [common.sampling()], options, [common.grammar(tools)])
    answer, save_as = Answer(checkpoint, stop=common.STOP.value, markers=tools is not None), _SAVE_PROMPT_CACHE.value
    parser, content = None if tools is None else ToolCallParser(tools), ""
    pieces = write_answers(run, [answer], interrupt=lambda: asked() is not None)
    # Until there is something to print, while programs are compiled and the prompt is read, signals end it as ever.
    first = list(itertools.islice(pieces, 1))
    with interruptible():
        for piece in itertools.chain(first, pieces):
            text = piece.text if parser is None else parser.push(piece.text)
            print(text, end="", flush=True)
            content += text
            if save_as and piece.token_ids:  # the first token is there: exactly the prompt has been read
                run.prompt_cache().save(save_as)
                save_as = None
    if parser is not None:
        print(text := parser.flush(), end="")
        content += text
    if content or parser is None or not parser.calls:
        print(flush=True)
    if parser is not None:
        print_calls(parser.calls, parser.problems, "phi3-generate")
    result = answer.finish()
    if result.error is not None:
        raise ValueError(result.error)
    print(report(run, len(ids), len(result.token_ids)), file=sys.stderr)
    return int(result.finish_reason == "interrupt")  # rather, the program ends by the signal


def report(run: Run, prompt_tokens: int, new_tokens: int) -> str:
    """One line on where the time went. Reading the prompt also gives the first token, so decoding wrote one less."""

    def phase(name: str, tokens: int, seconds: float) -> str:
        rate = f" ({tokens / seconds:.1f} tokens/s)" if tokens and seconds else ""
        return f"{name} {tokens} tokens in {seconds:.2f} s{rate}"

    timings, (guessed, right) = run.timings, run.guesses
    parts = [f"{run.reused} tokens from the prompt cache"] if run.reused else []
    parts.append(phase("prefill", prompt_tokens - run.reused, timings.prefill))
    parts.append(phase("decode", max(new_tokens - 1, 0), timings.decode))
    parts += [f"{right} of {guessed} guesses right"] if guessed else []
    return " | ".join([*parts, f"compile {timings.compile:.2f} s"])


def answer_file(input_: Path, output: Path) -> int:
    """Answers every line of a file -> exit code: 1 if an answer ended with an error, which its line tells."""
    plan = _plan()
    requests = plan.read(open_file(input_))
    for request in requests:
        _check_request(request, plan.defaults, f"{input_}:{request.line}")
    checkpoint = common.load_checkpoint()
    prompts = [
        plan.defaults.prompt_of(request, checkpoint, f"{input_}:{request.line}")
        for request in requests
        if isinstance(request, Request)
    ]
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
    """Answers the lines of several files on the machines of a cluster -> exit code, as `answer_file`."""
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
            for _ in run.answer(address, _RAY_ACTORS.value):
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
    prompts: Sequence[list[int]],
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
    if _BEAMS.value > 1:
        return _searched(checkpoint, [(index, prompts[index], defaults.limit_of(request)) for index, request in ours])
    jobs = [((index, request), defaults.job_of(request, prompts[index])) for index, request in ours]
    results = answer_all(engine([(len(job.prompt), job.max_new_tokens) for _, job in jobs]), jobs)
    return ((index, defaults.answer_to(request, result, checkpoint)) for (index, request), result in results)


def _searched(checkpoint: phi3_jax.Checkpoint, prompts: Sequence[tuple[int, list[int], int]]) -> _Indexed:
    """The same by beam search, in batches, of indices, prompts and limits."""
    options = dataclasses.replace(common.options(checkpoint), logprobs=_LOGPROBS.value, echo=_ECHO.value)
    for begin in range(0, len(prompts), _BATCH_SIZE.value):
        indices, batch, limits = zip(*prompts[begin : begin + _BATCH_SIZE.value], strict=True)
        yield from zip(indices, _search(checkpoint, batch, limits, options), strict=True)


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
        _LOGPROBS.value,
        _ECHO.value,
    )


def _plan() -> Plan:
    """What a machine has to know beside the lines."""
    chunk = common.PREFILL_CHUNK.value if common.PREFILL_CHUNK.present else None
    return Plan(
        common.load_arguments(),
        _defaults(),
        common.sampling(),
        _BATCH_SIZE.value,
        chunk,
        common.CACHE_DTYPE.value,
        common.guesses(),
    )


def _settings() -> dict[str, object]:
    """The flags that answers depend on: an interrupted run goes on only with the same."""
    own = {
        flag.name: flag.value for flag in (common.CHAT, common.PARSE_SPECIAL, _LOGPROBS, _ECHO, _BEAMS, _LENGTH_PENALTY)
    }
    shared = {name: value for name, value in common.settings().items() if name not in _ONLY_SPEED}
    if (tools := common.tools()) is not None:
        shared[common.TOOLS.name] = tools  # what the file says, not only its name
    return {**shared, **own, common.SYSTEM.name: common.SYSTEM.value}


def _search(
    checkpoint: phi3_jax.Checkpoint, prompts: Sequence[list[int]], limits: Sequence[int], options: Options
) -> list[dict[str, Any]]:
    found = beam_search(
        checkpoint, prompts, limits, _BEAMS.value, length_penalty=_LENGTH_PENALTY.value, options=options
    )
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
    if _BEAMS.value > 1 and own:
        raise ValueError(f"{name}: beam search has no {', '.join(sorted(own))}; leave it out, or --beams")
    try:
        defaults.check(request)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def _with_system(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    system = common.SYSTEM.value
    return messages if system is None else [{"role": "system", "content": system}, *messages]


def _check_flags() -> None:
    """Raises ValueError for flags that contradict one another, or that would have no effect."""
    prompts = [flag for flag in (common.PROMPT, common.PROMPT_FILE, _INPUT) if flag.value is not None]
    if len(prompts) != 1:
        raise ValueError("give one of --prompt, --prompt_file and --input")
    if (_INPUT.value is None) != (_OUTPUT.value is None):
        raise ValueError("--input and --output belong together")
    for flag in (_LOGPROBS, _ECHO):
        if flag.present and _INPUT.value is None:
            raise ValueError(f"--{flag.name} goes into the lines of --output: give --input and --output")
    if common.SYSTEM.value is not None and not common.CHAT.value and _INPUT.value is None:
        raise ValueError("--system needs --chat")
    if common.TOOLS.value is not None and not common.CHAT.value and _INPUT.value is None:
        raise ValueError("--tools needs --chat")
    if _SAVE_PROMPT_CACHE.value and (_INPUT.value or _BEAMS.value > 1):
        raise ValueError("--save_prompt_cache is for one prompt, without beams")
    if _SAVE_PROMPT_CACHE.value and not (folder := Path(_SAVE_PROMPT_CACHE.value).parent).is_dir():
        raise ValueError(f"--save_prompt_cache={_SAVE_PROMPT_CACHE.value}: there is no folder {folder}; make it first")
    if _RAY.value is not None and (_INPUT.value is None or _BEAMS.value > 1):
        raise ValueError("--ray is for --input and --output, without beams")
    if _RAY_ACTORS.value is not None and _RAY.value is None:
        raise ValueError("--ray_actors needs --ray")
    if _INPUT.value is not None and _BEAMS.value == 1:
        if common.SPECULATE.value not in (None, "lookup"):
            raise ValueError(f"--speculate={common.SPECULATE.value} is for one prompt: with files give lookup")
        for flag, why in _NOT_FOR_FILES:
            if flag.value != flag.default:
                raise ValueError(f"--{flag.name}={flag.value} is for one prompt: {why}")
    if _LENGTH_PENALTY.present and _BEAMS.value == 1:
        raise ValueError("--length_penalty needs --beams")
    if _BEAMS.value > 1 and (unknown := sorted(set(common.settings()) - _known_to_beams())):
        raise ValueError(f"beam search has no {', '.join('--' + name for name in unknown)}")


def _known_to_beams() -> set[str]:
    known = [common.MAX_NEW_TOKENS, *(holder for topic in _FOR_BEAMS for holder in common.TOPICS[topic])]
    return {holder.name for holder in known}


def run() -> None:
    """The console script."""
    run_program("phi3-generate", main, _TOPICS)


if __name__ == "__main__":
    run()

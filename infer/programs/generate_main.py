"""phi3-generate: continues a prompt, or answers it as a chat; one on the terminal, or a file of them.

phi3-generate --checkpoint demo --prompt "The capital of France is"
phi3-generate --checkpoint demo --chat --prompt "Who wrote Hamlet?" --temperature 0.7
phi3-generate --checkpoint microsoft/Phi-4-mini-instruct --chat --tools tools.json --prompt "Is it raining in Rome?"
phi3-generate --checkpoint demo --input questions.jsonl --output answers.jsonl --batch_size 8
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags
from tqdm import tqdm

import phi3_jax
from phi3_jax.checkpoint import require_tokenizer
from phi3_jax.command_line.interrupts import asked, interruptible, settle
from phi3_jax.command_line.program import run_program
from phi3_jax.text import ToolCallParser

from ..answer import Answer, Generation, write_answers
from ..beam import MOST_BEAMS, beam_search
from ..engine import Options, Run
from ..generate import generate
from ..prompts import check_prompt
from ..sampling import Sampling, SamplingArrays, TokenLogprob
from . import flags as common
from .answer_file import AnswerFile
from .calls import print_calls
from .requests import Request, read_requests

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
_BATCH_SIZE = flags.DEFINE_integer(
    "batch_size", 8, "How many lines are answered at a time.", lower_bound=1, upper_bound=4096
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
    "Many prompts": [_INPUT, _OUTPUT, _BATCH_SIZE, _LOGPROBS, _ECHO],
    **{topic: list(holders) for topic, holders in common.TOPICS.items()},
    "Beam search": [_BEAMS, _LENGTH_PENALTY],
}
_TOPICS["Speed and memory"].append(_SAVE_PROMPT_CACHE)
# The shared flags that change no answer: an interrupted run may go on with other values of them.
_ONLY_SPEED = [
    flag.name for flag in (common.PREFILL_CHUNK, common.SPECULATE, common.GUESSES, common.PROMPT_CACHE, common.VERBOSE)
]
_FOR_BEAMS = ("Model", "Speed and memory")  # topics of the shared flags that beam search takes, with --max_new_tokens


def main() -> int:
    """Loads, answers, reports."""
    _check_flags()
    common.check()
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
    requests = read_requests(input_, common.sampling())
    for request in requests:
        _check_request(request, f"{input_}:{request.line}")
    checkpoint = common.load_checkpoint()
    prompts = [_request_ids(checkpoint, request, f"{input_}:{request.line}") for request in requests]
    options = dataclasses.replace(common.options(checkpoint), logprobs=_LOGPROBS.value, echo=_ECHO.value)
    if _BEAMS.value == 1:
        # The last batch may be short: it runs the others' programs.
        options = dataclasses.replace(options, rows=min(_BATCH_SIZE.value, len(requests)))
    own = {
        flag.name: flag.value for flag in (common.CHAT, common.PARSE_SPECIAL, _LOGPROBS, _ECHO, _BEAMS, _LENGTH_PENALTY)
    }
    shared = {name: value for name, value in common.settings().items() if name not in _ONLY_SPEED}
    if (tools := common.tools()) is not None:
        shared[common.TOOLS.name] = tools  # what the file says, not only its name
    with (
        AnswerFile(output, requests, {**shared, **own, common.SYSTEM.name: common.SYSTEM.value}) as file,
        tqdm(total=len(requests), initial=file.done, unit="answer", disable=None) as bar,
    ):
        try:
            while file.done < len(requests):
                batch = slice(file.done, file.done + _BATCH_SIZE.value)
                for answer in _answers(checkpoint, requests[batch], prompts[batch], options):
                    file.write(answer)
                    bar.update()
        except KeyboardInterrupt:  # or another signal
            settle()
            print(f"stopped after {file.done} of {len(requests)}: the same command goes on", file=sys.stderr)
            return 1  # rather, the program ends by the signal
    if file.failed:
        print(
            f'phi3-generate: {file.failed} of {len(requests)} answers ended with an error: see "error" in {output}',
            file=sys.stderr,
        )
    return int(file.failed > 0)


def _answers(
    checkpoint: phi3_jax.Checkpoint,
    requests: Sequence[Request],
    prompts: Sequence[list[int]],
    options: Options,
) -> list[dict[str, Any]]:
    """The output fields of each answer."""
    limits = [request.max_new_tokens or common.MAX_NEW_TOKENS.value for request in requests]
    if _BEAMS.value > 1:
        return _search(checkpoint, prompts, limits, options)
    results = generate(
        checkpoint,
        prompts,
        limits,
        sampling=[request.sampling for request in requests],
        stop=common.STOP.value,
        grammar=[common.grammar(_tools(request)) for request in requests],
        options=options,
    )
    return [
        _fields(result, _tools(request), checkpoint.tokenizer)
        for result, request in zip(results, requests, strict=True)
    ]


def _fields(result: Generation, tools: list[Any] | None, tokenizer: phi3_jax.Tokenizer | None) -> dict[str, Any]:
    fields: dict[str, Any] = {"text": result.text, "token_ids": result.token_ids, "finish_reason": result.finish_reason}
    if tools is not None:
        reply = phi3_jax.parse_tool_calls(result.token_ids, tokenizer, tools=tools)
        fields["content"] = reply.content if reply.calls else result.text
        fields["tool_calls"] = [call.as_message_part(f"call{i:05}") for i, call in enumerate(reply.calls)]
        fields |= {"tool_problems": reply.problems} if reply.problems else {}
    fields |= {"error": result.error} if result.error is not None else {}
    for name in ("logprobs", "prompt_logprobs"):
        entries: list[TokenLogprob] | None = getattr(result, name)
        fields |= {name: [dataclasses.asdict(entry) for entry in entries]} if entries is not None else {}
    return fields


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


def _check_request(request: Request, name: str) -> None:
    """Raises ValueError with the line's number, before the model is loaded, for what no model can answer."""
    own = request.fields.keys() & {"tools", *(field.name for field in dataclasses.fields(Sampling))}
    if _BEAMS.value > 1 and own:
        raise ValueError(f"{name}: beam search has no {', '.join(sorted(own))}; leave it out, or --beams")
    if request.tools is not None and request.messages is None and not common.CHAT.value:
        raise ValueError(f'{name}: "tools" are for chats: give "messages", or --chat')
    try:
        common.grammar(_tools(request))  # raises if the line has no tools and --tool_choice wants calls
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _request_ids(checkpoint: phi3_jax.Checkpoint, request: Request, name: str) -> list[int]:
    """The token ids of a request's prompt. Raises ValueError with the line's number, before anything runs."""
    tokenizer, most = require_tokenizer(checkpoint), checkpoint.config.max_position_embeddings
    text = request.prompt or ""
    try:
        if request.messages is not None or common.CHAT.value:
            messages = [_user(text)] if request.messages is None else request.messages
            ids = phi3_jax.encode_chat(tokenizer, _with_system(messages), tools=_tools(request), most=most)
        else:
            ids = tokenizer.encode(text, parse_special=common.PARSE_SPECIAL.value, add_eos=False, most=most)
        SamplingArrays.of([request.sampling], checkpoint.config.vocab_size)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    check_prompt(checkpoint, ids, name)
    return ids


def _tools(request: Request) -> list[Any] | None:
    """What a request's answer may call: its own tools, or those of --tools if it is a chat."""
    if request.messages is None and not common.CHAT.value:
        return None
    return common.tools() if request.tools is None else request.tools


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

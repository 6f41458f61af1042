"""phi3-generate: continues a prompt, or answers it as a chat; one on the terminal, or a file of them.

phi3-generate --checkpoint demo --prompt "The capital of France is"
phi3-generate --checkpoint demo --chat --prompt "Who wrote Hamlet?" --temperature 0.7
phi3-generate --checkpoint microsoft/Phi-4-mini-instruct --chat --tools tools.json --prompt "Is it raining in Rome?"
phi3-generate --checkpoint demo --input questions.jsonl --output answers.jsonl --batch_size 8
phi3-generate --checkpoint demo --input 's3://bucket/questions/*.jsonl' --output answers --ray auto
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Any

from absl import flags

import phi3_jax
from phi3_jax.checkpoint import require_tokenizer
from phi3_jax.command_line.interrupts import asked, interruptible
from phi3_jax.command_line.program import run_program
from phi3_jax.text import ToolCallParser

from ..answer import Answer, write_answers
from ..engine import Run
from . import files
from . import flags as common
from .calls import print_calls

_SAVE_PROMPT_CACHE = flags.DEFINE_string(
    "save_prompt_cache", None, "Where to keep what the model makes of the prompt, for --prompt_cache."
)

_TOPICS: dict[str, list[flags.FlagHolder[Any]]] = {
    "Prompt": [common.PROMPT, common.PROMPT_FILE, common.CHAT, common.SYSTEM, common.PARSE_SPECIAL],
    "Many prompts": [
        files.INPUT,
        files.OUTPUT,
        files.BATCH_SIZE,
        files.LOGPROBS,
        files.ECHO,
        files.RAY,
        files.RAY_ACTORS,
    ],
    **{topic: list(holders) for topic, holders in common.TOPICS.items()},
    "Beam search": [files.BEAMS, files.LENGTH_PENALTY],
}
_TOPICS["Speed and memory"].append(_SAVE_PROMPT_CACHE)
_FOR_BEAMS = ("Model", "Speed and memory")  # topics of the shared flags that beam search takes, with --max_new_tokens


def main() -> int:
    """Loads, answers, reports."""
    _check_flags()
    common.check()
    if files.INPUT.value is not None:
        return files.answer()
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
    if files.BEAMS.value > 1:
        (found,) = files.search(checkpoint, [ids], [limit], options)
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


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def _with_system(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    system = common.SYSTEM.value
    return messages if system is None else [{"role": "system", "content": system}, *messages]


def _check_flags() -> None:
    """Raises ValueError for flags that contradict one another, or that would have no effect."""
    prompts = [flag for flag in (common.PROMPT, common.PROMPT_FILE, files.INPUT) if flag.value is not None]
    if len(prompts) != 1:
        raise ValueError("give one of --prompt, --prompt_file and --input")
    files.check()
    if common.SYSTEM.value is not None and not common.CHAT.value and files.INPUT.value is None:
        raise ValueError("--system needs --chat")
    if common.TOOLS.value is not None and not common.CHAT.value and files.INPUT.value is None:
        raise ValueError("--tools needs --chat")
    if _SAVE_PROMPT_CACHE.value and (files.INPUT.value or files.BEAMS.value > 1):
        raise ValueError("--save_prompt_cache is for one prompt, without beams")
    if _SAVE_PROMPT_CACHE.value and not (folder := Path(_SAVE_PROMPT_CACHE.value).parent).is_dir():
        raise ValueError(f"--save_prompt_cache={_SAVE_PROMPT_CACHE.value}: there is no folder {folder}; make it first")
    if files.LENGTH_PENALTY.present and files.BEAMS.value == 1:
        raise ValueError("--length_penalty needs --beams")
    if files.BEAMS.value > 1 and (unknown := sorted(set(common.settings()) - _known_to_beams())):
        raise ValueError(f"beam search has no {', '.join('--' + name for name in unknown)}")


def _known_to_beams() -> set[str]:
    known = [common.MAX_NEW_TOKENS, *(holder for topic in _FOR_BEAMS for holder in common.TOPICS[topic])]
    return {holder.name for holder in known}


def run() -> None:
    """The console script."""
    run_program("phi3-generate", main, _TOPICS)


if __name__ == "__main__":
    run()

"""phi3-generate: continues a prompt, or answers it as a chat, on the terminal.

phi3-generate --checkpoint demo --prompt "The capital of France is"
"""

from __future__ import annotations

import sys

import jax
from absl import flags
from tqdm import tqdm

import phi3_jax

from .generate import Answer
from .program import run_program
from .sampling import Sampling
from .stream import CACHE_DTYPES, PREFILL_CHUNK, Timings, stream

_CHECKPOINT = flags.DEFINE_string(
    "checkpoint",
    "demo",
    "A Hugging Face folder, a .gguf file, a hub id such as microsoft/Phi-3-mini-4k-instruct, or demo.",
)
_PROMPT = flags.DEFINE_string("prompt", None, "The text to continue, or with --chat the user's message.", required=True)
_CHAT = flags.DEFINE_bool("chat", False, "Put the prompt into the checkpoint's chat template.")
_SYSTEM = flags.DEFINE_string("system", None, "A system message, for --chat.")
_PARSE_SPECIAL = flags.DEFINE_bool("parse_special", False, "Let text such as <|user|> in the prompt be special tokens.")
_MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 128, "The most tokens to write.", lower_bound=1)
_TEMPERATURE = flags.DEFINE_float(
    "temperature", 0.0, "0: always the most likely token; higher: more random.", lower_bound=0
)
_TOP_K = flags.DEFINE_integer("top_k", None, "Draw from the k most likely tokens.")
_TOP_P = flags.DEFINE_float("top_p", None, "Draw from the fewest tokens that have this probability together.")
_MIN_P = flags.DEFINE_float("min_p", None, "Draw from tokens at least this fraction as likely as the most likely one.")
_TYPICAL_P = flags.DEFINE_float("typical_p", None, "Draw from tokens of typical surprise that have this probability.")
_REPETITION_PENALTY = flags.DEFINE_float("repetition_penalty", 1.0, "Above 1: tokens of prompt and answer less likely.")
_PRESENCE_PENALTY = flags.DEFINE_float("presence_penalty", 0.0, "Off the logits of tokens that the answer has.")
_FREQUENCY_PENALTY = flags.DEFINE_float("frequency_penalty", 0.0, "The same, for each time that it has them.")
_NO_REPEAT_NGRAM_SIZE = flags.DEFINE_integer("no_repeat_ngram_size", 0, "No sequence of this many tokens comes twice.")
_MIN_NEW_TOKENS = flags.DEFINE_integer("min_new_tokens", 0, "The answer does not end before.")
_STOP = flags.DEFINE_multi_string("stop", [], "A string that ends the answer; may be given several times.")
_SEED = flags.DEFINE_integer("seed", 0, "Of the random draws at a temperature above 0.")
_PREFILL_CHUNK = flags.DEFINE_integer(
    "prefill_chunk", PREFILL_CHUNK, "How many tokens of the prompt are read at a time.", lower_bound=1
)
_CACHE_DTYPE = flags.DEFINE_enum(
    "cache_dtype",
    None,
    [name for name in CACHE_DTYPES if name],
    "What keys and values are kept as; int8 takes a quarter of float32's memory. By default the weights' own type, "
    "on the CPU float32.",
)
_DTYPE = flags.DEFINE_enum(
    "dtype",
    "auto",
    ["auto", "float32", "bfloat16", "float16"],
    "What the weights become. auto: float32 on the CPU, where XLA is slow in bfloat16, and bfloat16 elsewhere.",
)


def load_with_progress(path: str, dtype: str) -> phi3_jax.Checkpoint:
    """`phi3_jax.load` with a progress bar on the terminal, where it takes more than a second."""
    if dtype == "auto":
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    with tqdm(unit="B", unit_scale=True, unit_divisor=1000, desc="loading", delay=1, disable=None) as bar:

        def on_progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        return phi3_jax.load(path, dtype, on_progress=on_progress)


def prompt_ids(checkpoint: phi3_jax.Checkpoint) -> list[int]:
    """The prompt of the command line as token ids."""
    if checkpoint.tokenizer is None:
        raise ValueError(
            f"{_CHECKPOINT.value}: no tokenizer.json or tokenizer.model there; put one of them beside the weights"
        )
    if not _CHAT.value:
        if _SYSTEM.value is not None:
            raise ValueError("--system needs --chat")
        return checkpoint.tokenizer.encode(_PROMPT.value, parse_special=_PARSE_SPECIAL.value)
    messages = [{"role": "user", "content": _PROMPT.value}]
    if _SYSTEM.value is not None:
        messages.insert(0, {"role": "system", "content": _SYSTEM.value})
    return phi3_jax.encode_chat(checkpoint.tokenizer, messages)


def answer(checkpoint: phi3_jax.Checkpoint, ids: list[int]) -> tuple[Timings, int, bool]:
    """Streams the answer to standard output -> (timings, number of new tokens, whether Ctrl-C ended it)."""
    timings, written, interrupted = Timings(), 0, False
    result = Answer(checkpoint, _STOP.value)
    steps = stream(
        checkpoint,
        [ids],
        _MAX_NEW_TOKENS.value,
        sampling=[sampling()],
        prefill_chunk=_PREFILL_CHUNK.value,
        cache_dtype=_CACHE_DTYPE.value,
        steps=1,
        is_over=lambda row: result.stopped,
        timings=timings,
    )
    try:
        for (tokens,) in steps:
            text = result.add(tokens)
            written += len(text)
            print(text, end="", flush=True)
    except KeyboardInterrupt:
        interrupted = True
    print(result.finish().text[written:], flush=True)
    return timings, len(result.token_ids), interrupted


def sampling() -> Sampling:
    """How the command line wants tokens to be picked."""
    return Sampling(
        temperature=_TEMPERATURE.value,
        top_k=_TOP_K.value,
        top_p=_TOP_P.value,
        min_p=_MIN_P.value,
        typical_p=_TYPICAL_P.value,
        repetition_penalty=_REPETITION_PENALTY.value,
        presence_penalty=_PRESENCE_PENALTY.value,
        frequency_penalty=_FREQUENCY_PENALTY.value,
        no_repeat_ngram_size=_NO_REPEAT_NGRAM_SIZE.value,
        min_new_tokens=_MIN_NEW_TOKENS.value,
        seed=_SEED.value,
    )


def report(timings: Timings, prompt_tokens: int, new_tokens: int) -> str:
    """One line on where the time went. Reading the prompt also gives the first token, so decoding wrote one less."""
    decoded = max(new_tokens - 1, 0)

    def phase(name: str, tokens: int, seconds: float) -> str:
        rate = f" ({tokens / seconds:.1f} tokens/s)" if tokens and seconds else ""
        return f"{name} {tokens} tokens in {seconds:.2f} s{rate}"

    parts = [phase("prefill", prompt_tokens, timings.prefill), phase("decode", decoded, timings.decode)]
    return " | ".join([*parts, f"compile {timings.compile:.2f} s"])


def main() -> int:
    """Loads, answers, reports."""
    checkpoint = load_with_progress(_CHECKPOINT.value, _DTYPE.value)
    ids = prompt_ids(checkpoint)
    timings, count, interrupted = answer(checkpoint, ids)
    print(report(timings, len(ids), count), file=sys.stderr)
    return 130 if interrupted else 0


def run() -> None:
    """The console script."""
    run_program("phi3-generate", main)


if __name__ == "__main__":
    run()

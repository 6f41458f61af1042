"""The flags that several programs share, and the library's objects that they stand for."""

from __future__ import annotations

import functools
import sys
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

import phi3_jax
from phi3_jax.checkpoint import holds_integers, read_config
from phi3_jax.command_line.model_flags import ADAPTER, CHECKPOINT, QUANTIZE
from phi3_jax.command_line.progress import progress_bar
from phi3_jax.json_files import SETTINGS, decode, parse, read_bytes
from phi3_jax.kernels import status
from phi3_jax.model import parameter_shapes
from phi3_jax.regular_file import read_text
from phi3_jax.text import call_schema, read_tools

from ..engine import DraftModel, Options, PromptCache, PromptLookup, RopePolicy
from ..engine.buckets import own_cache_dtype
from ..engine.options import CACHE_DTYPES, MOST_TOKENS
from ..engine.speculation import MOST_GUESSES
from ..sampling import Grammar, Sampling

DTYPE = flags.DEFINE_enum(
    "dtype",
    "auto",
    ["auto", "float32", "bfloat16", "float16"],
    "What weights become that are not quantised. auto: float32 on the CPU, elsewhere bfloat16. On the CPU bfloat16 is "
    "rounded a little, reads half as much, and needs a C++ compiler: XLA alone is slow in it.",
)
VERBOSE = flags.DEFINE_bool(
    "verbose",
    False,
    "Say on standard error which implementation runs and why not another; in a chat also where the time went.",
)

PROMPT = flags.DEFINE_string("prompt", None, "The text to continue, or with --chat the user's message.")
PROMPT_FILE = flags.DEFINE_string("prompt_file", None, "A file that holds it; - is standard input.")
CHAT = flags.DEFINE_bool("chat", False, "Put the prompt into the checkpoint's chat template.")
PARSE_SPECIAL = flags.DEFINE_bool("parse_special", False, "Let text such as <|user|> in the prompt be special tokens.")
SYSTEM = flags.DEFINE_string("system", None, "A system message at the beginning of a chat.")
MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 128, "The most tokens of an answer.", lower_bound=1)
MIN_NEW_TOKENS = flags.DEFINE_integer("min_new_tokens", 0, "The least tokens of an answer: it does not end before.")
STOP = flags.DEFINE_multi_string("stop", [], "A string that ends an answer; may be given several times.")
DEADLINE = flags.DEFINE_float("deadline", None, "Seconds after which an answer ends as it is.")

TEMPERATURE = flags.DEFINE_float(
    "temperature", 0.0, "0: always the most likely token; higher: more random.", lower_bound=0
)
TOP_K = flags.DEFINE_integer("top_k", None, "Draw from the k most likely tokens.")
TOP_P = flags.DEFINE_float("top_p", None, "Draw from the fewest tokens that have this probability together.")
MIN_P = flags.DEFINE_float("min_p", None, "Draw from tokens at least this fraction as likely as the most likely one.")
TYPICAL_P = flags.DEFINE_float("typical_p", None, "Draw from tokens of typical surprise that have this probability.")
SEED = flags.DEFINE_integer("seed", 0, "Of the random draws at a temperature above 0.")

REPETITION_PENALTY = flags.DEFINE_float("repetition_penalty", 1.0, "Above 1: tokens of prompt and answer less likely.")
PRESENCE_PENALTY = flags.DEFINE_float(
    "presence_penalty", 0.0, "Subtracted from the logits of tokens in the answer so far."
)
FREQUENCY_PENALTY = flags.DEFINE_float("frequency_penalty", 0.0, "The same, once for each time that a token is there.")
NO_REPEAT_NGRAM_SIZE = flags.DEFINE_integer("no_repeat_ngram_size", 0, "No sequence of this many tokens comes twice.")
LOGIT_BIAS = flags.DEFINE_multi_string("logit_bias", [], "ID=X: add X to a token's logit; may be given several times.")
BANNED_TOKENS = flags.DEFINE_list("banned_tokens", [], "Token ids that never come, with commas between.")
FORCED_TOKENS = flags.DEFINE_list("forced_tokens", [], "Token ids that an answer begins with.")

JSON_SCHEMA = flags.DEFINE_string("json_schema", None, "A file with a JSON schema that an answer fits.")
REGEX = flags.DEFINE_string("regex", None, "A regular expression that an answer matches as a whole.")
CHOICE = flags.DEFINE_multi_string("choice", [], "A text that an answer may be; give several.")

TOOLS = flags.DEFINE_string(
    "tools",
    None,
    'A JSON file with a list of functions that the model may call: {"type": "function", "function": {"name": ..., '
    '"description": ..., "parameters": a JSON schema}}. Calls are printed as JSON, one a line.',
)
TOOL_CHOICE = flags.DEFINE_enum(
    "tool_choice",
    "auto",
    ["auto", "required", "one"],
    "required: the answer is a list of calls, whose arguments fit the functions' schemas; one: of one call. Needs the "
    "extra grammar.",
)

PREFILL_CHUNK = flags.DEFINE_integer(
    "prefill_chunk",
    Options().prefill_chunk,
    "How many tokens of the prompt are read at a time.",
    lower_bound=1,
    upper_bound=MOST_TOKENS,
)
CACHE_DTYPE = flags.DEFINE_enum(
    "cache_dtype",
    None,
    CACHE_DTYPES,
    "What keys and values are kept as; int8 takes a quarter of float32's memory. By default the weights' own type, "
    "bfloat16 for quantised weights; on a CPU without compiled kernels float32.",
)
ROPE_POLICY = flags.DEFINE_enum(
    "rope_policy",
    "length",
    typing.get_args(RopePolicy),
    "What LongRoPE picks its factors by. length: each row's own length, which is exact, and reads a row again "
    "that grows past the border; capacity: the length that it may grow to, which never reads again; batch: the longest "
    "row's, as transformers does.",
)
SPECULATE = flags.DEFINE_string(
    "speculate",
    None,
    "Guess tokens ahead, which changes nothing but the speed: lookup (they come from the text so far; for answers that "
    "copy), or a smaller checkpoint with the same vocabulary; one of the same sizes gets the --adapter, too.",
)
GUESSES = flags.DEFINE_integer(
    "guesses", None, "How many tokens to guess at a time.", lower_bound=1, upper_bound=MOST_GUESSES
)
PROMPT_CACHE = flags.DEFINE_string(
    "prompt_cache", None, "A file of --save_prompt_cache; what the prompt has in common with it is not read again."
)

TOPICS: dict[str, list[flags.FlagHolder[Any]]] = {
    "Model": [CHECKPOINT, ADAPTER, DTYPE, QUANTIZE, VERBOSE],
    "Length of an answer": [MAX_NEW_TOKENS, MIN_NEW_TOKENS, STOP, DEADLINE],
    "Drawing tokens": [TEMPERATURE, TOP_K, TOP_P, MIN_P, TYPICAL_P, SEED],
    "Changing how likely tokens are": [
        REPETITION_PENALTY,
        PRESENCE_PENALTY,
        FREQUENCY_PENALTY,
        NO_REPEAT_NGRAM_SIZE,
        LOGIT_BIAS,
        BANNED_TOKENS,
        FORCED_TOKENS,
    ],
    "Answers of a given form (one of these; needs the extra grammar)": [JSON_SCHEMA, REGEX, CHOICE],
    "Functions to call, in a chat": [TOOLS, TOOL_CHOICE],
    "Speed and memory": [PREFILL_CHUNK, CACHE_DTYPE, ROPE_POLICY, SPECULATE, GUESSES, PROMPT_CACHE],
}


def prompt_text() -> str:
    """What --prompt or --prompt_file says; a pipe can be read once only."""
    if PROMPT_FILE.value is None:
        return PROMPT.value or ""
    return sys.stdin.read() if PROMPT_FILE.value == "-" else read_text(PROMPT_FILE.value)


def load_checkpoint() -> phi3_jax.Checkpoint:
    """Loads --checkpoint with --quantize and --adapter; a progress bar appears after a second."""
    return _load(CHECKPOINT.value, DTYPE.value, QUANTIZE.value, ADAPTER.value)


def load_arguments() -> dict[str, Any]:
    """The arguments of `phi3_jax.load` that do the same on another machine."""
    return {"path": CHECKPOINT.value, "dtype": DTYPE.value, "quantize": QUANTIZE.value, "adapter": ADAPTER.value}


def load_draft(path: str, checkpoint: phi3_jax.Checkpoint) -> phi3_jax.Checkpoint:
    """Loads the draft model of --speculate, for a model.

    --dtype and --quantize are for it, too, unless it is integers already; and --adapter, if it has the model's sizes:
    then it is the same model, perhaps rounded, and guesses better with the adapter.
    """
    adapter = None
    if ADAPTER.value is not None:
        ours = parameter_shapes(checkpoint.config).items()
        theirs = {name: size for name, size in parameter_shapes(read_config(path)).items() if name != "lm_head/weight"}
        adapter = ADAPTER.value if theirs.items() <= ours else None
    if holds_integers(path):
        return _load(path, "auto", None, adapter)
    return _load(path, DTYPE.value, QUANTIZE.value, adapter)


def load_other(path: str, quantize: str | None, adapter: str | None) -> phi3_jax.Checkpoint:
    """Loads another model than --checkpoint, with the same --dtype unless it is integers already."""
    return _load(path, "auto" if holds_integers(path) else DTYPE.value, quantize, adapter)


def _load(path: str, dtype: str, quantize: str | None, adapter: str | None) -> phi3_jax.Checkpoint:
    with progress_bar("loading") as on_progress:
        checkpoint = phi3_jax.load(path, dtype, quantize=quantize, adapter=adapter, on_progress=on_progress)
    if VERBOSE.value:
        cache_dtype = CACHE_DTYPE.value or own_cache_dtype(checkpoint)
        for operation, answer in status(checkpoint.params, cache_dtype, checkpoint.config.head_dim).items():
            print(f"{operation}: {answer}", file=sys.stderr)
    return checkpoint


def sampling() -> Sampling:
    """How tokens are picked, from the flags."""
    return Sampling(
        temperature=TEMPERATURE.value,
        top_k=TOP_K.value,
        top_p=TOP_P.value,
        min_p=MIN_P.value,
        typical_p=TYPICAL_P.value,
        repetition_penalty=REPETITION_PENALTY.value,
        presence_penalty=PRESENCE_PENALTY.value,
        frequency_penalty=FREQUENCY_PENALTY.value,
        logit_bias=_logit_bias(),
        banned_tokens=_token_ids("banned_tokens", BANNED_TOKENS.value),
        forced_tokens=_token_ids("forced_tokens", FORCED_TOKENS.value),
        no_repeat_ngram_size=NO_REPEAT_NGRAM_SIZE.value,
        min_new_tokens=MIN_NEW_TOKENS.value,
        seed=SEED.value,
    )


def options(checkpoint: phi3_jax.Checkpoint) -> Options:
    """How the run is carried out, from the flags."""
    cache = PROMPT_CACHE.value
    return Options(
        prefill_chunk=PREFILL_CHUNK.value,
        cache_dtype=CACHE_DTYPE.value,
        rope_policy=typing.cast(RopePolicy, ROPE_POLICY.value),
        deadline=DEADLINE.value,
        speculation=_speculation(checkpoint),
        prompt_cache=None if cache is None else PromptCache.load(cache, checkpoint),
    )


def tools() -> list[Any] | None:
    """The functions of --tools. Raises ValueError, with the file's name, if it holds something else."""
    return None if TOOLS.value is None else _read_tools(TOOLS.value)


@functools.lru_cache(maxsize=1)
def _read_tools(path: str) -> list[Any]:
    try:
        return read_tools(parse(read_bytes(Path(path), SETTINGS)))
    except ValueError as error:
        raise ValueError(f"{path}: not a JSON file with a list of functions: {error}") from None


@functools.lru_cache(maxsize=1)  # a pipe can be read once only
def _read_schema(path: str) -> str:
    """The text of a schema. Raises ValueError, with the file's name, if it is no JSON."""
    data = read_bytes(Path(path), SETTINGS)
    try:
        parse(data)
        return decode(data)
    except ValueError as error:
        raise ValueError(f"{path}: not a JSON schema: {error}") from None


def grammar(tools: Sequence[Any] | None = None) -> Grammar | None:
    """What answers must match, from the flags. Raises ValueError if more than one grammar is given.

    Args:
      tools: what may be called, with another --tool_choice than auto.
    """
    _check_grammars()
    if TOOL_CHOICE.value != "auto":
        if not tools:
            raise ValueError(f"--tool_choice={TOOL_CHOICE.value} needs --tools")
        return Grammar.json_schema(call_schema(tools, 1 if TOOL_CHOICE.value == "one" else None))
    if JSON_SCHEMA.value:
        return Grammar.json_schema(_read_schema(JSON_SCHEMA.value))
    if REGEX.value:
        return Grammar.regex(REGEX.value)
    return Grammar.choice(CHOICE.value) if CHOICE.value else None


def _check_grammars() -> None:
    asked = [flag for flag in (JSON_SCHEMA, REGEX, CHOICE) if flag.value]
    asked += [TOOL_CHOICE] if TOOL_CHOICE.value != "auto" else []
    if len(asked) > 1:
        raise ValueError(f"give only one of {', '.join('--' + flag.name for flag in asked)}")


def check() -> None:
    """Raises ValueError, before a model is loaded, for what none can do."""
    sampling()
    _check_grammars()
    Options(deadline=DEADLINE.value)
    if GUESSES.value is not None and SPECULATE.value is None:
        raise ValueError("--guesses needs --speculate")


def settings() -> dict[str, object]:
    """All shared flags that differ from their defaults, for comparing two runs."""
    holders = [holder for topic in TOPICS.values() for holder in topic]
    return {holder.name: holder.value for holder in holders if holder.value != holder.default}


def guesses() -> int:
    """How many tokens --speculate guesses at a time; 0 without it."""
    if SPECULATE.value is None:
        return 0
    return PromptLookup().guesses if GUESSES.value is None else GUESSES.value


def _speculation(checkpoint: phi3_jax.Checkpoint) -> PromptLookup | DraftModel | None:
    if SPECULATE.value is None:
        return None
    guesses = {} if GUESSES.value is None else {"guesses": GUESSES.value}
    if SPECULATE.value == "lookup":
        return PromptLookup(**guesses)
    return DraftModel(load_draft(SPECULATE.value, checkpoint), **guesses)


def _logit_bias() -> dict[int, float]:
    bias = {}
    for text in LOGIT_BIAS.value:
        token, _, number = text.partition("=")
        try:
            bias[int(token)] = float(number)
        except ValueError:
            raise ValueError(f"--logit_bias={text}: give a token id and a number, as in --logit_bias=3681=-5") from None
    return bias


def _token_ids(name: str, values: list[str]) -> list[int]:
    if wrong := [value for value in values if not value.strip().isdecimal()]:
        raise ValueError(f"--{name}: {wrong} are not token ids; give numbers with commas between")
    return [int(value) for value in values]

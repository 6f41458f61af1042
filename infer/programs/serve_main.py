"""phi3-serve: a server that speaks OpenAI's protocol, with a chat page.

phi3-serve --checkpoint demo
phi3-serve --checkpoint microsoft/Phi-3-mini-4k-instruct --quantize int4 --adapter law=adapters/law --port 8080
phi3-serve --checkpoint demo --host 0.0.0.0 --api_keys keys.txt

It listens on this machine alone, unless there are API keys: in the file of --api_keys, one a line, or in the
environment variable PHI3_API_KEYS. SIGTERM and Ctrl-C end it once what it has begun is answered; a second one at once.
The log, a line of JSON for each request, goes to standard error. infer/serving/README.md is the guide.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any, cast

from absl import flags

from phi3_jax.checkpoint import Checkpoint, require_tokenizer
from phi3_jax.command_line.model_flags import CHECKPOINT, QUANTIZE
from phi3_jax.command_line.program import run_program

from ..engine import PromptLookup
from ..engine.buckets import own_cache_dtype, rows_that_fit
from ..sampling import Sampling
from ..serving.engine import Engine, EngineOptions
from ..serving.engine.pooling import POOLINGS
from ..serving.http.gate import Access, Limits
from ..serving.http.gate.keys import VARIABLE, read_keys
from ..serving.http.gate.limits import host_name, is_loopback
from . import flags as common

_HOST = flags.DEFINE_string("host", "127.0.0.1", "The address to listen at; another than this machine's needs keys.")
_PORT = flags.DEFINE_integer(
    "port", 8000, "The port; 0 takes a free one. The address is printed.", lower_bound=0, upper_bound=65535
)
_NAME = flags.DEFINE_string("name", None, "What requests call the model; by default the end of --checkpoint.")
_SLOTS = flags.DEFINE_string(
    "slots", "auto", "How many answers are written at a time; auto: as many as have room in memory, up to 16."
)
_ROOM = flags.DEFINE_integer(
    "room", 4096, "The most tokens of a request and its answer; at most the model's context.", lower_bound=2
)
_QUEUE = flags.DEFINE_integer("queue", 256, "How many answers may wait; who comes then is told to.", lower_bound=0)
_PREFIX_MEMORY = flags.DEFINE_integer(
    "prefix_memory", 1024, "MiB for what prompts begin with, which then is not read again; 0: none.", lower_bound=0
)
_API_KEYS = flags.DEFINE_string("api_keys", None, f"A file with API keys, one a line; {VARIABLE} may hold some, too.")
_INSECURE = flags.DEFINE_bool(
    "insecure", False, "Given twice: listen at another address without keys, so that everyone there can use it."
)
_ALLOW_HOST = flags.DEFINE_multi_string(
    "allow_host", [], "A name that a reverse proxy on this machine passes on; may be given several times."
)
_CORS = flags.DEFINE_multi_string(
    "cors", [], "A site whose pages may use the server, as https://example.com; may be given several times."
)
_LOG_PROMPTS = flags.DEFINE_bool("log_prompts", False, "Write into the log what users ask.")
_BODY = flags.DEFINE_integer("max_body", Limits().body_bytes, "The most bytes of a request.", lower_bound=1024)
_CONNECTIONS = flags.DEFINE_integer("connections", Limits().connections, "The most connections.", lower_bound=1)
_CHOICES = flags.DEFINE_integer("max_choices", Limits().choices, "The most answers to one request.", lower_bound=1)
_REQUEST_SECONDS = flags.DEFINE_float(
    "request_seconds", Limits().request_seconds, "After so many an answer ends as it is.", lower_bound=0.1
)
_DRAIN_SECONDS = flags.DEFINE_integer(
    "drain_seconds", 30, "How long the server goes on answering once it is told to end.", lower_bound=0
)
_POOLING = flags.DEFINE_enum("pooling", "mean", POOLINGS, "What embeddings are of a text's last hidden states.")
_MOST_SLOTS = 16

_TOPICS: dict[str, list[flags.FlagHolder[Any]]] = {
    "Model": [CHECKPOINT, common.DTYPE, QUANTIZE, common.VERBOSE, _NAME],
    "Where it listens": [_HOST, _PORT, _ALLOW_HOST, _CORS],
    "Who may use it": [_API_KEYS, _INSECURE, _LOG_PROMPTS],
    "How much at a time": [_SLOTS, _ROOM, _QUEUE, _CONNECTIONS],
    "Speed and memory": [_PREFIX_MEMORY, common.CACHE_DTYPE, common.SPECULATE, common.GUESSES],
    "The most of a request": [common.MAX_NEW_TOKENS, _CHOICES, _BODY, _REQUEST_SECONDS, _DRAIN_SECONDS],
    "What requests leave open": [
        common.TEMPERATURE,
        common.TOP_K,
        common.TOP_P,
        common.MIN_P,
        common.TYPICAL_P,
        common.REPETITION_PENALTY,
        _POOLING,
    ],
}


def _adapters() -> dict[str, str]:
    """Name -> folder, of --adapter. Raises ValueError for one without a name, and for a name that is there twice."""
    found: dict[str, str] = {}
    for text in flags.FLAGS["adapter"].value or []:
        name, _, folder = text.partition("=")
        if not name or not folder or name in found:
            raise ValueError(f"--adapter={text}: write NAME=FOLDER, each name once; requests ask for it as a model")
        found[name] = folder
    return found


def _access() -> Access:
    """Who may use the server. Raises ValueError if that were everyone, and nobody has said so twice."""
    keys, is_local = read_keys(_API_KEYS.value), is_loopback(_HOST.value)
    said_twice = _INSECURE.value and flags.FLAGS["insecure"].present >= 2
    if not is_local and not keys and not said_twice:
        raise ValueError(
            f"--host={_HOST.value}: whoever reaches this address could use the server: give --api_keys (or "
            f"{VARIABLE}), or say --insecure --insecure if that is wanted"
        )
    for origin in _CORS.value:
        if origin != "*" and not re.fullmatch(r"https?://[^/?#@A-Z]+", origin):  # browsers write it so
            raise ValueError(
                f"--cors={origin}: write an origin as browsers do, in small letters and without a path, as in "
                "--cors=https://example.com"
            )
    for name in _ALLOW_HOST.value:
        if not re.fullmatch(r"[^/:@]+|\[[^/@\]]+\]", name):
            raise ValueError(f"--allow_host={name}: write a name alone, as in --allow_host=ai.example.com")
    named = [host_name(name) for name in _ALLOW_HOST.value]
    hosts = named if is_local or named else None  # elsewhere any, unless some are named
    return Access(keys, hosts, _CORS.value)


def _slots(checkpoint: Checkpoint) -> int:
    if _SLOTS.value != "auto":
        return int(_SLOTS.value)
    room = min(_ROOM.value, checkpoint.config.max_position_embeddings)
    dtype = common.CACHE_DTYPE.value or own_cache_dtype(checkpoint)
    return rows_that_fit(checkpoint, room, dtype, _MOST_SLOTS)


def _options(checkpoint: Checkpoint) -> EngineOptions:
    guesses = common.GUESSES.value or PromptLookup().guesses
    return EngineOptions(
        slots=_slots(checkpoint),
        room=_ROOM.value,
        queue=_QUEUE.value,
        cache_dtype=common.CACHE_DTYPE.value,
        prefix_bytes=_PREFIX_MEMORY.value << 20,
        speculate=guesses if common.SPECULATE.value else 0,
    )


def _limits() -> Limits:
    return Limits(
        body_bytes=_BODY.value,
        connections=_CONNECTIONS.value,
        request_seconds=_REQUEST_SECONDS.value,
        answer_tokens=common.MAX_NEW_TOKENS.value,
        choices=_CHOICES.value,
    )


def _defaults() -> Sampling:
    return dataclasses.replace(common.sampling(), seed=0)


def main() -> int:
    """Loads, listens, warms up, serves; returns when it was told to end, or when the engine has failed."""
    access, adapters = _access(), _adapters()  # raise before the model is loaded
    common.check()
    if common.SPECULATE.value not in (None, "lookup"):
        raise ValueError(f"--speculate={common.SPECULATE.value}: a server guesses by lookup only: --speculate=lookup")
    if _SLOTS.value != "auto" and not (_SLOTS.value.isdecimal() and 1 <= int(_SLOTS.value) <= 256):
        raise ValueError(f"--slots={_SLOTS.value} must be auto or a number from 1 to 256")
    try:
        from . import server
    except ImportError as error:
        raise ImportError(f"phi3-serve needs the extra serve ({error}): pip install 'phi3_jax[serve]'") from None
    listening = server.listen(_HOST.value, _PORT.value)
    checkpoint = common.load_other(CHECKPOINT.value, QUANTIZE.value, None)
    require_tokenizer(checkpoint)
    options = _options(checkpoint)
    name = _NAME.value or Path(CHECKPOINT.value.partition("@")[0]).name.removesuffix(".gguf")
    if name in adapters:
        raise ValueError(f"--adapter={name}=...: this is the model's own name; give it another")
    service = server.Service(
        Engine(checkpoint, options, adapters),
        checkpoint,
        name,
        list(adapters),
        _defaults(),
        _limits(),
        _LOG_PROMPTS.value,
        cast(Any, _POOLING.value),
    )
    return server.serve(service, access, listening, _DRAIN_SECONDS.value)


def run() -> None:
    """The console script."""
    flags.set_default(common.MAX_NEW_TOKENS, 4096)
    flags.set_default(common.TEMPERATURE, 1.0)
    adapter = flags.DEFINE_multi_string(
        "adapter",
        [],
        "NAME=FOLDER: a LoRA adapter in PEFT's format, for requests with this model; may be given several times.",
        module_name=__name__,
        allow_override=True,  # of the one adapter that other programs take
    )
    run_program("phi3-serve", main, {**_TOPICS, "Model": [*_TOPICS["Model"], adapter]})


if __name__ == "__main__":
    run()

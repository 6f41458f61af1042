"""What people write, and what programs keep of it: requests, answers, conversations, tools, schemas, settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import batches

from phi3_jax.infer import Grammar, Sampling
from phi3_jax.infer.conversation import Conversation, save_messages
from phi3_jax.infer.programs import flags
from phi3_jax.infer.programs.chat_main import Chat
from phi3_jax.infer.sampling.grammar import GrammarMasks
from phi3_jax.infer.serving.batch.json_lines import open_file
from phi3_jax.infer.serving.batch.openai_form import read_api_requests
from phi3_jax.infer.serving.batch.requests import read_requests
from phi3_jax.regular_file import read_text
from phi3_jax.text import call_schema
from phi3_jax.train.checks import check_together
from phi3_jax.train.settings import Settings, change

from ..reader import Read, Reader
from .parts import MESSAGES, digest, model

_WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "minLength": 1, "maxLength": 40},
        "days": {"type": "integer", "minimum": 1, "maximum": 14},
        "kind": {"enum": ["sun", "rain", None]},
        "places": {"type": "array", "items": {"$ref": "#/$defs/place"}, "maxItems": 3},
        "when": {"anyOf": [{"type": "string", "format": "date"}, {"type": "number", "multipleOf": 0.5}]},
    },
    "required": ["city"],
    "additionalProperties": False,
    "$defs": {"place": {"type": "object", "properties": {"x": {"type": "number"}}}},
}
_TOOLS = [
    {"type": "function", "function": {"name": "weather", "description": "It.", "parameters": _WEATHER}},
    {"name": "now", "description": "The time.", "parameters": {"type": "object", "properties": {}}},
]
_REGEXES = (r"(yes|no){1,3}[a-zé]*\d+", r"\p{L}+(?:, \p{L}+)* \x41[^\n]{2,5}")
_REQUESTS: list[dict[str, Any]] = [
    {"prompt": "Hello é", "id": 1},
    {"messages": MESSAGES, "id": "b", "max_new_tokens": 3, "temperature": 0.5, "top_k": 4, "seed": 7},
    {"prompt": "c", "logit_bias": {"12": 1.5, "3": -2}, "banned_tokens": [1, 2], "forced_tokens": [], "top_p": None},
    {"messages": MESSAGES[:2], "tools": _TOOLS, "repetition_penalty": 1.1, "no_repeat_ngram_size": 2},
]


_API_REQUESTS: list[dict[str, Any]] = [
    {"custom_id": url, "method": "POST", "url": f"/v1/{url}", "body": {"model": "m", **body}}
    for url, body in (
        ("chat/completions", {"messages": MESSAGES, "max_tokens": 3, "n": 2, "tools": _TOOLS}),
        ("completions", {"prompt": ["Hello é", "b"], "temperature": 0.5, "seed": 7, "logit_bias": {"12": 1.5}}),
        ("embeddings", {"input": "c"}),
    )
]


def _write_lines(path: Path, lines: list[Any]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def _make_requests(folder: Path, _: int) -> None:
    _write_lines(folder / "requests.jsonl", _REQUESTS)


def _read_requests(folder: Path, _: int) -> Read:
    return {"requests": digest(read_requests(folder / "requests.jsonl", Sampling()))}


def _make_api_requests(folder: Path, _: int) -> None:
    _write_lines(folder / "requests.jsonl", _API_REQUESTS)


def _read_api_requests(folder: Path, _: int) -> Read:
    return {"requests": digest(read_api_requests(open_file(folder / "requests.jsonl"), 0))}


def _make_answers(folder: Path, _: int) -> None:
    _write_lines(folder / "requests.jsonl", _REQUESTS)
    requests = read_requests(folder / "requests.jsonl", Sampling())
    batches.run(folder / "answers.jsonl", requests, stop_at=3)


def _read_answers(folder: Path, _: int) -> Read:
    """Goes on, and so ends with a whole file."""
    requests = read_requests(folder / "requests.jsonl", Sampling())
    batches.run(folder / "answers.jsonl", requests)
    return {"answers": digest((folder / "answers.jsonl").read_bytes())}


def _make_conversation(folder: Path, _: int) -> None:
    save_messages(folder / "chat.json", MESSAGES)


def _read_conversation(folder: Path, _: int) -> Read:
    conversation = Conversation(model())
    Chat(conversation, False)._load(str(folder / "chat.json"))
    return {"messages": digest(conversation.messages)}


def _masks(grammar: Grammar) -> str:
    checkpoint = model()
    assert checkpoint.tokenizer is not None
    ends = checkpoint.generation.eos_token_ids
    return digest(GrammarMasks(checkpoint.tokenizer, [grammar], ends, checkpoint.config.vocab_size).masks())


def _make_tools(folder: Path, _: int) -> None:
    (folder / "tools.json").write_text(json.dumps(_TOOLS))


def _read_tools(folder: Path, _: int) -> Read:
    tools = flags._read_tools.__wrapped__(str(folder / "tools.json"))
    return {"tools": digest(tools), "masks": _masks(Grammar.json_schema(call_schema(tools)))}


def _make_schema(folder: Path, _: int) -> None:
    (folder / "schema.json").write_text(json.dumps(_WEATHER))


def _read_schema(folder: Path, _: int) -> Read:
    return {"masks": _masks(Grammar.json_schema(flags._read_schema(str(folder / "schema.json"))))}


def _make_regex(folder: Path, variant: int) -> None:
    (folder / "regex.txt").write_text(_REGEXES[variant])


def _read_regex(folder: Path, _: int) -> Read:
    return {"masks": _masks(Grammar.regex(read_text(str(folder / "regex.txt"))))}


_SET = {
    "checkpoint": "m", "train_file": "a.jsonl,b.jsonl", "mixture": "1,2.5", "lr": "1e-4", "batch_size": "4",
    "sequence_length": "64", "steps": "100", "lora_rank": "8", "lora_alpha": "16", "lora_targets": "qkv_proj,o_proj",
    "schedule": "cosine", "train": "lora", "seed": "3", "clip_norm": "1.0", "pack": "True", "eval_fraction": "0.1",
}  # fmt: skip


def _make_settings(folder: Path, _: int) -> None:
    (folder / "set.json").write_text(json.dumps(_SET))


def _read_settings(folder: Path, _: int) -> Read:
    """The file stands for --set NAME=VALUE, once for each of its fields."""
    try:
        values = json.loads((folder / "set.json").read_text())
        texts = [f"{name}={value}" for name, value in values.items()]
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"this is no case: {str(error)[:100]}".replace("\n", " ")) from None
    settings = change(Settings(), texts)
    check_together(settings)
    return {"settings": digest(settings)}


READERS = {
    "requests": Reader(_make_requests, _read_requests, lines=12),
    "openai requests": Reader(_make_api_requests, _read_api_requests, lines=12),
    "answers": Reader(_make_answers, _read_answers, files={"*.partial": 1}),
    "conversation": Reader(_make_conversation, _read_conversation, cost=2),
    "tools": Reader(_make_tools, _read_tools, names=("",)),
    "schema": Reader(_make_schema, _read_schema, names=("",), cost=2),
    "regex": Reader(_make_regex, _read_regex, len(_REGEXES), names=("",), cost=2, is_file=False),
    "settings": Reader(_make_settings, _read_settings, names=("",), cost=2, is_file=False),
}

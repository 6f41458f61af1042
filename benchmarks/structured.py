"""How many answers of the demo model are valid JSON of a schema, drawn at temperature 1: it should be all of them.

    pip install jsonschema
    python benchmarks/structured.py

The answers are checked with the package jsonschema, which is independent of the one that restricts the tokens.
"""

from __future__ import annotations

import json
import time

import jsonschema

import phi3_jax
from phi3_jax.infer import Grammar, Sampling, generate

ANSWERS, BATCH, LIMIT = 100, 20, 120
SCHEMAS = {
    "person": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 20},
            "age": {"type": "integer", "minimum": 0, "maximum": 120},
            "married": {"type": "boolean"},
            "eyes": {"enum": ["blue", "brown", "green"]},
        },
        "required": ["name", "age", "married", "eyes"],
        "additionalProperties": False,
    },
    "numbers": {
        "type": "array",
        "items": {"type": "integer", "minimum": -99, "maximum": 999},
        "minItems": 2,
        "maxItems": 5,
    },
    "order": {
        "type": "object",
        "properties": {
            "item": {
                "type": "object",
                "properties": {
                    "title": {"type": "string", "maxLength": 20},
                    "price": {"type": "integer", "maximum": 999},
                },
                "required": ["title"],
                "additionalProperties": False,
            },
            "note": {"type": "string", "maxLength": 20},
        },
        "required": ["item"],
        "additionalProperties": False,
    },
}


def main() -> None:
    """Prints a table."""
    checkpoint = phi3_jax.load("demo", "float32")
    print("| schema | valid | ended | tokens, most | seconds |")
    print("|---|---|---|---|---|")
    for name, schema in SCHEMAS.items():
        text = f"Give me an example of: {name}. Answer in JSON."
        ids = phi3_jax.encode_chat(checkpoint.tokenizer, [{"role": "user", "content": text}])
        begin, results = time.perf_counter(), []
        for seed in range(0, ANSWERS, BATCH):
            sampling = Sampling(temperature=1.0, seed=seed)
            grammar = Grammar.json_schema(schema)
            results += generate(checkpoint, [ids] * BATCH, LIMIT, sampling=sampling, grammar=grammar)
        valid = sum(is_valid(result.text, schema) for result in results)
        ended = sum(result.finish_reason == "stop" for result in results)
        longest = max(len(result.token_ids) for result in results)
        print(
            f"| {name} | {valid} of {ANSWERS} | {ended} | {longest} | {time.perf_counter() - begin:.0f} |", flush=True
        )


def is_valid(text: str, schema: dict[str, object]) -> bool:
    """Whether a text is JSON of a schema."""
    try:
        jsonschema.validate(json.loads(text), schema)
    except (json.JSONDecodeError, jsonschema.ValidationError) as error:
        print(f"invalid: {text!r}: {error}")
        return False
    return True


if __name__ == "__main__":
    main()

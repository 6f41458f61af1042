"""What an answer has to match: a JSON schema, any object, a pattern, or one of several texts."""

from __future__ import annotations

import json
from typing import Any

from ....sampling import Grammar
from ..errors import invalid
from .values import Fields, attempt, kind

_OURS = "structured_outputs"
LONGEST_PATTERN, MOST_OPTIONS = 1 << 14, 1024
LONGEST_OPTIONS = 1 << 16  # characters of all options together, of which each takes 150 bytes
LONGEST_SCHEMA = 1 << 17  # characters of a schema, or of all tools together
MOST_SCHEMA_DEPTH = 64
MOST_PROPERTIES = 1024  # of an object; llguidance takes time in proportion to the square of those that may be missing


def check_schema(schema: Any, name: str) -> None:
    """Raises ApiError for a JSON schema that takes long to become a grammar, or writes into the log."""
    if not isinstance(schema, dict):
        raise invalid(f"{name} is a {kind(schema)}, not an object", name, "invalid_type")
    if len(json.dumps(schema)) > LONGEST_SCHEMA:
        raise invalid(f"{name} has more than {LONGEST_SCHEMA} characters; make it smaller", name)
    options = schema.get("x-guidance")
    if isinstance(options, dict) and options.get("lenient"):  # each thing that is not understood would be a warning
        raise invalid(f"{name} is lenient, which is not for requests: leave out what is not supported", name)
    level: list[Any] = [schema]
    for _ in range(MOST_SCHEMA_DEPTH):
        if (most := max((len(each) for each in level if isinstance(each, dict)), default=0)) > MOST_PROPERTIES:
            raise invalid(f"{name} has an object with {most} entries, more than {MOST_PROPERTIES}", name)
        parts = [each.values() if isinstance(each, dict) else each for each in level]
        level = [each for part in parts for each in part if isinstance(each, dict | list)]
    if level:
        raise invalid(f"{name} is nested more than {MOST_SCHEMA_DEPTH} times; make it flatter", name)


def read_grammar(fields: Fields) -> Grammar | None:
    """What the answer has to match, by OpenAI's field or by vLLM's; None: nothing. Raises ApiError (400)."""
    form, other = _read_response_format(fields), _read_structured_outputs(fields)
    if form is not None and other is not None:
        raise invalid("response_format and structured_outputs say both what the answer is; give one", _OURS)
    return form or other


def _read_response_format(fields: Fields) -> Grammar | None:
    """{"type": "text" | "json_object" | "json_schema", "json_schema": {"name": ..., "schema": ...}}."""
    form = fields.inner("response_format")
    if form is None:
        return None
    form.required("type")
    wanted = form.one_of("type", ("text", "json_object", "json_schema"), "")
    if wanted != "json_schema":
        return None if wanted == "text" else Grammar.json_schema({"type": "object"})
    described = Fields(form.required("json_schema"), form.name("json_schema"))
    schema, place = described.required("schema"), described.name("schema")
    described.text("name", None)
    described.text("description", None)
    described.truth("strict", False)
    described.refuse_others()
    form.refuse_others()
    check_schema(schema, place)
    return attempt(lambda: Grammar.json_schema(schema), place)


def _read_structured_outputs(fields: Fields) -> Grammar | None:
    """{"regex": ...}, {"choice": [...]} or {"json": a schema}."""
    form = fields.inner(_OURS)
    if form is None:
        return None
    found = []
    if (pattern := form.text("regex", None, LONGEST_PATTERN)) is not None:
        found.append(attempt(lambda: Grammar.regex(pattern), form.name("regex")))
    if (options := form.items("choice", MOST_OPTIONS)) is not None:
        if not options or not all(isinstance(option, str) for option in options):
            raise form.wrong("choice", "a list of texts")
        if sum(map(len, options)) > LONGEST_OPTIONS:
            raise invalid(f"{_OURS}.choice has more than {LONGEST_OPTIONS} characters", form.name("choice"))
        found.append(attempt(lambda: Grammar.choice(options), form.name("choice")))
    if (schema := form.get("json")) is not None:
        check_schema(schema, form.name("json"))
        found.append(attempt(lambda: Grammar.json_schema(schema), form.name("json")))
    form.refuse_others()
    if len(found) > 1:
        raise invalid(f"{_OURS} has several forms; give one", _OURS)
    return found[0] if found else None

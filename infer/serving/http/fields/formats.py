"""What an answer has to match: a JSON schema, any object, a pattern, or one of several texts."""

from __future__ import annotations

import json
from typing import Any

from ....sampling import Grammar
from ..errors import invalid
from .values import Fields, attempt, kind

LONGEST_SCHEMA = 1 << 18  # characters of a schema, or of all tools together
MOST_SCHEMA_DEPTH = 64


def check_schema(schema: Any, name: str) -> None:
    """Raises ApiError for a JSON schema that is too large or too deep to be turned into a grammar."""
    if not isinstance(schema, dict):
        raise invalid(f"{name} is a {kind(schema)}, not an object", name, "invalid_type")
    if len(json.dumps(schema)) > LONGEST_SCHEMA:
        raise invalid(f"{name} has more than {LONGEST_SCHEMA} characters; make it smaller", name)
    level: list[Any] = [schema]
    for _ in range(MOST_SCHEMA_DEPTH):
        parts = [each.values() if isinstance(each, dict) else each for each in level]
        level = [each for part in parts for each in part if isinstance(each, dict | list)]
    if level:
        raise invalid(f"{name} is nested more than {MOST_SCHEMA_DEPTH} times; make it flatter", name)


def read_response_format(fields: Fields, key: str = "response_format") -> Grammar | None:
    """What the answer has to match: any text, any object, or a schema. Raises ApiError (400)."""
    form = fields.inner(key)
    if form is None:
        return None
    form.required("type")
    kind = form.one_of("type", ("text", "json_object", "json_schema"), "")
    if kind != "json_schema":
        return None if kind == "text" else Grammar.json_schema({"type": "object"})
    described = Fields(form.required("json_schema"), form.name("json_schema"))
    schema, place = described.required("schema"), described.name("schema")
    described.text("name", None)
    described.text("description", None)
    described.truth("strict", False)
    described.refuse_others()
    form.refuse_others()
    check_schema(schema, place)
    return attempt(lambda: Grammar.json_schema(schema), place)

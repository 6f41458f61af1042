"""The functions that a model may call -> a JSON schema of its calls, for a grammar."""

from collections.abc import Sequence
from typing import Any

from phi3_jax.text.messages import Tool, function_of, read_tools


def call_schema(tools: Sequence[Tool], most: int | None = None) -> dict[str, Any]:
    """What a list of calls looks like: [{"name": ..., "arguments": {...}}], with arguments that fit the schemas.

    It is for `Grammar.json_schema`, and `parse_tool_calls` reads the answer. Arguments have no keys that their schema
    does not name, unless it says "additionalProperties".

    Args:
        most: how many calls there may be; small models go on for long.

    Raises:
        ValueError: there are no tools, or parameters that are not the schema of an object.
    """
    if not tools:
        raise ValueError("there are no tools to call")
    root: dict[str, Any] = {"type": "array", "minItems": 1} | ({} if most is None else {"maxItems": most})
    calls = []
    for index, tool in enumerate(read_tools(tools)):
        name, parameters = function_of(tool)["name"], function_of(tool).get("parameters") or {}
        if not isinstance(parameters, dict) or not (
            not parameters or parameters.get("type") == "object" or {"properties", "$ref"} & parameters.keys()
        ):
            raise ValueError(
                f'the parameters of {name} are no JSON schema of an object; write {{"type": "object", "properties": '
                '{"city": {"type": "string"}}}'
            )
        arguments = {"type": "object", "properties": {}, "additionalProperties": False} | parameters
        if _has_references(arguments):  # they count from the root of the schema, which moves
            place = f"#/$defs/tool{index}"
            root.setdefault("$defs", {})[f"tool{index}"] = _moved(arguments, place)
            arguments = {"$ref": place}
        calls.append(
            {
                "type": "object",
                "properties": {"name": {"const": name}, "arguments": arguments},
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
        )
    return root | {"items": {"anyOf": calls} if len(calls) > 1 else calls[0]}


def _has_references(schema: Any) -> bool:
    if isinstance(schema, dict):
        return isinstance(schema.get("$ref"), str) or any(map(_has_references, schema.values()))
    return isinstance(schema, list) and any(map(_has_references, schema))


def _moved(schema: Any, place: str) -> Any:
    """A schema with its references to itself changed for its new place."""
    if isinstance(schema, list):
        return [_moved(each, place) for each in schema]
    if not isinstance(schema, dict):
        return schema
    moved = {key: _moved(value, place) for key, value in schema.items()}
    if isinstance(reference := schema.get("$ref"), str) and reference.startswith("#"):
        moved["$ref"] = place + reference[1:]
    return moved

"""What /openapi.json says of requests beyond what pydantic finds by itself. Knows JSON Schema; not which fields there are."""

from __future__ import annotations

from typing import Any

_ABOUT = ("title", "description", "default")


def null_is_left_out(schema: dict[str, Any]) -> None:
    """Of a body in which a field that is null counts as left out, say so: for pydantic's `json_schema_extra`."""
    required = schema.get("required", ())
    for name, field in schema.get("properties", {}).items():
        if name in required or field.keys() <= {*_ABOUT}:
            continue
        about = {key: field.pop(key) for key in _ABOUT if key in field}
        kinds = field["anyOf"] if field.keys() == {"anyOf"} else [dict(field)]
        if {"type": "null"} not in kinds:
            kinds = [*kinds, {"type": "null"}]
        field.clear()
        field.update({"anyOf": kinds, **about})


def text_or_list(schema: dict[str, Any]) -> None:
    """Of a field that is a list, say that it may be a single text, too: for pydantic's `json_schema_extra`."""
    items = {key: schema.pop(key) for key in ("type", "items", "maxItems", "minItems") if key in schema}
    schema["anyOf"] = [{"type": "string"}, items]


def whole_bounds(schema: Any) -> None:
    """Write bounds that are whole numbers as such: as a fraction, 2**63 would be read as a number beyond it."""
    if isinstance(schema, list):
        for each in schema:
            whole_bounds(each)
    elif isinstance(schema, dict):
        for key, value in schema.items():
            if isinstance(value, float) and value.is_integer():
                schema[key] = int(value)
            else:
                whole_bounds(value)

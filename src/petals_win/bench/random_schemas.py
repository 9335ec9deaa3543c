"""JSON schemas by chance, as programs send them: for whoever checks that answers hold to them. Knows JSON Schema only."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

Schema = dict[str, Any]

_NAMES = ("name", "age", "city", "tags", "notes", "price", "kind", "items", "owner", "größe")
_PATTERNS = (
    "^[A-Z]{3}-[0-9]{4}$",
    "^(red|green|blue)$",
    "^[a-z]{1,8}@[a-z]{2,8}\\.com$",
    "^#[0-9a-f]{6}$",
    "^\\d{1,3}(\\.\\d{1,3}){3}$",
)
_FORMATS = ("date", "time", "uuid", "ipv4", "x-of-nobody")
_NOT_HELD = ({"uniqueItems": True, "type": "array"}, {"not": {"type": "null"}}, {"contains": {"type": "integer"}})
_SHARE_NOT_HELD = 0.05


def random_schemas(count: int, seed: int) -> Iterator[Schema]:
    """So many schemas of objects; about one in twenty has a keyword that cannot be held to token by token."""
    chance = random.Random(seed)
    for _ in range(count):
        yield _Maker(chance).document()


class _Maker:
    """Makes one schema."""

    def __init__(self, chance: random.Random) -> None:
        self._chance = chance
        self._definitions: dict[str, Schema] = {}

    def document(self) -> Schema:
        schema = self._object(3)
        if self._chance.random() < _SHARE_NOT_HELD:
            schema["properties"]["odd"] = self._chance.choice(_NOT_HELD)
            schema["required"].append("odd")
        return {**schema, "$defs": self._definitions} if self._definitions else schema

    def _any(self, depth: int) -> Schema:
        simple: list[Callable[[], Schema]] = [self._text, self._number, self._choice, self._pattern, self._simplest]
        nested = [self._object, self._array, self._any_of, self._reference, self._pair]
        if depth <= 0 or self._chance.random() < 0.45:
            return self._chance.choice(simple)()
        return self._chance.choice(nested)(depth - 1)

    def _object(self, depth: int) -> Schema:
        names = self._chance.sample(_NAMES, self._chance.randint(1, 4))
        return {
            "type": "object",
            "properties": {name: self._any(depth) for name in names},
            "required": self._chance.sample(names, self._chance.randint(0, len(names))),
            "additionalProperties": False,
        }

    def _array(self, depth: int) -> Schema:
        least = self._chance.randint(0, 2)
        return {"type": "array", "items": self._any(depth), "minItems": least, "maxItems": least + 2}

    def _pair(self, depth: int) -> Schema:
        parts = [self._any(depth) for _ in range(2)]
        return {"type": "array", "prefixItems": parts, "items": False, "minItems": 2}

    def _any_of(self, depth: int) -> Schema:
        if self._chance.random() < 0.5:
            return {"anyOf": [self._any(depth), {"type": "null"}]}
        kinds = [{"properties": {"kind": {"const": kind}, "value": self._any(depth)}} for kind in ("first", "second")]
        closed = {"type": "object", "required": ["kind", "value"], "additionalProperties": False}
        return {"oneOf": [{**closed, **kind} for kind in kinds]}

    def _reference(self, depth: int) -> Schema:
        if not self._definitions or self._chance.random() < 0.5:
            name = f"part{len(self._definitions)}"
            self._definitions[name] = {}  # so that another one within it gets another name
            if self._chance.random() < 0.3:
                more = {"type": "array", "items": {"$ref": f"#/$defs/{name}"}, "maxItems": 1}
                tree = {"value": self._any(0), "more": more}
                self._definitions[name] = {"type": "object", "properties": tree, "additionalProperties": False}
            else:
                self._definitions[name] = self._object(depth)
        made = [name for name, definition in self._definitions.items() if definition]
        return {"$ref": f"#/$defs/{self._chance.choice(made)}"} if made else self._text()

    def _text(self) -> Schema:
        kinds = ({"maxLength": 12}, {"minLength": 2, "maxLength": 8}, {"format": self._chance.choice(_FORMATS)})
        return {"type": "string", "description": "a text", **self._chance.choice(kinds)}

    def _pattern(self) -> Schema:
        return {"type": "string", "pattern": self._chance.choice(_PATTERNS)}

    def _number(self) -> Schema:
        least = self._chance.randint(-20, 100)
        kinds = ({"type": "integer"}, {"type": "number"}, {"type": "integer", "multipleOf": 5})
        return {"minimum": least, "maximum": least + 900, **self._chance.choice(kinds)}

    def _choice(self) -> Schema:
        return self._chance.choice(({"enum": ["small", "large", 3, None]}, {"const": 'a "quoted" word'}))

    def _simplest(self) -> Schema:
        return {"type": self._chance.choice(("boolean", "null", ["string", "null"], ["integer", "boolean"]))}

"""Answers in JSON that would go on for ever: lists within lists, and numbers."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import jsonschema
import pytest
from tiny_chat import tiny_chat_model
from transformers import AutoTokenizer

from petals_win.engines.base import Constraint
from petals_win.engines.constraints import Constraints
from petals_win.engines.tokens import Language

END = 2


@pytest.fixture(scope="module")
def constraints(tmp_path_factory) -> Constraints:
    """One token for each character."""
    folder = tiny_chat_model(tmp_path_factory.mktemp("chat") / "tiny", context=64)
    return Constraints(Language(AutoTokenizer.from_pretrained(folder), 103, frozenset({END})))


def answer(constraints: Constraints, schema: Any, *wishes: str, begun: str = "") -> Any:
    """What a model says that begins so, takes the first of its wishes wherever it may, and else what closes something; it has to end."""
    held = asyncio.run(constraints.guide(Constraint("json_schema", json.dumps(schema)), []))
    tokenizer = constraints._language.tokenizer
    wished = [*tokenizer.convert_tokens_to_ids(list("".join(wishes) + ']}"')), END, *range(103)]
    said: list[int] = []
    for letter in tokenizer.convert_tokens_to_ids(list(begun)):
        assert not held.forbidden()[letter], f"{tokenizer.decode(letter)!r} after {tokenizer.decode(said)!r}"
        held.took(letter)
        said.append(letter)
    while len(said) < 2000:
        forbidden = held.forbidden().tolist()
        token = next(each for each in wished if not forbidden[each])
        if token == END:
            made = json.loads(tokenizer.decode(said))
            jsonschema.Draft202012Validator(schema).validate(made)
            return made
        held.took(token)
        said.append(token)
    raise TimeoutError(f"an answer that does not end: {tokenizer.decode(said)}")


def depth(value: Any) -> int:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return isinstance(value, dict | list) + max(map(depth, inner), default=0)


def tree(more: dict[str, Any], **further: Any) -> dict[str, Any]:
    part = {"type": "object", "properties": {"m": more}, "additionalProperties": False, **further}
    return {"$ref": "#/$defs/part", "$defs": {"part": part}}


PART = {"$ref": "#/$defs/part"}


@pytest.mark.parametrize(
    ("schema", "wishes"),
    [
        (tree({"type": "array", "items": PART}), '[{"m:'),
        (tree(PART), '{"m:'),
        (tree({"anyOf": [PART, {"type": "null"}]}, required=["m"]), '{"m:'),
        ({"type": "array"}, "["),
        ({}, "[{"),
    ],
)
def test_who_would_go_ever_deeper_comes_to_an_end(constraints, schema, wishes):
    made = answer(constraints, schema, wishes)
    assert 60 <= depth(made) <= 66


def test_what_a_schema_demands_may_be_deeper(constraints):
    """A text is no list, whatever it says, and 30 lists in each of three may be 90 within each other."""
    line = {"type": "string", "const": "[" * 70 + "{"}
    schema: Any = line
    for _ in range(30):
        schema = {"type": "array", "items": schema, "minItems": 1, "maxItems": 1}
    part: Any = {"$ref": "#/$defs/a"}
    definitions = {"a": schema}
    for name in ("b", "c"):
        for _ in range(30):
            part = {"type": "array", "items": part, "minItems": 1, "maxItems": 1}
        definitions[name], part = part, {"$ref": f"#/$defs/{name}"}
    assert depth(answer(constraints, {**part, "$defs": definitions})) == 90


@pytest.mark.parametrize("begun", ["1", "0.", "-12.5", "1e"])
def test_a_number_comes_to_an_end(constraints, begun):
    schema = {"type": "array", "items": {"type": "number"}, "minItems": 1, "maxItems": 1}
    made = answer(constraints, schema, "7", begun=f"[{begun}")
    assert len(made) == 1


@pytest.mark.parametrize("kind", ["time", "date-time", "duration", "email", "hostname"])
def test_a_text_of_a_format_comes_to_an_end(constraints, kind):
    schema = {"type": "string", "format": kind}
    assert len(answer(constraints, schema, "2T", "P1a@.", "-:")) <= 254
    assert len(answer(constraints, {**schema, "minLength": 1, "maxLength": 30}, "2T", "P1a@.", "-:")) <= 30


def test_json_is_one_line_whatever_blanks_a_model_would_like(constraints):
    schema = {
        "type": "object",
        "properties": {"a": {"const": [1, 2]}},
        "required": ["a"],
        "additionalProperties": False,
    }
    assert answer(constraints, schema, "Ġ") == {"a": [1, 2]}

"""What the text of an answer has to be, in the many ways in which clients say it: JSON, a schema, an expression, a grammar, choices.

Knows the fields of OpenAI's API, vLLM, llama.cpp and Ollama. Does not know how an answer is held to it.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from petals_win.api.errors import ApiError
from petals_win.engines.base import Constraint

_ANY_OBJECT = {"type": "object"}

SchemaOrText = dict[str, Any] | str


class NamedSchema(BaseModel):
    """A JSON schema as OpenAI's API has it. An answer always holds to it, strict or not."""

    name: str = ""
    description: str = ""
    schema_: Annotated[dict[str, Any], Field(alias="schema")] = _ANY_OBJECT
    strict: bool | None = None


class ResponseFormat(BaseModel):
    """OpenAI's: any text, any JSON object, or JSON of a schema. json_object may have a schema, too, as llama.cpp takes it."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None


class StructuredOutputs(BaseModel):
    """vLLM's: one of these."""

    model_config = ConfigDict(extra="ignore")

    json_: Annotated[SchemaOrText | None, Field(alias="json")] = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: Any = None


class Structured(BaseModel):
    """The fields that say what the text of an answer has to be; at most one of them may ask for something."""

    response_format: Annotated[
        ResponseFormat | None, Field(description="text, json_object, or json_schema with a schema to hold to")
    ] = None
    structured_outputs: Annotated[StructuredOutputs | None, Field(description="as vLLM takes it")] = None
    guided_json: Annotated[SchemaOrText | None, Field(description="a JSON schema, or the text of one")] = None
    guided_regex: Annotated[str | None, Field(description="the answer is what this regular expression matches")] = None
    guided_choice: Annotated[list[str], Field(max_length=1000, description="the answer is one of these")] = []
    guided_grammar: Annotated[str | None, Field(description="a grammar in GBNF or Lark's notation")] = None
    grammar: Annotated[str | None, Field(description="the same, as llama.cpp calls it")] = None
    json_schema: Annotated[dict[str, Any] | None, Field(description="a JSON schema, as llama.cpp calls it")] = None
    format: Annotated[SchemaOrText | None, Field(description='"json" or a JSON schema, as Ollama calls it')] = None

    @field_validator("guided_choice", mode="before")
    @classmethod
    def _no_choice(cls, value: Any) -> Any:
        return value or []

    @field_validator("response_format", "structured_outputs", mode="before")
    @classmethod
    def _nothing_asked(cls, value: Any) -> Any:
        return value or None

    @field_validator("format")
    @classmethod
    def _known_format(cls, value: Any) -> Any:
        if isinstance(value, str) and value not in ("", "json"):
            raise ValueError('"json" or a JSON schema is needed')
        return value

    def constraint(self) -> Constraint | None:
        """What the answer has to be, None if anything. Raises ApiError if several fields say it."""
        outputs = self.structured_outputs or StructuredOutputs()
        if outputs.structural_tag:
            raise ApiError(
                400,
                "structured_outputs.structural_tag is not supported here. Leave it out.",
                code="unsupported",
                param="structured_outputs",
            )
        asked = {
            "response_format": _of_format(self.response_format),
            "structured_outputs.json": _of_schema(outputs.json_),
            "structured_outputs.regex": _of_text("regex", outputs.regex),
            "structured_outputs.choice": _of_choices(outputs.choice),
            "structured_outputs.grammar": _of_text("grammar", outputs.grammar),
            "structured_outputs.json_object": _of_schema(_ANY_OBJECT if outputs.json_object else None),
            "guided_json": _of_schema(self.guided_json),
            "guided_regex": _of_text("regex", self.guided_regex),
            "guided_choice": _of_choices(self.guided_choice),
            "guided_grammar": _of_text("grammar", self.guided_grammar),
            "grammar": _of_text("grammar", self.grammar),
            "json_schema": _of_schema(self.json_schema),
            "format": _of_schema(_ANY_OBJECT if self.format == "json" else self.format),
        }
        given = [(name, constraint) for name, constraint in asked.items() if constraint is not None]
        if len(given) > 1:
            (one, _), (other, _) = given[:2]
            raise ApiError(400, f"{one} and {other} exclude each other. Leave one of them out.", param=other)
        return given[0][1] if given else None


def _of_format(asked: ResponseFormat | None) -> Constraint | None:
    if asked is None or asked.type == "text":
        return None
    if asked.type == "json_schema":
        if asked.json_schema is None:
            raise ApiError(
                400, "response_format: json_schema is missing, in which the schema is.", param="response_format"
            )
        return _of_schema(asked.json_schema.schema_ or _ANY_OBJECT)
    return _of_schema(asked.schema_ or _ANY_OBJECT)


def _of_schema(schema: SchemaOrText | None) -> Constraint | None:
    """An empty one asks for nothing, as front-ends send it."""
    return Constraint("json_schema", schema if isinstance(schema, str) else json.dumps(schema)) if schema else None


def _of_text(kind: Literal["regex", "grammar"], text: str | None) -> Constraint | None:
    return Constraint(kind, text) if text else None


def _of_choices(choices: list[str] | None) -> Constraint | None:
    if not choices:
        return None
    return Constraint("grammar", "start: " + " | ".join(json.dumps(choice) for choice in choices))

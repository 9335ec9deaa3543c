"""The requests that Anthropic's clients send. Knows their fields and what they ask of an engine; not how it is answered."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from petals_win.api.bodies import Body
from petals_win.api.documented import null_is_left_out, text_or_list
from petals_win.api.errors import ApiError
from petals_win.api.schemas import Text
from petals_win.engines.base import Constraint, GenerationRequest

# Fields that a block of the type has to have. There are more types, which are refused by name.
_BLOCKS = {
    "text": ("text",),
    "thinking": ("thinking",),
    "redacted_thinking": (),
    "tool_use": ("id", "name", "input"),
    "tool_result": ("tool_use_id",),
}
_CHOICES = {"auto": "auto", "any": "required", "none": "none"}


def _as_blocks(value: Any) -> Any:
    """What may be a text or a list of blocks, as a list of blocks."""
    if value is None:
        return []
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


def _refuse(kind: str) -> ApiError:
    return ApiError(
        400, f"Content of type {kind[:100]} is not supported here: send text.", code="unsupported", param="messages"
    )


class AnthropicTextBlock(BaseModel):
    """A piece of text, where nothing else may stand."""

    type: str
    text: Text = ""

    @model_validator(mode="after")
    def _is_text(self) -> AnthropicTextBlock:
        if self.type != "text":
            raise _refuse(self.type)
        return self


class AnthropicBlock(BaseModel):
    """A piece of a turn: text, what a model thought, a call of a tool, or its result."""

    model_config = ConfigDict(json_schema_extra=null_is_left_out)

    type: Annotated[Text, Field(description="text, thinking, redacted_thinking, tool_use or tool_result")]
    text: Text = ""
    thinking: Text = ""
    id: Text = ""
    name: Text = ""
    input: dict[str, Any] = {}
    tool_use_id: Text = ""
    content: Annotated[
        list[AnthropicTextBlock],
        Field(description="a text or a list of blocks of type text", json_schema_extra=text_or_list),
    ] = []
    is_error: bool = False

    _result_as_blocks = field_validator("content", mode="before")(_as_blocks)

    @model_validator(mode="before")
    @classmethod
    def _known(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        kind = data.get("type")
        if not isinstance(kind, str):
            raise ValueError("a block needs a type")
        if kind not in _BLOCKS:
            raise _refuse(kind)
        given = {name: value for name, value in data.items() if value is not None}
        if missing := [name for name in _BLOCKS[kind] if name not in given]:
            raise ValueError(f"a block of type {kind} needs {missing[0]}")
        return given


class AnthropicTurn(BaseModel):
    """What one side said."""

    role: Literal["user", "assistant", "system"]
    content: Annotated[
        list[AnthropicBlock], Field(description="a text or a list of blocks", json_schema_extra=text_or_list)
    ]

    _content_as_blocks = field_validator("content", mode="before")(_as_blocks)


class AnthropicTool(BaseModel):
    """A function that the model may call."""

    type: str | None = None
    name: Annotated[Text, Field(min_length=1)]
    description: Text | None = None
    input_schema: Annotated[dict[str, Any], Field(description="the JSON schema of its arguments")]

    @model_validator(mode="before")
    @classmethod
    def _ours(cls, data: Any) -> Any:
        kind = data.get("type") if isinstance(data, dict) else None
        if isinstance(kind, str) and kind != "custom":
            raise ApiError(
                400,
                f"A tool of type {kind[:100]} is not supported here: only tools that have an input_schema and are run by "
                "the program that asks.",
                code="unsupported",
                param="tools",
            )
        return data

    def function(self) -> dict[str, Any]:
        described = {} if self.description is None else {"description": self.description}
        function = {"name": self.name, **described, "parameters": self.input_schema}
        return {"type": "function", "function": function}


class AnthropicToolChoice(BaseModel):
    type: Literal["auto", "any", "tool", "none"]
    name: Annotated[Text | None, Field(description="of the tool to call, with type tool")] = None
    disable_parallel_tool_use: bool = False


class AnthropicThinkingConfig(BaseModel):
    """Whether to think, for models that can; of any type but these two, the model decides."""

    type: Annotated[str, Field(description="enabled or disabled")]


class AnthropicOutputFormat(BaseModel):
    type: Literal["json_schema"]
    json_schema: Annotated[dict[str, Any], Field(alias="schema")]


class AnthropicOutputConfig(BaseModel):
    effort: Annotated[Text | None, Field(description="for chat templates that know reasoning_effort")] = None
    format: Annotated[
        AnthropicOutputFormat | None, Field(description="the JSON schema of which the answer shall be")
    ] = None


class AnthropicPrompt(Body):
    """Body of POST /v1/messages/count_tokens: what makes the prompt."""

    ignored: ClassVar[frozenset[str]] = frozenset(
        ("cache_control", "context_management", "diagnostics", "inference_geo", "metadata", "service_tier", "speed")
    )
    refused: ClassVar[dict[str, str]] = {
        "container": "Nothing is run here. Leave it out.",
        "mcp_servers": "Nothing is asked from here. Leave it out.",
    }

    model: Annotated[Text, Field(description="its name, in any case, with or without its owner")]
    messages: Annotated[list[AnthropicTurn], Field(min_length=1)]
    system: Annotated[
        list[AnthropicTextBlock],
        Field(description="a text or a list of blocks of type text", json_schema_extra=text_or_list),
    ] = []
    tools: list[AnthropicTool] = []
    tool_choice: AnthropicToolChoice = AnthropicToolChoice(type="auto")
    thinking: AnthropicThinkingConfig | None = None
    output_config: AnthropicOutputConfig = AnthropicOutputConfig()

    _system_as_blocks = field_validator("system", mode="before")(_as_blocks)

    def request(self, model: str) -> GenerationRequest:
        """The request to `model`. Raises ApiError."""
        return GenerationRequest(model=model, **self._prompt())

    def _prompt(self) -> dict[str, Any]:
        """The fields of a GenerationRequest."""
        turns = list(_joined(self._turns()))
        last = turns[-1]
        template: dict[str, Any] = {}
        if self.thinking is not None and self.thinking.type in ("enabled", "disabled"):
            template["enable_thinking"] = self.thinking.type == "enabled"
        if self.output_config.effort:
            template["reasoning_effort"] = self.output_config.effort
        return {
            "messages": tuple(turns),
            "template": template,
            "continue_final": last["role"] == "assistant" and bool(last["content"]) and "tool_calls" not in last,
            "tools": tuple(tool.function() for tool in self.tools),
            "tool_choice": self._choice(),
            "parallel_tool_calls": not self.tool_choice.disable_parallel_tool_use,
        }

    def _choice(self) -> str:
        if self.tool_choice.type != "tool":
            return _CHOICES[self.tool_choice.type]
        name = self.tool_choice.name
        if name is None or name not in (tool.name for tool in self.tools) or name in ("auto", "required", "none"):
            raise ApiError(400, "tool_choice.name: the name of one of the tools is needed.", param="tool_choice.name")
        return name

    def _turns(self) -> Iterator[dict[str, Any]]:
        """The conversation as chat templates know it: each result of a tool is a turn of its own."""
        if system := _text(self.system):
            yield {"role": "system", "content": system}
        names: dict[str, str] = {}
        for turn in self.messages:
            told = [block for block in turn.content if block.type != "tool_result"]
            for block in turn.content:
                if block.type == "tool_result":
                    yield _result(block, names)
            if not told and turn.content:
                continue
            said: dict[str, Any] = {"role": turn.role, "content": _text(told)}
            if thoughts := "\n".join(block.thinking for block in told if block.type == "thinking"):
                said["reasoning_content"] = thoughts
            if calls := [_call(block) for block in told if block.type == "tool_use"]:
                said["tool_calls"] = calls
                names |= {call["id"]: call["function"]["name"] for call in calls}
            yield said


class AnthropicMessages(AnthropicPrompt):
    """Body of POST /v1/messages."""

    max_tokens: Annotated[int, Field(ge=1)]
    stream: bool = False
    stop_sequences: Annotated[list[Text], Field(max_length=16)] = []
    temperature: Annotated[float | None, Field(ge=0, le=2, description="left out: the model's own default")] = None
    top_p: Annotated[float | None, Field(ge=0, le=1, description="1: no limit")] = None
    top_k: Annotated[int | None, Field(ge=-1, description="0 and -1: no limit")] = None

    def request(self, model: str) -> GenerationRequest:
        schema = self.output_config.format
        return GenerationRequest(
            model=model,
            max_tokens=self.max_tokens,
            stop=tuple(stop for stop in self.stop_sequences if stop),
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=0 if self.top_k == -1 else self.top_k,
            constraint=None if schema is None else Constraint("json_schema", json.dumps(schema.json_schema)),
            **self._prompt(),
        )


def _text(blocks: list[AnthropicBlock] | list[AnthropicTextBlock]) -> str:
    return "\n".join(block.text for block in blocks if block.type == "text")


def _call(block: AnthropicBlock) -> dict[str, Any]:
    return {"id": block.id, "type": "function", "function": {"name": block.name, "arguments": block.input}}


def _result(block: AnthropicBlock, names: dict[str, str]) -> dict[str, Any]:
    text = _text(block.content)
    turn = {
        "role": "tool",
        "content": f"Error: {text}" if block.is_error else text,
        "tool_call_id": block.tool_use_id,
    }
    return turn | ({"name": names[block.tool_use_id]} if block.tool_use_id in names else {})


def _joined(turns: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Turns of one side that follow each other as one, which many chat templates ask for; results of tools stay apart."""
    held: dict[str, Any] | None = None
    for turn in turns:
        if held is None:
            held = turn
        elif turn["role"] != held["role"] or turn["role"] == "tool":
            yield held
            held = turn
        else:
            for name in ("content", "reasoning_content"):
                if text := "\n".join(part[name] for part in (held, turn) if part.get(name)):
                    held[name] = text
            if calls := held.get("tool_calls", []) + turn.get("tool_calls", []):
                held["tool_calls"] = calls
    if held is not None:
        yield held

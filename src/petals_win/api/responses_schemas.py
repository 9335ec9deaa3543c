"""What /v1/responses is asked: its fields and kinds of items, and the request to an engine that they mean.

Nothing of an answer is stored, so what refers to earlier ones is refused. Knows no engine, and not what is sent back.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal, NoReturn

from pydantic import BaseModel, Field, ValidationError, model_validator

from petals_win.api.errors import ApiError
from petals_win.api.schemas import Message, Sampling, Text
from petals_win.engines.base import Constraint, GenerationRequest

_ROLES = ("user", "assistant", "system", "developer")
_TEXT_PARTS = {"input_text": "text", "output_text": "text", "text": "text", "refusal": "refusal"}


def _asks(value: Any) -> bool:
    return bool(value)


class ReasoningOptions(BaseModel):
    effort: Annotated[Text | None, Field(description="for chat templates that know it")] = None


class TextFormat(BaseModel):
    """What the text of the answer has to be."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    name: Text | None = None
    json_schema: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None
    description: Text | None = None


class TextOptions(BaseModel):
    format: TextFormat = TextFormat()


class ResponsesRequest(Sampling):
    """Body of POST /v1/responses. The fields that /v1/chat/completions has beside OpenAI's are taken here, too."""

    refused: ClassVar[dict[str, Callable[[Any], bool]]] = Sampling.refused | {
        "background": _asks,
        "conversation": _asks,
        "messages": _asks,
        "previous_response_id": _asks,
        "prompt": _asks,
        "top_logprobs": _asks,
    }

    input: Annotated[
        Text | list[dict[str, Any]],
        Field(
            description="text, or items of type message, function_call and function_call_output; reasoning is left out"
        ),
    ]
    instructions: Annotated[Text | None, Field(description="a system message before the input")] = None
    max_output_tokens: Annotated[int | None, Field(ge=-1, description="0 and -1: as long as the context allows")] = (
        None
    )
    tools: Annotated[list[dict[str, Any]], Field(description="functions; tools of OpenAI's own are not to be had")] = (
        []
    )
    tool_choice: Annotated[
        Literal["auto", "none", "required"] | dict[str, Any],
        Field(description='auto, none, required, {"type": "function", "name": …} or {"type": "allowed_tools", …}'),
    ] = "auto"
    parallel_tool_calls: bool = True
    text: TextOptions = TextOptions()
    reasoning: ReasoningOptions = ReasoningOptions()
    metadata: Annotated[dict[str, Any], Field(description="sent back with the answer")] = {}

    @model_validator(mode="before")
    @classmethod
    def _nothing_is_stored(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        if data.get("previous_response_id") or data.get("conversation"):
            name = "previous_response_id" if data.get("previous_response_id") else "conversation"
            raise ApiError(
                400,
                f"{name}: no answers are stored here. Send the whole conversation as input.",
                code="unsupported",
                param=name,
            )
        include = data.get("include")
        if isinstance(include, list) and "message.output_text.logprobs" in include:
            _refuse("include", "message.output_text.logprobs is not supported here: leave it out")
        return data

    def request(self, model: str) -> GenerationRequest:
        """The request to `model`. Raises ApiError for items, tools and formats that cannot be had."""
        if self.n != 1:
            _refuse("n", "one answer in one response; ask several times")
        tools, choice = self._tools()
        most = self.max_tokens if self.max_output_tokens is None else self.max_output_tokens
        effort = self.reasoning.effort
        conversation = {
            "messages": tuple(self._turns()),
            "template": {} if effort is None else {"reasoning_effort": effort},
        }
        (request,) = self._requests([conversation], most, model)
        return replace(
            request,
            tools=tools,
            tool_choice=choice,
            parallel_tool_calls=self.parallel_tool_calls,
            constraint=self._constraint(),
        )

    def _turns(self) -> list[dict[str, Any]]:
        items = [{"role": "user", "content": self.input}] if isinstance(self.input, str) else self.input
        turns: list[dict[str, Any]] = []
        names: dict[str, str] = {}  # of the functions, by the ids of their calls
        if self.instructions:
            turns.append({"role": "system", "content": self.instructions})
        for number, item in enumerate(items):
            where = f"input[{number}]"
            match item.get("type", "message" if "role" in item else None):
                case "message":
                    turn = _message(item, where)
                    if turn["role"] == "system" and turns and turns[-1]["role"] == "system":
                        # Many templates take one system message, at the beginning.
                        turns[-1] = {**turns[-1], "content": f"{turns[-1]['content']}\n\n{turn['content']}"}
                    else:
                        turns.append(turn)
                case "function_call":
                    call = _call(item, where)
                    names[call["id"]] = call["function"]["name"]
                    # Calls belong to the turn in which the assistant made them.
                    if not turns or turns[-1]["role"] != "assistant":
                        turns.append({"role": "assistant", "content": ""})
                    turns[-1] = {**turns[-1], "tool_calls": [*turns[-1].get("tool_calls", ()), call]}
                case "function_call_output":
                    call_id = _text(item, "call_id", where)
                    content = _content(item.get("output"), f"{where}.output")
                    turn = {"role": "tool", "content": content, "tool_call_id": call_id}
                    turns.append(turn | ({"name": names[call_id]} if call_id in names else {}))
                case "reasoning":
                    pass
                case "item_reference":
                    _refuse(f"{where}.type", "no answers are stored here, so send the item itself")
                case kind:
                    shown = f"items of type {str(kind)[:40]!r}" if kind else "items without a type or a role"
                    _refuse(f"{where}.type", f"{shown} are not supported here")
        if not any(turn["role"] != "system" for turn in turns):
            _refuse("input", "there is no message in it; send at least one")
        return turns

    def _tools(self) -> tuple[tuple[dict[str, Any], ...], str]:
        """The functions that may be called, as chat templates know them, and which of them: see GenerationRequest."""
        functions: dict[str, dict[str, Any]] = {}
        for number, tool in enumerate(self.tools):
            where = f"tools[{number}]"
            if tool.get("type") != "function":
                kind = str(tool.get("type"))[:40]
                _refuse(f"{where}.type", f"tools of type {kind!r} are not to be had here, functions alone")
            function: dict[str, Any] = {"name": _text(tool, "name", where)}
            if tool.get("description") is not None:
                function["description"] = _text(tool, "description", where)
            parameters = tool.get("parameters")
            if not isinstance(parameters, dict | None):
                _refuse(f"{where}.parameters", "a JSON schema is needed")
            function["parameters"] = parameters or {"type": "object", "properties": {}}
            functions[function["name"]] = {"type": "function", "function": function}
        choice, names = self.tool_choice, list(functions)
        if isinstance(choice, dict):
            match choice.get("type"):
                case "function":
                    names = [_text(choice, "name", "tool_choice")]
                    choice = names[0]
                case "allowed_tools":
                    allowed = choice.get("tools")
                    if not isinstance(allowed, list) or not all(isinstance(tool, dict) for tool in allowed):
                        _refuse("tool_choice.tools", "a list of tools is needed")
                    names = [_text(tool, "name", "tool_choice.tools") for tool in allowed]
                    choice = "required" if choice.get("mode") == "required" else "auto"
                case kind:
                    _refuse("tool_choice", f"a choice of type {str(kind)[:40]!r} is not supported here")
        for name in names:
            if name not in functions:
                _refuse("tool_choice", f"there is no tool {name[:100]!r} in the request")
        if choice == "required" and not names:
            _refuse("tool_choice", "there is no tool that could be called")
        return tuple(functions[name] for name in functions if name in names or choice == name), choice

    def _constraint(self) -> Constraint | None:
        match self.text.format:
            case TextFormat(type="json_object"):
                return Constraint("json_schema", '{"type": "object"}')
            case TextFormat(type="json_schema", json_schema=schema):
                if schema is None:
                    _refuse("text.format.schema", "a JSON schema is needed")
                return Constraint("json_schema", json.dumps(schema))
        return None


def _message(item: dict[str, Any], where: str) -> dict[str, Any]:
    role = item.get("role")
    if role not in _ROLES:
        _refuse(f"{where}.role", f"one of {', '.join(_ROLES)} is needed")
    return {
        "role": "system" if role == "developer" else role,
        "content": _content(item.get("content"), f"{where}.content"),
    }


def _call(item: dict[str, Any], where: str) -> dict[str, Any]:
    """A call as chat templates know it, its arguments an object unless they are no JSON."""
    call = {"name": _text(item, "name", where), "arguments": item.get("arguments")}
    try:
        message = Message.model_validate(
            {"role": "assistant", "tool_calls": [{"id": _text(item, "call_id", where), "function": call}]}
        )
    except ValidationError:
        _refuse(f"{where}.arguments", "JSON as text is needed")
    return message.turn()["tool_calls"][0]


def _content(value: Any, where: str) -> str:
    """Text, or the joined texts of parts."""
    if isinstance(value, str):
        return _whole(value, where)
    if not isinstance(value, list):
        _refuse(where, "a text or a list of parts is needed")
    texts: list[str] = []
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else None
        text = part.get(_TEXT_PARTS[kind]) if isinstance(part, dict) and kind in _TEXT_PARTS else None
        if not isinstance(text, str):
            _refuse(where, f"parts of type {str(kind)[:40]!r} are not supported here, text alone")
        texts.append(_whole(text, where))
    return "".join(texts)


def _text(item: dict[str, Any], name: str, where: str) -> str:
    value = item.get(name)
    if not isinstance(value, str) or not value:
        _refuse(f"{where}.{name}", "a text is needed")
    return _whole(value, f"{where}.{name}")


def _whole(text: str, where: str) -> str:
    if any("\ud800" <= character <= "\udfff" for character in text):
        _refuse(where, "half of a surrogate pair (\\ud800 to \\udfff) is no text")
    return text


def _refuse(where: str, why: str) -> NoReturn:
    raise ApiError(400, f"{where}: {why}.", param=where)

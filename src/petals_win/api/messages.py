"""The turns of a conversation as OpenAI's clients send them. Knows what roles, parts and tool calls look like; not what is asked."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

from petals_win.api.documented import null_is_left_out


def whole_characters(text: str) -> str:
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("half of a surrogate pair (\\ud800 to \\udfff) is no text")
    return text


# JSON can escape what UTF-8 cannot carry; no tokenizer takes it.
Text = Annotated[str, AfterValidator(whole_characters)]


def arguments_as_object(text: str) -> dict[str, Any] | None:
    """The arguments of a call as the model wrote them; None if they are no JSON object. No text at all is an empty one."""
    try:
        parsed = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return None
    return parsed if isinstance(parsed, dict) else None


class Function(BaseModel):
    """A function that the assistant called, with its arguments as JSON."""

    name: Text
    arguments: Any = "{}"

    @field_validator("arguments")
    @classmethod
    def _as_object(cls, value: Any) -> Any:
        """Chat templates expect an object. What is none stays the text that it is."""
        if isinstance(value, str):
            parsed = arguments_as_object(value)
            return value if parsed is None else parsed
        return {} if value is None else value


class ToolCall(BaseModel):
    """A call of a tool, as answers of OpenAI's have it."""

    id: Text = ""
    function: Function


def _text_or_parts(schema: dict[str, Any]) -> None:
    part = {"type": "object", "properties": {"type": {"const": "text"}, "text": {"type": "string"}}}
    schema["anyOf"] = [{"type": schema.pop("type")}, {"type": "array", "items": part}]


def _turn(schema: dict[str, Any]) -> None:
    schema["required"].remove("content")  # of which roles say it, the field's description tells
    null_is_left_out(schema)


class Message(BaseModel):
    """One turn of a conversation. Other fields, as answers of OpenAI's have them, are ignored."""

    model_config = ConfigDict(json_schema_extra=_turn)

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Annotated[
        Text,
        Field(
            description="text, or a list of parts of type text; may be null or left out of what assistants and tools say",
            json_schema_extra=_text_or_parts,
        ),
    ]
    name: Text | None = None
    tool_call_id: Text | None = None
    tool_calls: list[ToolCall] = []
    reasoning_content: Text | None = None

    @model_validator(mode="before")
    @classmethod
    def _bring_up_to_date(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        data = {name: value for name, value in data.items() if value is not None}
        if data.get("role") in ("assistant", "tool", "function"):
            data.setdefault("content", "")
        if isinstance(data.get("reasoning"), str):  # another name of it
            data.setdefault("reasoning_content", data["reasoning"])
        # What tool calls were before there were several of them.
        if "function_call" in data and not data.get("tool_calls"):
            data["tool_calls"] = [{"function": data["function_call"]}]
        return data

    @field_validator("content", mode="before")
    @classmethod
    def _join_parts(cls, value: Any) -> Any:
        if not isinstance(value, list):
            return value
        texts = [part if isinstance(part, str) else _text_of(part) for part in value]
        if not all(isinstance(text, str) for text in texts):
            kind = next(
                (_kind_of(part) for part, text in zip(value, texts, strict=True) if not isinstance(text, str)), ""
            )
            raise ValueError(f"only parts of type text are supported here, and no images, sound or files{kind}")
        return "".join(texts)

    def turn(self) -> dict[str, Any]:
        """As chat templates know it: "developer" is OpenAI's newer name for system, "function" the older one for tool."""
        role = {"developer": "system", "function": "tool"}.get(self.role, self.role)
        turn: dict[str, Any] = {"role": role, "content": self.content}
        for name in ("name", "tool_call_id", "reasoning_content"):
            if value := getattr(self, name):
                turn[name] = value
        if self.tool_calls and role == "assistant":
            turn["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {"name": call.function.name, "arguments": call.function.arguments},
                }
                for call in self.tool_calls
            ]
        return turn


def _kind_of(part: Any) -> str:
    """What an unsupported part says it is, as the end of a sentence."""
    kind = part.get("type") if isinstance(part, dict) else None
    return f", such as {kind:.40}" if isinstance(kind, str) else ""


def _text_of(part: Any) -> Any:
    return part.get("text", part.get("refusal")) if isinstance(part, dict) else None


def name_results(messages: list[dict[str, Any]]) -> None:
    """Results of tools name the call that they answer; chat templates want the tool's name, too."""
    tools = {call["id"]: call["function"]["name"] for turn in messages for call in turn.get("tool_calls", ())}
    for turn in messages:
        if turn["role"] == "tool" and (name := tools.get(turn.get("tool_call_id", ""))):
            turn.setdefault("name", name)

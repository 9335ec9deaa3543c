"""Tools that a model may call, as OpenAI's clients name them, in today's way and in the older one.

Knows their fields. Does not know how a model is told of them.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, Field

from petals_win.api.errors import ApiError
from petals_win.api.messages import Text, whole_characters


class ToolFunction(BaseModel):
    """A function that the model may call; `parameters` is the JSON schema of its arguments."""

    name: Annotated[str, Field(min_length=1, max_length=256), AfterValidator(whole_characters)]
    description: Text | None = None
    parameters: dict[str, Any] | None = None

    def as_tool(self) -> dict[str, Any]:
        """As the engine protocol has tools."""
        told = {"name": self.name, "description": self.description, "parameters": self.parameters}
        return {"type": "function", "function": {name: value for name, value in told.items() if value is not None}}


class Tool(BaseModel):
    """A tool that the model may call, of which there is one kind."""

    type: Literal["function"] = "function"
    function: ToolFunction


class CalledFunction(BaseModel):
    """The function to call, by its name."""

    name: Text


class NamedFunction(BaseModel):
    """The tool to call, by its name."""

    type: Literal["function"] = "function"
    function: CalledFunction


Choice = Literal["none", "auto", "required"]
_CHOICES = ("none", "auto", "required")


def check_tool_types(tools: Any) -> None:
    """Raises ApiError for the first tool that is no function. What is no list of tools is left to others to refuse."""
    for number, tool in enumerate(tools if isinstance(tools, list) else ()):
        kind = tool.get("type", "function") if isinstance(tool, dict) else "function"
        if kind != "function":
            raise ApiError(
                400,
                f"tools[{number}]: tools of type {str(kind)[:40]!r} are not supported here, functions are.",
                code="unsupported",
                param=f"tools[{number}].type",
            )


def checked_choice(value: Any, older: bool) -> Any:
    """Of a field that says what is to be called, the value. Raises ValueError with the forms that there are.

    older: in the way of `function_call`.
    """
    name = value.get("name") if older and isinstance(value, dict) else None
    if not older and isinstance(value, dict) and value.get("type", "function") == "function":
        function = value.get("function")
        name = function.get("name") if isinstance(function, dict) else None
    if isinstance(name, str) or value in (_CHOICES[:2] if older else _CHOICES):
        return value
    if older:
        raise ValueError('"none", "auto" or {"name": NAME} is needed')
    raise ValueError('"none", "auto", "required" or {"type": "function", "function": {"name": NAME}} is needed')


def read_choice(asked: Choice | NamedFunction | CalledFunction, names: list[str], param: str) -> str:
    """What the engine protocol calls `tool_choice`. Raises ApiError if there is no such tool, or none where one is required."""
    if isinstance(asked, NamedFunction):
        asked = asked.function
    if isinstance(asked, CalledFunction):
        if asked.name not in names or asked.name in _CHOICES:  # of which the protocol could not tell a name
            raise ApiError(
                400, f"{param}: there is no function {asked.name[:100]!r} that could be asked for.", param=param
            )
        return asked.name
    if asked == "required" and not names:
        raise ApiError(400, f"{param}: a call is required, but there is no function to call.", param=param)
    return asked

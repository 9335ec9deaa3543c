"""Answers that have to be a call of a tool: what holds them to it.

The call is JSON, {"name": ..., "arguments": {...}}, which the parsers of all formats read. Does not know models or tokens.
"""

from __future__ import annotations

import json
from dataclasses import replace

from petals_win.engines.base import Constraint, GenerationRequest
from petals_win.engines.constraints import as_understood
from petals_win.errors import UserError

_OBJECT = {"type": "object"}
_BEGIN, _BETWEEN, _END = '{"name": ', ', "arguments": ', "}"


def with_forced_call(request: GenerationRequest) -> GenerationRequest:
    """The request, held to a call of a tool, whose text no stop string ends; as it is if its tool_choice leaves the answer free.

    Raises UserError if there is no tool that could be called.
    """
    if request.tool_choice in ("auto", "none"):
        return request
    functions = [tool["function"] for tool in request.tools]
    if request.tool_choice != "required":
        functions = [function for function in functions if function["name"] == request.tool_choice]
        if not functions:
            raise UserError(f"tool_choice: there is no tool {request.tool_choice[:100]!r} among the tools.")
    if not functions:
        raise UserError("tool_choice: there are no tools of which one could be called. Send tools, too.")
    return replace(request, constraint=Constraint("grammar", _grammar(functions)), stop=())


def _grammar(functions: list[dict[str, object]]) -> str:
    """In Lark's notation, in which each schema is a document of its own, so that what it refers to is found."""
    rules = ["start: " + " | ".join(f"call{number}" for number in range(len(functions)))]
    for number, function in enumerate(functions):
        begin = _BEGIN + json.dumps(function["name"]) + _BETWEEN
        rules.append(f"call{number}: {json.dumps(begin)} arguments{number} {json.dumps(_END)}")
        parameters = function.get("parameters") or {}
        if isinstance(parameters, dict):
            parameters = _OBJECT | parameters  # arguments are one, also where the schema leaves it open
        try:
            parameters = as_understood(parameters)
        except ValueError as e:
            raise UserError(f"tools: the parameters of {str(function['name'])[:100]!r} cannot be used: {e}.") from e
        rules.append(f"arguments{number}: %json {json.dumps(parameters)}")
    return "\n".join(rules)

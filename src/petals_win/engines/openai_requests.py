"""A request as OpenAI's API has it, with what vLLM, llama.cpp and petals-win take beside that. Knows fields only."""

from __future__ import annotations

import json
from typing import Any

from petals_win.engines.base import GenerationRequest
from petals_win.engines.outside import asked_for
from petals_win.errors import UserError


def path_and_body(request: GenerationRequest) -> tuple[str, dict[str, Any]]:
    """Where the request goes, below the server's base URL, and its body. Raises UserError for what other servers are not asked."""
    asked = dict(asked_for(request))
    body: dict[str, Any] = {"model": request.model, "stream": True, "stream_options": {"include_usage": True}}
    if request.count_along or request.stop:  # at a stop string we leave before the counts of the end
        body["stream_options"]["continuous_usage_stats"] = True
    if request.max_tokens is not None:
        body["max_tokens"] = request.max_tokens
    logprobs = asked.pop("logprobs", None)
    body |= _constraint(asked, request)
    if "logit_bias" in asked:
        body["logit_bias"] = {str(token): bias for token, bias in request.logit_bias.items()}
        del asked["logit_bias"]
    for ours in ("json_schema", "regex", "grammar", "tools"):
        asked.pop(ours, None)
    body |= asked
    if request.prompt is not None:
        body["prompt"] = list(request.prompt) if isinstance(request.prompt, tuple) else request.prompt
        if request.max_tokens is None:
            body["max_tokens"] = -1  # left out, it would be 16
        if logprobs is not None:
            body["logprobs"] = logprobs
        return "completions", body
    body["messages"] = [_turn(message) for message in request.messages or ()]
    if request.continue_final:
        body["add_generation_prompt"] = False
    if logprobs is not None:
        body |= {"logprobs": True, "top_logprobs": logprobs}
    if request.tools:
        body["tools"] = list(request.tools)
        named = request.tool_choice not in ("auto", "none", "required")
        function = {"type": "function", "function": {"name": request.tool_choice}}
        body["tool_choice"] = function if named else request.tool_choice
        if not request.parallel_tool_calls:
            body["parallel_tool_calls"] = False
    return "chat/completions", body


def _constraint(asked: dict[str, Any], request: GenerationRequest) -> dict[str, Any]:
    if request.constraint is None:
        return {}
    if request.constraint.kind == "json_schema":
        schema = json.loads(request.constraint.text)
        named = {"name": "answer", "schema": schema, "strict": True}
        return {"response_format": {"type": "json_schema", "json_schema": named}}
    # Servers understand these in different ways, or pass over them without a word.
    raise UserError(
        f"{request.constraint.kind}: {request.model} is on another server, which is asked for JSON schemas only."
    )


def _turn(message: dict[str, Any]) -> dict[str, Any]:
    """With arguments of calls as text, which they are in OpenAI's API."""
    if "tool_calls" not in message:
        return message
    calls = []
    for call in message["tool_calls"]:
        arguments = call["function"]["arguments"]
        text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        calls.append({**call, "function": {**call["function"], "arguments": text}})
    return {**message, "tool_calls": calls}

"""What LiteLLM gets of an API: python litellm_client.py URL MODEL, questions as JSON on standard input, what it read as JSON
on standard output. It judges nothing, and runs in an environment of its own, without petals-win."""

from __future__ import annotations

import json
import sys
from typing import Any

import litellm

url, model = sys.argv[1:]
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOL = {"type": "function", "function": {"name": "weather", "description": "Tells it.", "parameters": PARAMETERS}}
FORMAT = {"type": "json_schema", "json_schema": {"name": "place", "schema": PARAMETERS, "strict": True}}


def ask(text: str, *, model: str = model, **fields: Any) -> Any:
    fields = {"temperature": 0, "max_tokens": 100, "num_retries": 0, "timeout": 60, **fields}
    messages = [{"role": "user", "content": text}]
    return litellm.completion(f"openai/{model}", messages, api_base=f"{url}/v1", api_key="unused", **fields)


def brief(answer: Any) -> dict[str, Any]:
    choice = answer.choices[0]
    calls = [[call.function.name, call.function.arguments] for call in choice.message.tool_calls or ()]
    tokens = answer.usage.completion_tokens
    return {"text": choice.message.content, "calls": calls, "reason": choice.finish_reason, "tokens": tokens}


def streamed(text: str, **fields: Any) -> dict[str, Any]:
    chunks = list(ask(text, stream=True, stream_options={"include_usage": True}, **fields))
    return brief(litellm.stream_chunk_builder(chunks)) | {"chunks": len(chunks)}


def broken_stream(text: str) -> None:
    for _ in ask(text, stream=True):
        pass


TOLD = {
    "whole": lambda text: brief(ask(text)),
    "streamed": streamed,
    "called": lambda text: brief(ask(text, tools=[TOOL], tool_choice="auto")),
    "called_streamed": lambda text: streamed(text, tools=[TOOL]),
    "structured": lambda text: brief(ask(text, response_format=FORMAT)),
    "completion": lambda text: litellm.text_completion(
        prompt=text, model=f"text-completion-openai/{model}", api_base=f"{url}/v1", api_key="unused"
    )
    .choices[0]
    .text,
    "embedded": lambda text: len(
        litellm.embedding(f"openai/{model}", [text], api_base=f"{url}/v1", api_key="unused").data[0]["embedding"]
    ),
    "unknown_model": lambda text: ask(text, model="nobody/nothing"),
    "too_long": ask,
    "failing": ask,
    "broken_stream": broken_stream,
}

litellm.suppress_debug_info = True
answers: dict[str, Any] = {}
for name, question in json.load(sys.stdin).items():
    try:
        answers[name] = TOLD[name](question)
    except Exception as e:
        if not type(e).__module__.startswith("litellm"):
            raise
        answers[name] = {"error": type(e).__name__, "status": getattr(e, "status_code", None), "message": str(e)}
print(json.dumps(answers))

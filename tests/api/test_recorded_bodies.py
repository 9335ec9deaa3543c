"""Whole request bodies as Open WebUI and Continue send them, and what these programs read of the answers."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from api.fake_engine import MODEL
from api.serving import Served

SEARCH = {
    "type": "function",
    "function": {
        "name": "search_notes",
        "description": "Looks something up in the user's notes.",
        "parameters": {
            "type": "object",
            "properties": {
                "query": {"type": "string", "description": "what to look for"},
                "limit": {"type": "integer", "default": 5},
            },
            "required": ["query"],
        },
    },
}
READ_FILE = {
    "type": "function",
    "function": {
        "name": "builtin_read_file",
        "description": "Reads a file of the workspace.",
        "parameters": {"type": "object", "required": ["filepath"], "properties": {"filepath": {"type": "string"}}},
        "strict": False,
    },
}

# Open WebUI: a chat with a system prompt, parameters of the model's page, and the count of tokens below the answer.
WEBUI_CHAT = {
    "stream": True,
    "model": MODEL,
    "messages": [
        {"role": "system", "content": "You are terse.\n\nToday is Friday."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hello, what can I do?"},
        {"role": "user", "content": [{"type": "text", "text": "say Grüße an alle"}]},
    ],
    "stream_options": {"include_usage": True},
    "temperature": 0.7,
    "top_p": 0.95,
    "max_tokens": 512,
    "frequency_penalty": 0.1,
    "seed": 42,
    "stop": ["</answer>"],
    "logit_bias": {"50": -100},
    "reasoning_effort": "low",
}

# Open WebUI: titles, tags and follow-ups, asked for in the background.
WEBUI_TITLE = {
    "model": MODEL,
    "messages": [{"role": "user", "content": 'say {"title": "Grüße"}'}],
    "stream": False,
    "max_completion_tokens": 1000,
}

# Open WebUI: tools that the model calls itself ("native"), and the request with their results.
WEBUI_TOOLS = {
    "stream": True,
    "model": MODEL,
    "messages": [{"role": "user", "content": 'call search_notes {"query":"Köln"} search_notes {"query":"Bonn"}'}],
    "tools": [SEARCH],
}
WEBUI_RESULTS = {
    "stream": True,
    "model": MODEL,
    "messages": [
        {"role": "user", "content": "What do my notes say?"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [
                {
                    "index": 0,
                    "id": "call_0",
                    "type": "function",
                    "function": {"name": "search_notes", "arguments": '{"query": "Köln"}'},
                }
            ],
        },
        {"role": "tool", "tool_call_id": "call_0", "content": "say nothing"},
    ],
    "tools": [SEARCH],
}

# Continue: chat, its agent with tools and their results, and completion in the editor.
CONTINUE_CHAT = {
    "messages": [
        {"role": "system", "content": "You are in chat mode."},
        {"role": "user", "content": "say fine"},
    ],
    "model": MODEL,
    "max_tokens": 4096,
    "stream": True,
}
CONTINUE_AGENT = {
    "messages": [{"role": "user", "content": 'call builtin_read_file {"filepath":"a.py"} | I look'}],
    "model": MODEL,
    "max_tokens": 4096,
    "stream": True,
    "tools": [READ_FILE],
    "parallel_tool_calls": False,
}
CONTINUE_RESULTS = {
    **CONTINUE_AGENT,
    "messages": [
        {"role": "user", "content": "Read a.py"},
        {
            "role": "assistant",
            "content": " ",
            "tool_calls": [
                {
                    "id": "call_0",
                    "type": "function",
                    "function": {"name": "builtin_read_file", "arguments": '{"filepath":"a.py"}'},
                }
            ],
        },
        {"role": "tool", "content": "say done", "tool_call_id": "call_0"},
    ],
}
CONTINUE_COMPLETION = {
    "prompt": "say <fim_prefix>def f(): <fim_suffix> <fim_middle>",
    "model": MODEL,
    "max_tokens": 256,
    "temperature": 0.01,
    "stream": True,
    "stop": ["<fim_middle>", "/src/", "#- coding: utf-8", "```"],
}


def events(served: Served, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    response = httpx.post(f"{served.url}{path}", json=body)
    assert response.status_code == 200, response.text
    *lines, done = [line for line in response.text.splitlines() if line]
    assert done == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def put_together(chunks: list[dict[str, Any]]) -> tuple[str, list[tuple[str, str, str]], str]:
    """The text, the calls (id, name, arguments) and why the answer ended, as both programs read them of the deltas."""
    text, calls, reason = "", {}, ""
    for chunk in chunks:
        for choice in chunk["choices"]:
            text += choice["delta"].get("content") or ""
            for call in choice["delta"].get("tool_calls", ()):
                known = calls.setdefault(call["index"], {"id": call.get("id"), "name": "", "arguments": ""})
                known["name"] += call["function"].get("name", "")
                known["arguments"] += call["function"].get("arguments", "")
            reason = choice["finish_reason"] or reason
    return text, [(call["id"], call["name"], call["arguments"]) for call in calls.values()], reason


LOOK_UP = [("call_0", "search_notes", '{"query":"Köln"}'), ("call_1", "search_notes", '{"query":"Bonn"}')]


@pytest.mark.parametrize(
    ("body", "text", "calls", "reason"),
    [
        (WEBUI_CHAT, "Grüße an alle", [], "stop"),
        (WEBUI_TOOLS, "", LOOK_UP, "tool_calls"),
        (WEBUI_RESULTS, "nothing", [], "stop"),
        (CONTINUE_CHAT, "fine", [], "stop"),
        (CONTINUE_AGENT, "I look", [("call_0", "builtin_read_file", '{"filepath":"a.py"}')], "tool_calls"),
        (CONTINUE_RESULTS, "done", [], "stop"),
    ],
)
def test_chats(served, body, text, calls, reason):
    chunks = events(served, "/v1/chat/completions", body)
    said, called, ended = put_together(chunks)
    assert (said.startswith(text), called, ended) == (True, calls, reason)
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    counted = [chunk for chunk in chunks if chunk.get("usage")]
    assert counted == (chunks[-1:] if "stream_options" in body else [])


def test_titles(served):
    answer = httpx.post(f"{served.url}/v1/chat/completions", json=WEBUI_TITLE).json()
    assert json.loads(answer["choices"][0]["message"]["content"]) == {"title": "Grüße"}


def test_a_completion_in_the_editor(served):
    chunks = events(served, "/v1/completions", CONTINUE_COMPLETION)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "<fim_prefix>def f(): <fim_suffix> "
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"


def test_the_agents_choice_reaches_the_engine(served):
    events(served, "/v1/chat/completions", CONTINUE_AGENT)
    [request] = served.engine.requests
    assert request.parallel_tool_calls is False and request.tools[0]["function"]["name"] == "builtin_read_file"

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

WEBUI_TAGS = {
    "model": MODEL,
    "messages": [{"role": "user", "content": 'say {"tags": ["notes"]}'}],
    "stream": False,
}

# Open WebUI: looking something up in files; and both forms of another kind of connection, to a server of Ollama's API.
WEBUI_EMBEDDINGS = {"input": ["A page of a file.", "Another page."], "model": MODEL}
WEBUI_OLLAMA_EMBEDDINGS = {"input": ["A page of a file."], "model": MODEL, "truncate": True}
WEBUI_OLLAMA_CHAT = {
    "model": f"{MODEL}:latest",
    "messages": [
        {"role": "system", "content": "You are terse."},
        {"role": "user", "content": "say Grüße", "images": []},
    ],
    "options": {"temperature": 0.7, "top_k": 40, "num_ctx": 4096, "num_predict": 128, "repeat_penalty": 1.1},
    "stream": True,
    "keep_alive": "5m",
    "think": False,
}

# Open WebUI: a connection that is set to OpenAI's newer API.
WEBUI_RESPONSES = {
    "model": MODEL,
    "input": [
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Hello"}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Hello, what is it?"}]},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "say Grüße"}]},
    ],
    "instructions": "You are terse.",
    "stream": True,
    "temperature": 0.7,
    "max_output_tokens": 256,
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

# Continue: a change of code that is marked (what was there is the prediction), the title of a session, and its index of a project.
CONTINUE_EDIT = {
    "messages": [{"role": "user", "content": "say def f(): pass"}],
    "model": MODEL,
    "max_tokens": 2048,
    "temperature": 0.01,
    "top_p": 1,
    "frequency_penalty": 0,
    "presence_penalty": 0,
    "stream": True,
    "stop": ["```"],
    "prediction": {"type": "content", "content": "def f():\n    return 1\n"},
    "stream_options": {"include_usage": True},
}
CONTINUE_TITLE = {
    "messages": [{"role": "user", "content": "say Grüße"}],
    "model": MODEL,
    "max_tokens": 16,
    "stream": False,
}
CONTINUE_EMBEDDINGS = {"input": ["def f(): pass", "x = 1"], "model": MODEL, "encoding_format": "base64"}

# Continue with its provider for Ollama: what it asks of the model first, a chat, and completion in the editor.
CONTINUE_OLLAMA_SHOW = {"name": MODEL}
CONTINUE_OLLAMA_CHAT = {
    "model": MODEL,
    "messages": [{"role": "user", "content": "say Grüße"}],
    "options": {"num_predict": 4096, "num_ctx": 8192, "stop": ["</s>"], "mirostat": None, "num_thread": None},
    "keep_alive": 1800,
    "stream": True,
}
CONTINUE_OLLAMA_COMPLETION = {
    "model": MODEL,
    "prompt": "say <fim_prefix>def f(): <fim_suffix> <fim_middle>",
    "raw": True,
    "options": {"num_predict": 256, "temperature": 0.01, "num_ctx": 8192, "stop": ["<fim_middle>"]},
    "keep_alive": 1800,
    "stream": True,
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
        (CONTINUE_EDIT, "def f(): pass", [], "stop"),
    ],
)
def test_chats(served, body, text, calls, reason):
    chunks = events(served, "/v1/chat/completions", body)
    said, called, ended = put_together(chunks)
    assert (said.startswith(text), called, ended) == (True, calls, reason)
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    counted = [chunk for chunk in chunks if chunk.get("usage")]
    assert counted == (chunks[-1:] if "stream_options" in body else [])


@pytest.mark.parametrize(
    ("body", "text"),
    [(WEBUI_TITLE, '{"title": "Grüße"}'), (WEBUI_TAGS, '{"tags": ["notes"]}'), (CONTINUE_TITLE, "Grüße")],
)
def test_what_is_asked_in_the_background(served, body, text):
    answer = httpx.post(f"{served.url}/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"][0]["message"]["content"] == text


@pytest.mark.parametrize(
    ("path", "body", "count"),
    [
        ("/v1/embeddings", WEBUI_EMBEDDINGS, 2),
        ("/v1/embeddings", CONTINUE_EMBEDDINGS, 2),
        ("/api/embed", WEBUI_OLLAMA_EMBEDDINGS, 1),
    ],
)
def test_embeddings(served, path, body, count):
    answer = httpx.post(f"{served.url}{path}", json=body)
    assert answer.status_code == 200, answer.text
    told = answer.json()
    assert len(told["data"] if "data" in told else told["embeddings"]) == count


def test_a_chat_by_the_newer_api(served):
    answer = httpx.post(f"{served.url}/v1/responses", json=WEBUI_RESPONSES)
    assert answer.status_code == 200, answer.text
    told = [json.loads(line.removeprefix("data: ")) for line in answer.text.splitlines() if line.startswith("data: ")]
    assert "".join(event["delta"] for event in told if event["type"] == "response.output_text.delta") == "Grüße"
    assert told[-1]["type"] == "response.completed"


@pytest.mark.parametrize(
    ("path", "body", "text"),
    [
        ("/api/chat", WEBUI_OLLAMA_CHAT, "Grüße"),
        ("/api/chat", CONTINUE_OLLAMA_CHAT, "Grüße"),
        ("/api/generate", CONTINUE_OLLAMA_COMPLETION, "<fim_prefix>def f(): <fim_suffix> "),
    ],
)
def test_by_ollamas_api(served, path, body, text):
    answer = httpx.post(f"{served.url}{path}", json=body)
    assert answer.status_code == 200, answer.text
    *pieces, last = [json.loads(line) for line in answer.text.splitlines()]
    said = "".join(piece["message"]["content"] if "message" in piece else piece["response"] for piece in pieces)
    assert (said, last["done"], last["done_reason"]) == (text, True, "stop")


def test_what_is_looked_up_first(served):
    for path in ("/v1/models", "/api/tags", "/api/version", "/api/ps"):
        assert httpx.get(f"{served.url}{path}").status_code == 200, path
    answer = httpx.post(f"{served.url}/api/show", json=CONTINUE_OLLAMA_SHOW)
    assert answer.status_code == 200, answer.text


def test_a_completion_in_the_editor(served):
    chunks = events(served, "/v1/completions", CONTINUE_COMPLETION)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "<fim_prefix>def f(): <fim_suffix> "
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"


def test_the_agents_choice_reaches_the_engine(served):
    events(served, "/v1/chat/completions", CONTINUE_AGENT)
    [request] = served.engine.requests
    assert request.parallel_tool_calls is False and request.tools[0]["function"]["name"] == "builtin_read_file"

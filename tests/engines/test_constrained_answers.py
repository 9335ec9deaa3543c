"""Whole answers of the engine "local" that are held to something: beside others, with drafts, as calls of tools, and when it cannot be."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from contract import Whole, refusal, started, whole
from tiny_chat import tiny_chat_model

from petals_win.client.drafts import Pace
from petals_win.engines.base import (
    Constraint,
    Event,
    Finished,
    GenerationRequest,
    Token,
    ToolCallArguments,
    ToolCallBegun,
    Usage,
)
from petals_win.engines.local import LocalEngine
from petals_win.engines.registry import EngineSettings, find_engine
from petals_win.engines.text import TextEngine

NUMBER = {"type": "integer", "minimum": 0, "maximum": 999}
SCHEMA = {
    "type": "object",
    "properties": {"a": NUMBER, "b": {"type": "array", "items": {"enum": ["x", None]}, "minItems": 2, "maxItems": 4}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
TREE = {
    "type": "object",
    "properties": {"more": {"$ref": "#/$defs/part"}},
    "required": ["more"],
    "additionalProperties": False,
    "$defs": {"part": {"type": "string", "maxLength": 3, "format": "of-nobody"}},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tiny_chat_model(tmp_path_factory.mktemp("chat") / "tiny", context=2048, ends=0)
    settings = folder / "generation_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "eos_token_id": 2}), encoding="utf-8")
    return folder


def use(folder: Path, action: Callable[[TextEngine], Awaitable]) -> Any:
    """Run a coroutine function on an engine; afterwards it holds nothing."""

    async def within():
        engine = await asyncio.to_thread(find_engine("local"), EngineSettings(str(folder)))
        assert isinstance(engine, TextEngine) and isinstance(engine.tokens, LocalEngine)
        budget = engine.tokens._blocks._budget
        async with started(engine):
            result = await asyncio.wait_for(action(engine), 100)
            assert budget.bytes_left == budget.total_bytes
            return result

    return asyncio.run(within())


def chat(**settings) -> GenerationRequest:
    messages = ({"role": "user", "content": "Hello"},)
    return GenerationRequest(**{"model": "tiny", "messages": messages, "temperature": 1, **settings})


def held(**settings) -> GenerationRequest:
    return chat(constraint=Constraint("json_schema", json.dumps(SCHEMA)), **settings)


def tool(name: str, parameters: Any = None) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name} | ({"parameters": parameters} if parameters else {})}


def check(answer: Whole) -> None:
    made = json.loads(answer.text)
    assert answer.reason == "stop" and made.keys() == SCHEMA["properties"].keys()
    assert 0 <= made["a"] <= 999 and 2 <= len(made["b"]) <= 4 and set(made["b"]) <= {"x", None}


@pytest.mark.parametrize(
    "settings", [{}, {"temperature": 0}, {"top_k": 1}, {"ignore_eos": True}, {"min_tokens": 300, "top_p": 0.5}]
)
def test_an_answer_holds_to_a_schema(folder, settings):
    """Whatever else chooses tokens; and an answer that is complete ends, even if it was not to end by itself."""
    check(use(folder, lambda engine: whole(engine, held(seed=5, **settings))))


def test_answers_beside_each_other(folder):
    """Those that are held to something, and those that are not: each the same as alone."""

    async def ask(engine: TextEngine):
        asked = [held(seed=seed) if seed % 2 else chat(temperature=0, max_tokens=20 + seed) for seed in range(4)]
        return [await whole(engine, each) for each in asked], await asyncio.gather(
            *(whole(engine, each) for each in asked)
        )

    alone, at_once = use(folder, ask)
    assert at_once == alone
    for answer in at_once[1::2]:
        check(answer)


def test_drafts_change_nothing(folder, monkeypatch):
    asked = [chat(constraint=Constraint("regex", "(ab[0-9]ab){9}"), seed=seed) for seed in range(3)]
    monkeypatch.setattr(Pace, "took", lambda *_: None)

    async def ask(engine: TextEngine):
        return [await whole(engine, each) for each in asked]

    plain = use(folder, ask)
    drafts: list[int] = []
    look_up = "petals_win.client.drafts.look_up"
    monkeypatch.setattr(look_up, lambda ids, match, length: drafts.append(length) or [int(ids[-3])] * length)
    monkeypatch.setattr(Pace, "plain", 1.0)
    monkeypatch.setattr(Pace, "of", lambda *_: 1.0)
    assert use(folder, ask) == plain and drafts
    assert all(answer.reason == "stop" and re.fullmatch("(ab[0-9]ab){9}", answer.text) for answer in plain)


def test_what_cannot_be_is_told_before_any_event(folder):
    async def ask(engine: TextEngine):
        wrong = Constraint("json_schema", '{"uniqueItems": true, "type": "array"}')
        tools = (tool("look"), tool("buy", {"properties": {"a": {"not": {}}}}))
        return [
            str(await refusal(engine, each))
            for each in (
                chat(constraint=wrong),
                chat(tool_choice="required"),
                chat(tool_choice="sell", tools=tools),
                chat(tool_choice="buy", tools=tools),
                chat(tool_choice="buy", tools=(tool("buy", [1]),)),
            )
        ]

    keyword, none, unknown, parameters, no_schema = use(folder, ask)
    assert keyword == "The JSON schema cannot be used: uniqueItems cannot be held to here. Leave it out."
    assert none.startswith("tool_choice: there are no tools")
    assert unknown == "tool_choice: there is no tool 'sell' among the tools."
    assert "the JSON schema of a tool, cannot be used: not cannot be held to here" in parameters
    assert no_schema == "tools: the parameters of 'buy' cannot be used: a JSON schema is an object."


async def called(engine: TextEngine, request: GenerationRequest) -> tuple[list[Event], str]:
    """The events of a call, and its arguments."""
    events = [event async for event in engine.generate(request)]
    return events, "".join(event.text for event in events if isinstance(event, ToolCallArguments))


@pytest.mark.parametrize("choice", ["required", "größe"])
def test_a_call_that_has_to_be(folder, choice):
    tools = (tool("look", SCHEMA), tool("größe", TREE))

    async def ask(engine: TextEngine):
        return [
            await called(engine, chat(tools=tools, tool_choice=choice, seed=seed, stop=("}",))) for seed in range(6)
        ]

    names = set()
    for events, arguments in use(folder, ask):
        begun, *pieces, finished, usage = events
        assert isinstance(begun, ToolCallBegun) and begun.index == 0 and begun.id.startswith("call_")
        assert all(isinstance(piece, ToolCallArguments) and piece.text for piece in pieces)
        assert finished == Finished("tool_calls") and isinstance(usage, Usage)
        assert json.loads(arguments).keys() == ({"more"} if begun.name == "größe" else {"a", "b"})
        names.add(begun.name)
    assert names <= {"look", "größe"} and (choice == "required" or names == {choice})


def test_a_call_that_is_cut_off(folder):
    async def ask(engine: TextEngine):
        long = {"properties": {"a": {"type": "string", "minLength": 300}}, "required": ["a"]}
        return [
            await called(engine, chat(tools=(tool("f", long),), tool_choice="f", max_tokens=n, seed=n))
            for n in (3, 100)
        ]

    (short, _), (cut, arguments) = use(folder, ask)
    assert isinstance(short[0], Token) and '{"name"'.startswith(short[0].text), "no call yet"
    assert [type(event) for event in short[1:]] == [Finished, Usage] and short[1] == Finished("length")
    assert isinstance(cut[0], ToolCallBegun) and cut[-2] == Finished("length")
    assert arguments.replace(" ", "").startswith('{"a":"') and 50 < len(arguments) < 100


def test_a_choice_that_leaves_it_open_holds_to_nothing(folder):
    async def ask(engine: TextEngine):
        asked = chat(tools=(tool("f"),), tool_choice="none", max_tokens=3, seed=1)
        return [event async for event in engine.generate(asked)]

    assert isinstance(use(folder, ask)[0], Token)

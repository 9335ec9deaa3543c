"""Requests, events and errors come over as they were, and what makes no sense is told apart."""

from __future__ import annotations

import os

import pytest

from petals_win.engines import base
from petals_win.errors import UserError
from petals_win.jobs import model
from petals_win.jobs.failures import BadMessage, Draining, WorkerFailed
from petals_win.jobs.schema import described

CHOSEN = base.ChosenToken(7, b"\xc3", -0.5, (base.TokenProbability(1, b"x", float("-inf")),))
EVENTS = [
    base.Token("Köln 😀", (CHOSEN,), (1, 2)),
    base.Thought("hm"),
    base.ToolCallBegun(0, "call_0", "clock"),
    base.ToolCallArguments(0, "{}"),
    base.Finished("stop", "end", (3,)),
    base.Finished("length"),
    base.Usage(0, 0, 0),
    base.Usage(5, 6, 7),
]
ERRORS = [
    base.ModelNotFound("gpt", ["a", "b"]),
    base.ContextTooLong(5, 4),
    base.EngineClosed(),
    base.SwarmFull("No room."),
    base.Full("Full."),
    base.SwarmRefused("No."),
    base.SwarmFailed("It fell."),
    base.SwarmUnavailable([3, 4]),
    UserError("Something."),
    Draining(),
    WorkerFailed("It failed."),
]


@pytest.mark.parametrize(
    "request_",
    [
        base.GenerationRequest(model="m", prompt=""),
        base.GenerationRequest(model="m", prompt=()),
        base.GenerationRequest(model="m", prompt=(1, 2, 3), seed=-5, max_tokens=0, top_k=0),
        base.GenerationRequest(
            model="a/b",
            messages=(
                {"role": "user", "content": "Köln"},
                {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]},
            ),
            template={"enable_thinking": False},
            continue_final=True,
            generation_prompt=False,
            max_tokens=5,
            min_tokens=2,
            ignore_eos=True,
            temperature=0.0,
            top_p=0.5,
            top_k=3,
            min_p=0.1,
            repetition_penalty=1.1,
            frequency_penalty=-0.5,
            presence_penalty=0.25,
            logit_bias={5: -100.0},
            stop=("a", "b"),
            stop_tokens=(9,),
            tools=({"type": "function"},),
            tool_choice="required",
            parallel_tool_calls=False,
            constraint=base.Constraint("regex", "a+"),
            logprobs=0,
            count_along=True,
            seed=7,
        ),
    ],
)
def test_requests(request_):
    assert model.question_in(model.put_question(request_, special=False)) == (request_, False)


@pytest.mark.parametrize("event", EVENTS)
def test_events(event):
    back = model.event_in(model.put_event(event))
    assert back == event and getattr(back, "ids", ()) == getattr(event, "ids", ())


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_errors(error):
    with pytest.raises(type(error)) as raised:
        model.event_in(model.put_failure(error))
    assert type(raised.value) is type(error) and str(raised.value) == str(error) and vars(raised.value) == vars(error)


def test_states():
    state = model.WorkerState("pc", (base.ModelCard("m", 5, 100),), True, "All.", False, 1, 2, 3, 4.5, None)
    assert model.state_in(model.put_state(state)) == state


@pytest.mark.parametrize(
    "request_",
    [
        base.GenerationRequest(model="m", prompt="x", temperature=float("nan")),
        base.GenerationRequest(model="m", messages=({"role": 5, "content": "x"},)),
        base.GenerationRequest(model="m", messages=({"role": "user", "content": ["x"]},)),
    ],
)
def test_nonsense_is_refused(request_):
    with pytest.raises(BadMessage):
        model.question_in(model.put_question(request_))


def test_ids_that_are_none():
    with pytest.raises(UserError, match="-1 is no token"):
        model.put_question(base.GenerationRequest(model="m", prompt=(-1,)))


def test_bytes_by_chance_raise_nothing_else():
    readers = (model.question_in, model.tokens_in, model.event_in, model.state_in, model.check_hello)
    whole = model.put_question(base.GenerationRequest(model="m", messages=({"role": "user", "content": "x"},)))
    for number in range(2000):
        junk = bytearray(whole)
        junk[number % len(junk)] = os.urandom(1)[0]
        for data in (bytes(junk), os.urandom(number % 64)):
            for reader in readers:
                try:
                    reader(data)
                except UserError:
                    pass


def test_a_proto_file_that_is_not_understood():
    with pytest.raises(ValueError, match="not understood"):
        described("package p;\nmessage A {\n  map<string, string> a = 1;\n}\n")

"""How models write thoughts and calls: outputs as each format has them, cut at every place, and what only looks like a call."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest

from petals_win.engines.base import Event, Thought, Token, ToolCallArguments, ToolCallBegun
from petals_win.engines.formats.answer import AnswerParser, Tags, Task
from petals_win.engines.formats.deepseek import DeepSeekCalls
from petals_win.engines.formats.harmony import HarmonyAnswer
from petals_win.engines.formats.json_calls import JsonCalls
from petals_win.engines.formats.llama import LlamaCalls
from petals_win.engines.formats.mistral import MistralCalls
from petals_win.engines.formats.tagged import GlmCalls, QwenCoderCalls

TOOLS = {
    "weather": {
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer"}, "places": {"type": "array"}},
    },
    "clock": {},
}
THINK = Tags("<think>", "</think>")

# What an answer comes to: text as it is, thoughts with this mark, and calls as name and arguments.
THOUGHT = "(thought) "
Said = str | tuple[str, dict | str]


@dataclass(frozen=True)
class Recorded:
    """An answer as a model writes it, and what it means."""

    format: type[AnswerParser]
    text: str
    means: Sequence[Said]
    task: Task = field(default_factory=lambda: Task(TOOLS))


def ulm(**more) -> tuple[str, dict]:
    return "weather", {"city": "Ulm"} | more


NOON = ("clock", {})
CALL = '{"name": "weather", "arguments": {"city": "Ulm"}}'
DS_BEGIN, DS_END, DS_SEP = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>"
DS_CALLS, DS_CALLS_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"

CALLS = {
    "hermes": Recorded(JsonCalls, f"<tool_call>\n{CALL}\n</tool_call>", [ulm()]),
    "hermes with text": Recorded(
        JsonCalls, f"I look it up.\n\n<tool_call>\n{CALL}\n</tool_call>", ["I look it up.", ulm()]
    ),
    "hermes several": Recorded(
        JsonCalls,
        f'<tool_call>\n{CALL}\n</tool_call>\n<tool_call>\n{{"name": "clock", "arguments": {{}}}}\n</tool_call>\n',
        [ulm(), NOON],
    ),
    "hermes text behind": Recorded(JsonCalls, f"<tool_call>{CALL}</tool_call>\nSo it is.", [ulm(), "\nSo it is."]),
    "qwen3 thinks": Recorded(
        JsonCalls,
        f"<think>\nThe user wants to know.\nI call <tool_call>.\n</think>\n\n<tool_call>\n{CALL}\n</tool_call>",
        [THOUGHT + "The user wants to know.\nI call <tool_call>.", ulm()],
        Task(TOOLS, tags=THINK),
    ),
    "no marks": Recorded(JsonCalls, f" {CALL}", [ulm()]),
    "arguments first": Recorded(
        JsonCalls, '<tool_call>{"arguments": {"city": "Ulm"}, "name": "weather"}</tool_call>', [ulm()]
    ),
    "arguments as text": Recorded(
        JsonCalls, '<tool_call>{"name": "weather", "arguments": "{\\"city\\": \\"Ulm\\"}"}</tool_call>', [ulm()]
    ),
    "no arguments": Recorded(
        JsonCalls,
        '<tool_call>{"name": "clock"}</tool_call><tool_call>{"name":"clock","arguments":null}</tool_call>',
        [NOON] * 2,
    ),
    "brackets and quotes within": Recorded(
        JsonCalls,
        '<tool_call>{"name": "weather", "arguments": {"city": "}]\\"</tool_call>\\\\", "places": [{"a": [1, "}"]}]}}</tool_call>',
        [("weather", {"city": '}]"</tool_call>\\', "places": [{"a": [1, "}"]}]})],
    ),
    "line ends in a text": Recorded(
        JsonCalls,
        '<tool_call>{"name": "weather", "arguments": {"city": "Neu\n\tUlm"}}</tool_call>',
        [("weather", {"city": "Neu\n\tUlm"})],
    ),
    "a list, as Granite has it": Recorded(JsonCalls, f"<|tool_call|>[{CALL}, {CALL}]", [ulm(), ulm()]),
    "phi 4": Recorded(JsonCalls, f"<|tool_call|>[{CALL}]<|/tool_call|>", [ulm()]),
    "llama": Recorded(LlamaCalls, '{"name": "weather", "parameters": {"city": "Ulm"}}', [ulm()]),
    "llama with type": Recorded(
        LlamaCalls, '{"type": "function", "name": "weather", "parameters": {"city": "Ulm"}}', [ulm()]
    ),
    "llama several": Recorded(
        LlamaCalls,
        '{"name": "weather", "parameters": {"city": "Ulm"}}; {"name": "clock", "parameters": {}}',
        [ulm(), NOON],
    ),
    "llama behind its mark": Recorded(
        LlamaCalls, '<|python_tag|>{"name": "weather", "parameters": {"city": "Ulm"}}', [ulm()]
    ),
    "llama forgets a bracket": Recorded(LlamaCalls, '{"name": "weather", "parameters": {"city": "Ulm"}', [ulm()]),
    "llama's own tools": Recorded(LlamaCalls, '<|python_tag|>weather.call(city="Ulm")', [ulm()]),
    "pythonic": Recorded(
        LlamaCalls,
        "[weather(city='Ulm', days=2, places=[{'a': (1,)}, None, true]), clock()]",
        [ulm(days=2, places=[{"a": [1]}, None, True]), NOON],
    ),
    "pythonic quotes": Recorded(LlamaCalls, '[weather(city=")]\\"\'")]', [("weather", {"city": ")]\"'"})]),
    "llama 4": Recorded(LlamaCalls, '<|python_start|>[weather(city="Ulm")]<|python_end|>', [ulm()]),
    "lfm 2": Recorded(
        LlamaCalls,
        '<|tool_call_start|>[weather(city="Ulm")]<|tool_call_end|>I look.',
        [ulm(), "I look."],
    ),
    "mistral": Recorded(
        MistralCalls, '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Ulm"}, "id": "abcdefgh1"}]', [ulm()]
    ),
    "mistral several": Recorded(
        MistralCalls, f'[TOOL_CALLS][{CALL},{{"name":"clock","arguments":{{}}}}]', [ulm(), NOON]
    ),
    "mistral, newer": Recorded(
        MistralCalls,
        'I look.[TOOL_CALLS]weather[ARGS]{"city": "Ulm"}[TOOL_CALLS]clock[ARGS]{}',
        ["I look.", ulm(), NOON],
    ),
    "mistral with an id": Recorded(
        MistralCalls, '[TOOL_CALLS]weather[CALL_ID]a1B2c3D4e[ARGS]{"city": "Ulm"}', [ulm()]
    ),
    "mistral without [ARGS]": Recorded(MistralCalls, '[TOOL_CALLS]weather{"city": "Ulm"}', [ulm()]),
    "magistral thinks": Recorded(
        MistralCalls,
        '[THINK]Hm.[/THINK][TOOL_CALLS]weather[ARGS]{"city": "Ulm"}',
        [THOUGHT + "Hm.", ulm()],
        Task(TOOLS, tags=Tags("[THINK]", "[/THINK]")),
    ),
    "deepseek v3": Recorded(
        DeepSeekCalls,
        f'{DS_CALLS}{DS_BEGIN}function{DS_SEP}weather\n```json\n{{"city": "Ulm"}}\n```{DS_END}\n'
        f"{DS_BEGIN}function{DS_SEP}clock\n```json\n{{}}\n```{DS_END}{DS_CALLS_END}",
        [ulm(), NOON],
    ),
    "deepseek v3.1": Recorded(
        DeepSeekCalls,
        f'I look.{DS_CALLS}{DS_BEGIN}weather{DS_SEP}{{"city": "Ulm"}}{DS_END}{DS_BEGIN}clock{DS_SEP}{{}}{DS_END}{DS_CALLS_END}',
        ["I look.", ulm(), NOON],
    ),
    "deepseek r1, whose prompt begins the thought": Recorded(
        DeepSeekCalls,
        f'Hm.\n</think>\n\n{DS_CALLS}{DS_BEGIN}function{DS_SEP}weather\n```json\n{{"city": "Ulm"}}\n```{DS_END}{DS_CALLS_END}',
        [THOUGHT + "Hm.", ulm()],
        Task(TOOLS, tags=THINK, prompt="<｜Assistant｜><think>\n"),
    ),
    "qwen3-coder": Recorded(
        QwenCoderCalls,
        "I look.\n<tool_call>\n<function=weather>\n<parameter=city>\nUlm\n</parameter>\n<parameter=days>\n2\n</parameter>\n"
        '<parameter=unknown>\n[1, "a"]\n</parameter>\n</function>\n</tool_call>',
        ["I look.", ulm(days=2, unknown=[1, "a"])],
    ),
    "qwen3-coder, a text of lines": Recorded(
        QwenCoderCalls,
        '<tool_call>\n<function=weather>\n<parameter=city>\n\n "Ulm"\n</p>\\\n\n</parameter>\n</function>\n</tool_call>',
        [("weather", {"city": '\n "Ulm"\n</p>\\\n'})],
    ),
    "qwen3-coder several, a mark forgotten": Recorded(
        QwenCoderCalls,
        "<function=clock>\n</function>\n</tool_call>\n<tool_call>\n<function=weather>\n<parameter=city>Ulm</parameter>\n</function>\n</tool_call>",
        [NOON, ulm()],
    ),
    "qwen3-coder as JSON": Recorded(QwenCoderCalls, f"<tool_call>\n{CALL}\n</tool_call>", [ulm()]),
    "glm 4.5": Recorded(
        GlmCalls,
        "\n<think>Hm.</think>\nI look.\n<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Ulm</arg_value>\n"
        "<arg_key>days</arg_key>\n<arg_value>2</arg_value>\n</tool_call>\n<tool_call>clock\n</tool_call>",
        [THOUGHT + "Hm.", "I look.", ulm(days=2), NOON],
        Task(TOOLS, tags=THINK),
    ),
    "glm 4.5, values of other kinds": Recorded(
        GlmCalls,
        "<tool_call>clock<arg_key>a</arg_key><arg_value>True</arg_value><arg_key>b</arg_key><arg_value>ten past</arg_value>"
        '<arg_key>c</arg_key><arg_value>{"d": null}</arg_value></tool_call>',
        [("clock", {"a": True, "b": "ten past", "c": {"d": None}})],
    ),
    "gpt-oss": Recorded(
        HarmonyAnswer,
        "<|channel|>analysis<|message|>I look it up.<|end|><|start|>assistant<|channel|>commentary to=functions.weather "
        '<|constrain|>json<|message|>{"city": "Ulm"}<|call|>',
        [THOUGHT + "I look it up.", ulm()],
    ),
    "gpt-oss, the tool before the channel": Recorded(
        HarmonyAnswer, ' to=functions.weather<|channel|>commentary json<|message|>{"city": "Ulm"}<|call|>', [ulm()]
    ),
    "gpt-oss says something first": Recorded(
        HarmonyAnswer,
        "<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>analysis<|message|>b<|end|>"
        "<|start|>assistant<|channel|>commentary<|message|>I look.<|end|>"
        "<|start|>assistant<|channel|>commentary to=functions.clock<|constrain|>json<|message|><|call|>",
        [THOUGHT + "a\n\nb", "I look.", NOON],
    ),
    "gpt-oss answers": Recorded(
        HarmonyAnswer,
        "<|channel|>analysis<|message|>Easy.<|end|><|start|>assistant<|channel|>final<|message|>Ulm\nis fine.<|return|>",
        [THOUGHT + "Easy.", "Ulm\nis fine."],
    ),
}

JUST_TEXT = {
    "plain": (JsonCalls, "Ulm is in < Germany.\n\nSo. "),
    "another tool": (JsonCalls, '<tool_call>\n{"name": "rain", "arguments": {}}\n</tool_call>'),
    "not complete": (JsonCalls, '<tool_call>\n{"name": "weather", "argu'),
    "no JSON": (JsonCalls, "<tool_call>weather</tool_call>"),
    "broken JSON": (JsonCalls, '<tool_call>{"name": "weather", arguments}</tool_call>'),
    "arguments that are none": (JsonCalls, '<tool_call>{"name": "weather", "arguments": [1]}</tool_call>'),
    "arguments in a broken text": (JsonCalls, '<tool_call>{"name": "weather", "arguments": "city"}</tool_call>'),
    "an answer that is JSON": (LlamaCalls, '{"name": "Ulm", "parameters": {"rivers": ["Danube"]}}'),
    "a list": (LlamaCalls, "[1, 2]"),
    "a reference": (LlamaCalls, "[1] says that weather(city) is fine."),
    "another function": (LlamaCalls, '[print("weather(city=1)")]'),
    "no literals": (LlamaCalls, "[weather(city=place)]"),
    "no names": (LlamaCalls, '[weather("Ulm")]'),
    "many brackets": (LlamaCalls, "[weather(city=" + "(" * 3000 + ")" * 3000 + ")]"),
    "mistral": (MistralCalls, "[TOOL_CALLS] none [ARGS]"),
    "mistral, another tool": (MistralCalls, '[TOOL_CALLS]rain[ARGS]{"city": "Ulm"}'),
    "deepseek": (DeepSeekCalls, f"{DS_CALLS}{DS_BEGIN}function{DS_SEP}rain\n```json\n{{}}\n```{DS_END}{DS_CALLS_END}"),
    "glm": (GlmCalls, "<tool_call>weather in Ulm</tool_call>"),
    "qwen3-coder": (QwenCoderCalls, "<tool_call>\n<function=rain>\n</function>\n</tool_call>"),
    "gpt-oss without channels": (HarmonyAnswer, " to be < or <b> not"),
}  # fmt: skip


def read(format: type[AnswerParser], pieces: Sequence[str], task: Task | None = None) -> list[Event]:
    parser = format(task or Task(TOOLS))
    return [event for piece in pieces for event in parser.feed(piece)] + parser.finish()


def meaning(events: Sequence[Event], *, whole: bool = True) -> list[Said]:
    """With the pieces of each thing put together, and without the ids of calls."""
    said: list = []
    for event in events:
        match event:
            case ToolCallBegun():
                assert event.index == sum(isinstance(each, tuple) for each in said) and re.fullmatch(
                    r"\w{9,}", event.id
                )
                said.append((event.name, ""))
            case ToolCallArguments():
                assert event.text and event.index == sum(isinstance(each, tuple) for each in said) - 1
                said[-1] = (said[-1][0], said[-1][1] + event.text)
            case Thought() | Token():
                assert event.text
                mark = THOUGHT if isinstance(event, Thought) else ""
                if said and isinstance(said[-1], str) and said[-1].startswith(THOUGHT) == bool(mark):
                    said[-1] += event.text
                else:
                    said.append(mark + event.text)
    return [(each[0], json.loads(each[1])) if whole and isinstance(each, tuple) else each for each in said]


@pytest.mark.parametrize("name", CALLS)
def test_calls_and_thoughts_wherever_the_text_is_cut(name):
    recorded = CALLS[name]
    text = recorded.text
    cuts = [[text], list(text)] + [[text[:at], text[at:]] for at in range(1, len(text))]
    for pieces in cuts:
        assert meaning(read(recorded.format, pieces, recorded.task)) == recorded.means, pieces


@pytest.mark.parametrize("name", JUST_TEXT)
def test_what_is_no_call_is_text(name):
    format, text = JUST_TEXT[name]
    for pieces in [[text], list(text)] + [[text[:at], text[at:]] for at in range(1, min(len(text), 300))]:
        assert meaning(read(format, pieces)) == [text], pieces


@pytest.mark.parametrize("name", CALLS)
def test_without_tools_a_call_is_text(name):
    """Thoughts are told all the same."""
    recorded = CALLS[name]
    events = read(recorded.format, list(recorded.text), Task({}, tags=recorded.task.tags, prompt=recorded.task.prompt))
    assert not [event for event in events if isinstance(event, ToolCallBegun | ToolCallArguments)]
    thoughts = [each for each in recorded.means if isinstance(each, str) and each.startswith(THOUGHT)]
    said = meaning(events)
    assert said[: len(thoughts)] == thoughts
    if recorded.format is not HarmonyAnswer and not thoughts:
        assert said == [recorded.text]


@pytest.mark.parametrize("name", CALLS)
def test_only_one_call_if_no_more_are_wanted(name):
    recorded = CALLS[name]
    task = Task(TOOLS, parallel=False, tags=recorded.task.tags, prompt=recorded.task.prompt)
    parser = recorded.format(task)
    events: list[Event] = []
    for character in recorded.text:
        events += parser.feed(character)
        if parser.stopped:
            break
    else:
        events += parser.finish()
    calls = [at for at, each in enumerate(recorded.means) if isinstance(each, tuple)]
    assert meaning(events) == recorded.means[: calls[0] + 1 if calls else None]


@pytest.mark.parametrize("name", CALLS)
def test_an_answer_that_is_cut_off_loses_nothing_and_ends(name):
    """At any place; what is told of it is what would be told of the whole, but for what the rest would have made of it."""
    recorded = CALLS[name]
    whole = meaning(read(recorded.format, [recorded.text], recorded.task), whole=False)
    for at in range(len(recorded.text)):
        part = recorded.text[:at]
        said = meaning(read(recorded.format, list(part), recorded.task), whole=False)
        letters = "".join(each if isinstance(each, str) else "".join(each) for each in said)
        assert len(said) <= len(whole) + 2
        if said and isinstance(said[0], tuple):
            assert whole[0][0] == said[0][0]
        for word in ("Ulm", "Hm", "clock"):
            assert letters.count(word) >= part.count(word) - 1, (part, said)


def test_arguments_come_as_they_are_written():
    for format, begin, end in (
        (JsonCalls, '<tool_call>{"name": "weather", "arguments": {"city": "', '"}}</tool_call>'),
        (LlamaCalls, '{"name": "weather", "parameters": {"city": "', '"}}'),
        (MistralCalls, '[TOOL_CALLS]weather[ARGS]{"city": "', '"}'),
        (
            QwenCoderCalls,
            "<tool_call>\n<function=weather>\n<parameter=city>\n",
            "\n</parameter>\n</function>\n</tool_call>",
        ),
        (GlmCalls, "<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>", "</arg_value>\n</tool_call>"),
        (HarmonyAnswer, '<|channel|>commentary to=functions.weather<|message|>{"city": "', '"}<|call|>'),
    ):
        parser = format(Task(TOOLS))
        begun = parser.feed(begin)
        assert isinstance(begun[0], ToolCallBegun)
        for word in ("Neu", " Ulm"):
            assert parser.feed(word) == [ToolCallArguments(0, word)], format
        assert meaning([*begun, ToolCallArguments(0, "Neu Ulm"), *parser.feed(end), *parser.finish()]) == [
            ("weather", {"city": "Neu Ulm"})
        ]


def test_text_comes_as_it_is_written():
    parser = JsonCalls(Task(TOOLS, tags=THINK))
    assert parser.feed("It") == [Token("It")]
    assert parser.feed(" is a <") == [Token(" is a")], "which may be the beginning of a call"
    assert parser.feed("b") == [Token(" <b")]
    assert parser.finish() == []


def test_thoughts_come_as_they_are_written():
    parser = AnswerParser(Task({}, tags=THINK))
    assert parser.feed("<think>\n") == []
    assert parser.feed("Hm") == [Thought("Hm")]
    assert parser.feed(" <") == [] and parser.feed("b\n") == [Thought(" <b")]
    assert parser.feed("</think>\n\n ") == []
    assert parser.feed("Ulm\n") == [Token("Ulm\n")]
    assert parser.finish() == []


@pytest.mark.parametrize(
    ("text", "means", "task"),
    [
        ("Ulm", ["Ulm"], {}),
        ("\n\n Ulm\n", ["\n\n Ulm\n"], {}),
        ("<think>\n\n</think>\n\nUlm", ["Ulm"], {}),
        ("<think>Hm", [THOUGHT + "Hm"], {}),
        ("Ulm <think>Hm</think>", ["Ulm <think>Hm</think>"], {}),
        ("Hm</think>Ulm", [THOUGHT + "Hm", "Ulm"], {"prompt": "<|im_start|>assistant\n<think>\n"}),
        ("<think>Hm</think>Ulm", [THOUGHT + "Hm", "Ulm"], {"prompt": "<|im_start|>assistant\n<think>\n"}),
        ("Ulm", ["Ulm"], {"prompt": "<|im_start|>assistant\n<think>\n\n</think>\n\n"}),
        ("m</think>Ulm", [THOUGHT + "m", "Ulm"], {"prompt": "<think>H", "continued": "<think>H"}),
        ("m", ["m"], {"prompt": "<think>H</think>Ul", "continued": "<think>H</think>Ul"}),
    ],
)
def test_thoughts(text, means, task):
    for pieces in [[text], list(text)]:
        assert meaning(read(AnswerParser, pieces, Task({}, tags=THINK, **task))) == means


@pytest.mark.parametrize(
    ("prompt", "text", "means"),
    [
        ("<|start|>assistant<|channel|>final<|message|>Ul", "m.<|return|>", ["m."]),
        ("<|start|>assistant<|channel|>analysis<|message|>H", "m.<|end|>", [THOUGHT + "m."]),
        ("<|start|>assistant", "<|channel|>commentary to=functions.rain<|message|>{}<|call|>", ["{}"]),
        ("<|start|>assistant", "<|channel|>broken", ["broken"]),
        ("<|start|>assistant", "<|channel|>" * 200 + "broken", ["broken"]),
    ],
)
def test_gpt_oss_goes_on_where_the_prompt_ends(prompt, text, means):
    assert meaning(read(HarmonyAnswer, list(text), Task(TOOLS, prompt=prompt))) == means


def test_control_tokens_of_what_is_no_call_are_left_out():
    """As they are in any other text."""
    task = Task(TOOLS, controls={5: "[TOOL_CALLS]", 6: "[ARGS]"})
    assert meaning(read(MistralCalls, ["a [TOOL_CALLS]", "rain", "[ARGS]", "{}"], task)) == ["a rain{}"]
    task = Task(TOOLS, controls={5: "<|python_tag|>"})
    assert meaning(read(LlamaCalls, ["<|python_tag|>", "print(1)"], task)) == ["print(1)"]


def test_ids():
    def ids(format: type[AnswerParser], text: str) -> list[str]:
        return [event.id for event in read(format, [text]) if isinstance(event, ToolCallBegun)]

    one, two = ids(JsonCalls, f"<tool_call>{CALL}</tool_call>" * 2)
    assert one != two and one.startswith("call_")
    assert re.fullmatch("[0-9A-Za-z]{9}", ids(MistralCalls, f"[TOOL_CALLS][{CALL}]")[0])
    assert ids(MistralCalls, "[TOOL_CALLS]clock[CALL_ID]a1B2c3D4e[ARGS]{}") == ["a1B2c3D4e"]


def test_made_up_answers_of_marks_and_braces():
    """Whatever a model writes: no error, no endless loop, and the same wherever it is cut."""
    dice = random.Random(14)
    for format in (JsonCalls, LlamaCalls, MistralCalls, DeepSeekCalls, QwenCoderCalls, GlmCalls, HarmonyAnswer):
        marks = [
            *format.begins,
            *format.marks,
            "<think>",
            "</think>",
            "<function=weather>",
            "<parameter=city>",
            "</parameter>",
        ]
        marks += [
            '{"name": "weather"',
            ', "arguments": {',
            "}",
            "]",
            "[",
            "weather",
            "clock(",
            ")",
            '"',
            "\n",
            " ",
            "a",
            "\\",
        ]
        marks += ["<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>", "```json", " to=functions.weather"]
        for _ in range(150):
            text = "".join(dice.choices(marks, k=dice.randint(1, 12)))
            task = Task(TOOLS, tags=dice.choice([None, THINK]))
            expected = meaning(read(format, [text], task), whole=False)
            for pieces in (list(text), [text[:7], text[7:]]):
                assert meaning(read(format, pieces, task), whole=False) == expected, text

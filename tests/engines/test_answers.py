"""Answers as events, from tokens that a script says: control tokens that are marks, thoughts, stop strings and tokens, ends."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from petals_win.engines.base import (
    Event,
    Finished,
    GenerationRequest,
    ModelCard,
    SwarmStatus,
    Thought,
    Token,
    ToolCallArguments,
    ToolCallBegun,
    Usage,
)
from petals_win.engines.text import TextEngine
from petals_win.engines.tokens import Language, nobody_counts
from petals_win.errors import UserError

TURNS = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
BEGINS = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
TELLS = "{% if tools %}<|im_start|>system\n{{ tools | tojson }} MARK<|im_end|>\n{% endif %}"
HERMES = TELLS.replace("MARK", "<tool_call>") + TURNS + BEGINS
MISTRAL = TELLS.replace("MARK", "[TOOL_CALLS]") + TURNS + BEGINS
KNOWS_NO_TOOLS = TURNS + BEGINS
THINKS = (
    TURNS
    + "{% if add_generation_prompt %}<|im_start|>assistant\n{% if think is not defined %}<think>\n{% else %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
HARMONY = (
    TELLS.replace("MARK", "")
    + "{% for m in messages %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}{# <|channel|> #}"
)
SPECIAL = [
    "<|im_start|>", "<|im_end|>", "[TOOL_CALLS]", "[ARGS]",
    "<|start|>", "<|channel|>", "<|message|>", "<|constrain|>", "<|end|>", "<|call|>", "<|return|>",
]  # fmt: skip
NOT_SPECIAL = ["<think>", "</think>", "<tool_call>", "</tool_call>"]
TOOLS = ({"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}},)
CALL = '{"name": "weather", "arguments": {"city": "Ulm"}}'


def tokenizer(
    template: str, special: Sequence[str] = SPECIAL, plain: Sequence[str] = NOT_SPECIAL
) -> PreTrainedTokenizerFast:
    """A token for each byte, for some words, and for marks."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {text: number for number, text in enumerate([*alphabet, "We", "at", "Weat", "Ulm", "Ġis"])}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[("W", "e"), ("a", "t"), ("We", "at")]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    made.add_tokens([AddedToken(text, normalized=False) for text in plain])
    fast = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|im_end|>")
    fast.chat_template = template
    return fast


class Script:
    """A TokenEngine that answers with given tokens, whatever it is asked."""

    def __init__(self, template: str, answer: str | Sequence[int]):
        made = tokenizer(template)
        ends = made.convert_tokens_to_ids(["<|im_end|>", "<|call|>", "<|return|>"])
        self.language = Language(made, len(made), frozenset(ends))
        self.answer = made.encode(answer) if isinstance(answer, str) else list(answer)
        self.prompt = ""
        self.asked_for = 0

    async def start(self, on_lost: Callable[[UserError], None]) -> None:
        """It is never lost."""

    def card(self) -> ModelCard:
        return ModelCard("M", 0, 4000)

    def status(self) -> SwarmStatus:
        return SwarmStatus(True, "Here.")

    async def generate(
        self, prompt: list[int], request: GenerationRequest, limit: int, cached: Callable[[int], None] = nobody_counts
    ) -> AsyncGenerator[int, None]:
        self.prompt = self.language.tokenizer.decode(prompt)
        for token in self.answer[:limit]:
            self.asked_for += 1
            yield token

    async def close(self) -> None:
        """Nothing is held."""


def ask(script: Script, **settings: Any) -> tuple[list[Event], str, int]:
    """The events with the pieces of each thing joined, and calls without ids; why it ended; and how many tokens it had."""

    async def within() -> list[Event]:
        messages = ({"role": "user", "content": "Hi"},)
        request = GenerationRequest(**{"model": "M", "messages": messages, **settings})
        return [event async for event in TextEngine(script).generate(request)]

    *events, finished, usage = asyncio.run(within())
    assert isinstance(finished, Finished) and isinstance(usage, Usage)
    joined: list[Event] = []
    for event in events:
        last = joined[-1] if joined else None
        if isinstance(event, ToolCallBegun):
            assert event.id
            joined.append(ToolCallBegun(event.index, "", event.name))
        elif isinstance(event, ToolCallArguments) and isinstance(last, ToolCallArguments):
            joined[-1] = ToolCallArguments(event.index, last.text + event.text)
        elif isinstance(event, Token | Thought) and type(last) is type(event):
            joined[-1] = type(event)(last.text + event.text)  # pyright: ignore[reportAttributeAccessIssue]
        else:
            joined.append(event)
    return joined, finished.reason, usage.completion_tokens


def called(arguments: str = '{"city": "Ulm"}', index: int = 0) -> list[Event]:
    return [ToolCallBegun(index, "", "weather"), ToolCallArguments(index, arguments)]


HERMES_CALL = f"I look.\n<tool_call>\n{CALL}\n</tool_call><|im_end|>"


def test_calls_of_tools():
    assert ask(Script(HERMES, HERMES_CALL), tools=TOOLS)[:2] == ([Token("I look."), *called()], "tool_calls")


@pytest.mark.parametrize("choice", ["required", "weather"])
@pytest.mark.parametrize("template", [HERMES, MISTRAL, HARMONY, KNOWS_NO_TOOLS])
def test_a_call_that_has_to_be_is_plain_json(template, choice):
    """Whatever the format of the model is: something else holds it to that."""
    script = Script(template, f"{CALL}<|im_end|>")
    assert ask(script, tools=TOOLS, tool_choice=choice, stop=("Ulm",))[:2] == (called(), "tool_calls")


def test_calls_by_a_template_that_knows_no_tools():
    script = Script(KNOWS_NO_TOOLS, HERMES_CALL)
    assert ask(script, tools=TOOLS)[:2] == ([Token("I look."), *called()], "tool_calls")
    assert "You can call tools" in script.prompt and '"name": "weather"' in script.prompt


@pytest.mark.parametrize("settings", [{}, {"tools": TOOLS, "tool_choice": "none"}])
def test_without_tools_what_looks_like_a_call_is_text(settings):
    script = Script(HERMES, HERMES_CALL)
    assert ask(script, **settings)[:2] == ([Token(HERMES_CALL.removesuffix("<|im_end|>"))], "stop")
    assert "weather" not in script.prompt


def test_control_tokens_are_marks_where_the_format_has_them():
    answer = 'I look.[TOOL_CALLS]weather[ARGS]{"city": "Ulm"}<|im_end|>'
    assert ask(Script(MISTRAL, answer), tools=TOOLS)[:2] == ([Token("I look."), *called()], "tool_calls")
    assert ask(Script(MISTRAL, answer))[0] == [Token('I look.weather{"city": "Ulm"}')], "and hidden elsewhere"
    assert ask(Script(MISTRAL, "Ulm<|start|>[ARGS] is<|im_end|>"), tools=TOOLS)[:2] == ([Token("Ulm is")], "stop")


def test_gpt_oss():
    begun = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>"
    answer = begun + 'commentary to=functions.weather <|constrain|>json<|message|>{"city": "Ulm"}<|call|>'
    assert ask(Script(HARMONY, answer), tools=TOOLS)[:2] == ([Thought("Hm."), *called()], "tool_calls")
    assert ask(Script(HARMONY, begun + "final<|message|>Ulm.<|return|>"))[:2] == (
        [Thought("Hm."), Token("Ulm.")],
        "stop",
    )


def test_an_answer_that_ends_too_early():
    """Calls that are complete do not make it one that has ended by itself."""
    whole = len(Script(HERMES, HERMES_CALL).answer)
    events, reason, count = ask(Script(HERMES, HERMES_CALL), tools=TOOLS, max_tokens=whole - 1)
    assert (events, reason, count) == ([Token("I look."), *called()], "length", whole - 1)
    events, reason, _ = ask(Script(HERMES, HERMES_CALL), tools=TOOLS, max_tokens=whole - 8)
    assert events == [Token("I look."), *called('{"city": "U')] and reason == "length"


def test_one_call_at_most():
    script = Script(HERMES, f"<tool_call>{CALL}</tool_call><tool_call>{CALL}</tool_call><|im_end|>")
    assert ask(script, tools=TOOLS)[0] == [*called(), *called(index=1)]
    events, reason, count = ask(script, tools=TOOLS, parallel_tool_calls=False)
    assert (events, reason) == (called(), "tool_calls") and count < len(script.answer) / 2


def test_thoughts():
    assert ask(Script(THINKS, "Hm.\n</think>\n\nUlm.<|im_end|>"))[:2] == ([Thought("Hm."), Token("Ulm.")], "stop")
    assert ask(Script(THINKS, "Hm.\n"))[:2] == ([Thought("Hm.")], "length")
    assert ask(Script(THINKS, "Ulm.<|im_end|>"), template={"think": False})[0] == [Token("Ulm.")]
    assert ask(Script(KNOWS_NO_TOOLS, "<think>Hm.</think>Ulm.<|im_end|>"))[0] == [
        Token("<think>Hm.</think>Ulm.")
    ], "a model that does not think may write so"


def test_a_thought_that_the_caller_has_begun():
    messages = ({"role": "user", "content": "Hi"}, {"role": "assistant", "content": "<think>\nIt is "})
    script = Script(HERMES + "{# <think> #}", " Ulm.</think>Ulm<|im_end|>")
    assert ask(script, messages=messages, continue_final=True)[0] == [Thought("Ulm."), Token("Ulm")]


def test_stop_strings_are_looked_for_in_the_text_alone():
    thinks = "Ulm is fine.</think>I say Ulm is fine."
    assert ask(Script(THINKS, thinks), stop=("is",))[:2] == ([Thought("Ulm is fine."), Token("I say Ulm ")], "stop")
    events, reason, _ = ask(Script(HERMES, HERMES_CALL), tools=TOOLS, stop=("Ulm", ".\n{", "weather"))
    assert (events, reason) == ([Token("I look."), *called()], "tool_calls")
    script = Script(HERMES, f"I look.\n<tool_call>{CALL}</tool_call>It is Ulm, or so")
    events, reason, count = ask(script, tools=TOOLS, stop=("Ulm",))
    assert (events, reason) == ([Token("I look."), *called(), Token("It is ")], "tool_calls")
    assert count < len(script.answer)


def test_a_stop_string_across_a_call_is_none():
    script = Script(HERMES, f"ab<tool_call>{CALL}</tool_call>cd<|im_end|>")
    assert ask(script, tools=TOOLS, stop=("abcd", "bc"))[0] == [Token("ab"), *called(), Token("cd")]


@pytest.mark.parametrize("tools", [(), TOOLS])
def test_stop_tokens_end_an_answer_and_are_not_shown(tools):
    made = tokenizer(HERMES)
    space, ulm = made.convert_tokens_to_ids(["Ġis", "Ulm"])
    script = Script(HERMES, [*made.encode("Hi "), ulm, space, *made.encode(" so")])
    assert ask(script, tools=tools, stop_tokens=(space, 10**9)) == ([Token("Hi Ulm")], "stop", 5)
    assert script.asked_for == 5
    assert ask(script, tools=tools, stop_tokens=(made.encode("H")[0],)) == ([], "stop", 1)
    assert ask(script, prompt="Hi", messages=None, stop_tokens=(ulm,))[:2] == ([Token("Hi ")], "stop")


def test_half_a_stop_string_before_a_stop_token_is_shown():
    made = tokenizer(HERMES)
    script = Script(HERMES, made.encode("abc"))
    assert ask(script, stop=("abx",), stop_tokens=(made.encode("c")[0],))[:2] == ([Token("ab")], "stop")


@pytest.mark.parametrize("settings", [{}, {"tools": TOOLS}])
def test_tokens_of_any_kind_are_the_text_that_the_tokenizer_makes_of_all(settings):
    """Also those that are no characters, at the end, too."""
    dice = random.Random(7)
    made = tokenizer(HERMES)
    known = [made.encode(character) for character in "Äß🙂é"]
    plain = len(made) - len(SPECIAL) - len(NOT_SPECIAL)
    for _ in range(300):
        tokens = [
            t for _ in range(dice.randint(1, 12)) for t in dice.choice([[dice.randrange(plain)], *known, [plain]])
        ]
        events, _, count = ask(Script(HERMES, tokens), **settings)
        text = made.decode(tokens, skip_special_tokens=True)
        assert events == ([Token(text)] if text else []) and count == len(tokens)


def test_raw_prompts_are_answered_by_text_alone():
    script = Script(THINKS, "<think>Hm.</think>Ulm.<|im_end|>")
    assert ask(script, messages=None, prompt="Hi")[0] == [Token("<think>Hm.</think>Ulm.")]

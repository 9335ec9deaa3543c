"""Which format a model has, by chat templates as short as can be that show what those of its family do, and by vocabularies."""

from __future__ import annotations

import pytest
from test_answers import tokenizer
from tokenizers import AddedToken

from petals_win.engines.formats.answer import AnswerParser
from petals_win.engines.formats.deepseek import DeepSeekCalls
from petals_win.engines.formats.harmony import HarmonyAnswer
from petals_win.engines.formats.json_calls import JsonCalls
from petals_win.engines.formats.llama import LlamaCalls
from petals_win.engines.formats.mistral import MistralCalls
from petals_win.engines.formats.pythonic import PythonicCalls
from petals_win.engines.formats.table import AnswerFormat
from petals_win.engines.formats.tagged import GlmCalls, QwenCoderCalls


@pytest.mark.parametrize(
    ("template", "format", "begins_thoughts"),
    [
        ("<|im_start|> <tools> <tool_call> </tool_call>", JsonCalls, None),
        ("<|im_start|> <tools> <tool_call> <think>\n\n</think>", JsonCalls, "<think>"),
        ("<|im_start|> <tool_call><function=NAME><parameter=KEY>", QwenCoderCalls, None),
        ("[gMASK]<sop><|user|> <tool_call>NAME<arg_key>KEY</arg_key> <think></think>", GlmCalls, "<think>"),
        ("[INST] [AVAILABLE_TOOLS] [TOOL_CALLS]", MistralCalls, None),
        ("[SYSTEM_PROMPT] [THINK] [TOOL_CALLS] [ARGS]", MistralCalls, "[THINK]"),
        ("<|start_header_id|> <|python_tag|>", LlamaCalls, None),
        ("<|im_start|> <|tool_list_start|> <|tool_call_start|>", LlamaCalls, None),
        ("<｜User｜> <｜tool▁calls▁begin｜> </think>", DeepSeekCalls, "<think>"),
        ("<|start|> <|channel|> <|message|> <|call|>", HarmonyAnswer, None),
        ("<|tool|> <|tool_call|>", JsonCalls, None),
    ],
)
def test_by_the_template(template, format, begins_thoughts):
    found = AnswerFormat.of(tokenizer(template))
    assert found.calls is format
    assert (found.tags and found.tags.begin) == begins_thoughts


@pytest.mark.parametrize(
    ("token", "format"),
    [
        ("<|python_tag|>", LlamaCalls),
        ("[TOOL_CALLS]", MistralCalls),
        ("<｜tool▁calls▁begin｜>", DeepSeekCalls),
        (None, PythonicCalls),
    ],
)
def test_by_the_vocabulary(token: str | None, format: type[AnswerParser]):
    """Where the template writes JSON without marks, as that of Llama 3.2 does."""
    made = tokenizer("<|start_header_id|> {{ tools | tojson }}", special=["<|channel|>"], plain=[])
    if token is not None:
        made.add_tokens([AddedToken(token)])
    assert AnswerFormat.of(made).calls is format


def test_what_is_control():
    """Special tokens, and others that the template writes, but no marks of thoughts and calls."""
    made = tokenizer("<｜User｜> <think> <tool_call> [TOOL_CALLS]")
    made.add_tokens([AddedToken("<｜User｜>"), AddedToken("<fim>"), AddedToken("\n\n")])
    format = AnswerFormat.of(made)
    assert format.turns == {"<｜User｜>"}
    assert {"<｜User｜>", "<|im_end|>", "[TOOL_CALLS]"} <= format.never_typed
    assert not {"<think>", "<tool_call>", "<fim>", "\n\n"} & format.never_typed
    assert format.has_typed("a <|im_end|>") and not format.has_typed("a <|im_ end|> <think>")

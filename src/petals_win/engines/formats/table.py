"""Which model writes calls and thoughts how: one table, looked up by the model's chat template and its vocabulary."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from petals_win.engines.formats.answer import AnswerParser, Tags, Task
from petals_win.engines.formats.deepseek import DeepSeekCalls
from petals_win.engines.formats.harmony import HarmonyAnswer
from petals_win.engines.formats.json_calls import JsonCalls
from petals_win.engines.formats.llama import LlamaCalls
from petals_win.engines.formats.mistral import MistralCalls
from petals_win.engines.formats.pythonic import PythonicCalls
from petals_win.engines.formats.tagged import GlmCalls, QwenCoderCalls

# What tells a format: one of these stands in the chat template, or, if none of any format does, is a token of the model.
# The first that fits counts: some templates show marks of several.
_FORMATS: tuple[tuple[type[AnswerParser], tuple[str, ...]], ...] = (
    (HarmonyAnswer, ("<|channel|>",)),
    (DeepSeekCalls, ("<｜tool▁calls▁begin｜>",)),
    (MistralCalls, ("[TOOL_CALLS]",)),
    (GlmCalls, ("<arg_key>",)),
    (QwenCoderCalls, ("<function=",)),
    (LlamaCalls, ("<|python_tag|>", "<|python_start|>", "<|tool_call_start|>")),
    (JsonCalls, ("<tool_call>", "<|tool_call|>")),
)

_TAGS = (
    Tags("<think>", "</think>"),
    Tags("[THINK]", "[/THINK]"),
    Tags("<seed:think>", "</seed:think>"),
    Tags("<|START_THINKING|>", "<|END_THINKING|>"),
)


@dataclass(frozen=True)
class AnswerFormat:
    """How a model answers.

    calls: how it calls the tools that its own template tells it. tags: how it marks thoughts, if it has any.
    controls: id and text of its special tokens. turns: texts of added tokens that are not special, but make up turns.
    """

    calls: type[AnswerParser]
    tags: Tags | None
    controls: Mapping[int, str]
    turns: frozenset[str]

    @classmethod
    def of(cls, tokenizer: Any) -> AnswerFormat:
        templates = tokenizer.chat_template or ""
        shown = "\n".join(templates.values()) if isinstance(templates, dict) else templates
        added = tokenizer.backend_tokenizer.get_added_tokens_decoder()
        tokens = {token.content for token in added.values()}
        tags = next((tags for tags in _TAGS if tags.begin in shown or tags.end in shown), None)
        controls = {number: token.content for number, token in added.items() if token.special}
        # A template that shows tools in a way that is not known here: JSON or Python, as most are.
        calls = _find(shown) or _find_among(tokens) or PythonicCalls
        # Thoughts and calls are no turns: who writes a prompt may begin a thought, or speak of calls.
        known = {mark for kind, _ in _FORMATS for mark in (*kind.begins, *kind.marks)}
        known |= {mark for each in _TAGS for mark in (each.begin, each.end)}
        plain = tokens - known - set(controls.values())
        turns = frozenset(text for text in plain if text in shown and not text.isspace())
        return cls(calls, tags, controls, turns)

    @cached_property
    def never_typed(self) -> frozenset[str]:
        """Tokens that a template writes; in a message their texts are no tokens."""
        return self.turns.union(filter(None, self.controls.values()))

    def has_typed(self, text: str) -> bool:
        """Whether one of them is in a message. Some models have hundreds, and hardly a message has as much as their beginnings."""
        beginnings, whole = self._patterns
        return any(beginning in text for beginning in beginnings) and whole.search(text) is not None

    @cached_property
    def _patterns(self) -> tuple[frozenset[str], re.Pattern[str]]:
        beginnings = frozenset(text[:3] for text in self.never_typed)
        return beginnings, re.compile("|".join(map(re.escape, self.never_typed)))

    def parser(
        self, tools: Sequence[Mapping[str, Any]], *, plain: bool, parallel: bool, prompt: str, continued: str
    ) -> AnswerParser | None:
        """What reads one answer; None if all of it is text.

        plain: whether calls are JSON whatever the format is, as they are asked for where the template knows no tools, or
        where there has to be one. prompt: what the model reads; continued: of it,
        what the assistant has said already.
        """
        kind = JsonCalls if plain else self.calls
        if not tools and self.tags is None and kind is not HarmonyAnswer:
            return None
        functions = [tool["function"] for tool in tools]
        marks = {*kind.begins, *kind.marks, *(() if self.tags is None else (self.tags.begin, self.tags.end))}
        return kind(
            Task(
                tools={function["name"]: function.get("parameters") or {} for function in functions},
                parallel=parallel,
                tags=self.tags,
                prompt=prompt,
                continued=continued,
                controls={number: text for number, text in self.controls.items() if text in marks},
            )
        )


def _find(template: str) -> type[AnswerParser] | None:
    return next((kind for kind, marks in _FORMATS if any(mark in template for mark in marks)), None)


def _find_among(tokens: set[str]) -> type[AnswerParser] | None:
    """Channels are no matter of calls alone: a template that does not begin one wants none."""
    return next((kind for kind, marks in _FORMATS if tokens.intersection(marks) and kind is not HarmonyAnswer), None)

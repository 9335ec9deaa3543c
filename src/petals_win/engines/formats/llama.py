"""How Llama 3.1, 3.2 and 4 call tools: as JSON or as Python, the whole answer, or behind a control token."""

from __future__ import annotations

from typing import ClassVar

from petals_win.engines.formats.pythonic import PythonicCalls


class LlamaCalls(PythonicCalls):
    """<|python_tag|>{"name": ..., "parameters": {...}}, or [weather(city="Ulm")], also without the mark.

    Liquid's models mark a list of Python's calls, too.
    """

    begins: ClassVar[tuple[str, ...]] = ("<|python_tag|>", "<|python_start|>", "<|tool_call_start|>")
    ends: ClassVar[tuple[str, ...]] = ("<|python_end|>", "<|tool_call_end|>")
    marks: ClassVar[tuple[str, ...]] = ends

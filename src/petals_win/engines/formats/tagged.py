"""Calls with a tag for each argument: Qwen3-Coder's and GLM's. Knows which values are text by the schemas of the tools."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, ClassVar

from petals_win.engines.formats.answer import LONGEST_NAME
from petals_win.engines.formats.json_calls import JsonCalls
from petals_win.engines.formats.reader import Reads


class TaggedCalls(JsonCalls):
    """What both have in common: arguments are told one by one, text as it comes, other values when they are complete."""

    begins: ClassVar[tuple[str, ...]] = ("<tool_call>",)
    ends: ClassVar[tuple[str, ...]] = ("</tool_call>",)
    marks: ClassVar[tuple[str, ...]] = ends

    def _begin_arguments(self, name: str) -> None:
        self._begin_call(name)
        self._parameters = self._task.tools[name].get("properties")
        self._told = 0

    def _argument(self, key: str, *ends: str) -> Reads[bool]:
        """Tell the argument `key`, whose value goes up to one of the marks `ends`. Whether that came."""
        reader = self._reader
        self._argue(("{" if not self._told else ", ") + json.dumps(key, ensure_ascii=False) + ": ")
        self._told += 1
        if _is_text(self._parameters, key):
            self._argue('"')
            end = yield from reader.pass_until(lambda text: self._argue(_escaped(text)), *ends)
            self._argue('"' if end else "")
        else:
            written: list[str] = []
            end = yield from reader.pass_until(written.append, *ends)
            text = "".join(written)
            self._argue(_as_json(text) if end else text)
        yield from reader.take(*ends)
        return bool(end)

    def _end_arguments(self) -> None:
        self._argue("}" if self._told else "{}")


class QwenCoderCalls(TaggedCalls):
    """<tool_call><function=name><parameter=key>value</parameter></function></tool_call>, with line ends around values."""

    begins: ClassVar[tuple[str, ...]] = ("<tool_call>", "<function=")

    def _call(self, mark: str) -> Reads[bool]:
        reader = self._reader
        if mark == "<tool_call>":
            yield from reader.blanks()
            if not (yield from reader.take("<function=")):
                reader.rewind()
                yield from reader.take(mark)
                return (yield from super()._call(mark))
        name = (yield from reader.until(">", LONGEST_NAME)) or ""
        if name not in self._task.tools:
            return False
        self._begin_arguments(name)
        complete = True
        while complete:
            reader.forget()
            yield from reader.blanks()
            if not (yield from reader.take("<parameter=")):
                break
            key = yield from reader.until(">", LONGEST_NAME)
            if key is None:
                break
            yield from reader.take("\n")
            complete = yield from self._argument(key, "\n</parameter>", "</parameter>")
        reader.rewind()
        if complete:
            self._end_arguments()
        self._end_call()
        yield from self._end_mark("</function>")
        yield from self._end_mark(*self.ends)
        return True


class GlmCalls(TaggedCalls):
    """GLM 4.5: <tool_call>name<arg_key>key</arg_key><arg_value>value</arg_value></tool_call>, with line ends between."""

    def _call(self, mark: str) -> Reads[bool]:
        reader = self._reader
        yield from reader.blanks()
        name = yield from reader.word(lambda c: c != "<" and not c.isspace(), LONGEST_NAME)
        yield from reader.blanks()
        if name not in self._task.tools:
            return False
        start = reader.at
        if not (yield from reader.take("<arg_key>", *self.ends)):
            return False
        reader.at = start
        self._begin_arguments(name)
        complete = True
        while complete:
            reader.forget()
            yield from reader.blanks()
            if not (yield from reader.take("<arg_key>")):
                break
            key = yield from reader.until("</arg_key>", LONGEST_NAME)
            yield from reader.blanks()
            if key is None or not (yield from reader.take("<arg_value>")):
                break
            complete = yield from self._argument(key.strip(), "</arg_value>")
        reader.rewind()
        if complete:
            self._end_arguments()
        self._end_call()
        yield from self._end_mark(*self.ends)
        return True


def _is_text(parameters: Any, key: str) -> bool:
    schema = parameters.get(key) if isinstance(parameters, Mapping) else None
    return isinstance(schema, Mapping) and schema.get("type") == "string"


def _escaped(text: str) -> str:
    """As it stands within a string of JSON."""
    return json.dumps(text, ensure_ascii=False)[1:-1]


def _as_json(written: str) -> str:
    """A value of no known type: as it stands if it is JSON, Python's constants as JSON's, and all else as text."""
    text = {"True": "true", "False": "false", "None": "null"}.get(written.strip(), written.strip())
    try:
        json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        return json.dumps(written, ensure_ascii=False)
    return text


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")

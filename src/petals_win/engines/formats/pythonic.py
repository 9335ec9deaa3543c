"""Calls as Python: [weather(city="Ulm", days=2), clock()]. Knows literals; computes nothing."""

from __future__ import annotations

import ast
import json
from typing import Any

from petals_win.engines.formats.answer import LONGEST_NAME
from petals_win.engines.formats.json_calls import JsonCalls
from petals_win.engines.formats.reader import Reads

_CONSTANTS = {"true": True, "false": False, "null": None, "none": None}


class PythonicCalls(JsonCalls):
    """Calls as JSON or as Python, whichever comes; a call as Python is told when it is complete."""

    def _call(self, mark: str) -> Reads[bool]:
        if not (yield from self._objects()):
            self._reader.rewind()
            yield from self._reader.take(mark)
            if not (yield from self._python()):
                return False
        yield from self._end_mark(*self.ends)
        return True

    def _bare_call(self) -> Reads[bool]:
        if (yield from self._objects()):
            return True
        self._reader.rewind()
        yield from self._reader.blanks()
        # Without a list around it, what looks like a call may be a program.
        return (yield from self._reader.peek()) == "[" and (yield from self._python())

    def _python(self) -> Reads[bool]:
        """Calls, in a list or alone, as many as are well-formed. Reads up to the end of the last."""
        reader, before = self._reader, self._calls
        yield from reader.blanks()
        listed = yield from reader.take("[")
        while not self.stopped:
            yield from reader.blanks()
            name = yield from reader.word(lambda c: c.isalnum() or c in "_.-", LONGEST_NAME)
            if name not in self._task.tools:
                name = name.removesuffix(".call")  # of the tools that Llama itself brings along
            if name not in self._task.tools or not (yield from reader.take("(")):
                break
            arguments = _arguments((yield from self._to_closing()))
            if arguments is None:
                break
            self._begin_call(name)
            self._argue(json.dumps(arguments, ensure_ascii=False))
            self._end_call()
            yield from reader.blanks()
            if not listed or not (yield from reader.take(",")):
                break
        if self._calls == before:
            return False
        if not self.stopped:
            reader.rewind()
            if listed:
                yield from self._end_mark("]")
        return True

    def _to_closing(self) -> Reads[str | None]:
        """Read up to the bracket that closes one which is read, and that bracket, too; None if it does not come."""
        reader, start, depth, quote = self._reader, self._reader.at, 1, ""
        while character := (yield from reader.peek()):
            reader.at += 1
            if quote:
                if character == "\\" and (yield from reader.peek()):
                    reader.at += 1
                elif character == quote:
                    quote = ""
            elif character in "'\"":
                quote = character
            elif character in "([{":
                depth += 1
            elif character in ")]}":
                depth -= 1
                if not depth:
                    return reader.text[start : reader.at - 1]
        return None


def _arguments(written: str | None) -> dict[str, Any] | None:
    """The arguments of a call, all of them named; None if they are no literals."""
    if written is None:
        return None
    try:
        call = ast.parse(f"f({written}\n)", mode="eval").body
        if not isinstance(call, ast.Call) or call.args or not isinstance(call.func, ast.Name):
            return None
        arguments: dict[str, Any] = {}
        for keyword in call.keywords:
            if keyword.arg is None:
                return None
            arguments[keyword.arg] = ast.literal_eval(_Constants().visit(keyword.value))
        json.dumps(arguments, allow_nan=False)
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):  # a model may write anything
        return None
    return arguments


class _Constants(ast.NodeTransformer):
    """Models write JSON's constants, too."""

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return ast.Constant(_CONSTANTS[node.id]) if node.id in _CONSTANTS else node

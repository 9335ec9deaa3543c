"""Calls as JSON, {"name": ..., "arguments": {...}}, alone or in a list: with the marks of Hermes and Qwen, and without any.

Knows how JSON is read while it comes. Names tell calls from JSON that is the answer itself.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import ClassVar

from petals_win.engines.formats.answer import LONGEST_NAME, AnswerParser
from petals_win.engines.formats.reader import Reads

_ARGUMENTS = ("arguments", "parameters")
_MAY_COME_FIRST = ("type", "id")  # before the name


class JsonCalls(AnswerParser):
    """Hermes and Qwen: <tool_call>{"name": ..., "arguments": {...}}</tool_call>. Others mark a list alike.

    Models forget marks: an answer that is nothing but calls needs none.
    """

    begins: ClassVar[tuple[str, ...]] = ("<tool_call>", "<|tool_call|>")
    ends: ClassVar[tuple[str, ...]] = ("</tool_call>", "<|/tool_call|>")
    marks: ClassVar[tuple[str, ...]] = ends

    def _call(self, mark: str) -> Reads[bool]:
        if not (yield from self._objects()):
            return False
        yield from self._end_mark(*self.ends)
        return True

    def _bare_call(self) -> Reads[bool]:
        return (yield from self._objects())

    def _end_mark(self, *marks: str) -> Reads[None]:
        """Read the mark behind a call, if it is there."""
        reader = self._reader
        reader.forget()
        yield from reader.blanks()
        if not (yield from reader.take(*marks)):
            reader.rewind()
        reader.forget()

    def _objects(self) -> Reads[bool]:
        """Calls, one after the other or in a list, as many as are well-formed. Reads up to the end of the last."""
        reader, before = self._reader, self._calls
        yield from reader.blanks()
        listed = yield from reader.take("[")
        while not self.stopped:
            yield from reader.blanks()
            if not (yield from self._object()):
                break
            yield from reader.blanks()
            yield from reader.take(",", ";")
        if self._calls == before:
            return False
        if not self.stopped:
            reader.rewind()
            if listed:
                yield from self._end_mark("]")
        return True

    def _object(self) -> Reads[bool]:
        """One call."""
        reader = self._reader
        if not (yield from reader.take("{")):
            return False
        name, arguments = "", list[str]()
        while True:
            yield from reader.blanks()
            key = yield from self._string(LONGEST_NAME)
            yield from reader.blanks()
            if key is None or not (yield from reader.take(":")):
                break
            yield from reader.blanks()
            if key == "name" and not name:
                name = (yield from self._string(LONGEST_NAME)) or ""
                if name not in self._task.tools:
                    return False
                if arguments and not self._begin_with(name, arguments):
                    return False
            elif key in _ARGUMENTS and not self._open:
                following = yield from reader.peek()
                if name and following == "{":
                    self._begin_call(name)
                    yield from self._value(self._argue)
                elif following in ("{", '"', "n"):
                    yield from self._value(arguments.append)
                    if name and not self._begin_with(name, arguments):
                        return False
                else:
                    return False
            elif name or key in _MAY_COME_FIRST:
                yield from self._value(lambda _: None)
            else:
                return False
            yield from reader.blanks()
            if not (yield from reader.take(",")):
                break
        if not name:
            return False
        if not self._open:
            if (yield from reader.peek()) != "}":
                return False  # cut off, or broken, before its arguments
            self._begin_call(name)
            self._argue("{}")
        yield from reader.take("}")  # some models forget it
        self._end_call()
        return True

    def _begin_with(self, name: str, written: list[str]) -> bool:
        """A call whose arguments have come as a whole: an object, null, or a string that has an object's JSON."""
        text = "".join(written)
        if not text.startswith("{"):
            try:
                value = json.loads(text)
                text = value if isinstance(value, str) else "{}"
                if value is not None and not isinstance(json.loads(text or "{}"), dict):
                    return False
            except (ValueError, RecursionError):
                return False
        self._begin_call(name)
        self._argue(text or "{}")
        return True

    def _string(self, longest: int) -> Reads[str | None]:
        """A JSON string that is not longer; None if something else comes."""
        written: list[str] = []
        if (yield from self._reader.peek()) != '"':
            return None
        yield from self._value(written.append, longest)
        try:
            return json.loads("".join(written))
        except ValueError:
            return None

    def _value(self, out: Callable[[str], None], longest: int | None = None) -> Reads[None]:
        """Hand over a JSON value as it comes: strings, lists and objects up to their end, or that of the text.

        Line ends and their like, which models write into strings as they are, become escapes.
        """
        reader = self._reader
        if (yield from reader.peek()) not in ("{", "[", '"'):
            out((yield from reader.word(lambda c: c not in ",}] \t\r\n", LONGEST_NAME)))
            return
        depth, quoted, escaped, length = 0, False, False, 0
        while True:
            piece: list[str] = []
            while reader.at < len(reader.text):
                character = reader.text[reader.at]
                reader.at += 1
                if quoted and character < " ":
                    piece.append(json.dumps(character)[1:-1])
                    continue
                piece.append(character)
                if quoted:
                    if escaped:
                        escaped = False
                    elif character == "\\":
                        escaped = True
                    elif character == '"':
                        quoted = False
                elif character == '"':
                    quoted = True
                elif character in "{[":
                    depth += 1
                elif character in "}]":
                    depth -= 1
                if not quoted and depth <= 0:
                    out("".join(piece))
                    return
            out("".join(piece))
            length += len(piece)
            if self._open:
                reader.forget()
            if reader.ended or (longest is not None and length > longest):
                return
            yield

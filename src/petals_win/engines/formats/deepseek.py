"""How DeepSeek's models call tools: V3 and R1 with JSON in a fence, V3.1 with the JSON alone."""

from __future__ import annotations

from typing import ClassVar

from petals_win.engines.formats.answer import LONGEST_NAME
from petals_win.engines.formats.json_calls import JsonCalls
from petals_win.engines.formats.reader import Reads

_CALLS, _CALLS_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
_CALL, _CALL_END, _BETWEEN = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>"


class DeepSeekCalls(JsonCalls):
    """Between the marks of a call, name and arguments; older models write "function" before the name."""

    begins: ClassVar[tuple[str, ...]] = (_CALLS, _CALL)
    marks: ClassVar[tuple[str, ...]] = (_BETWEEN, _CALL_END, _CALLS_END)

    def _call(self, mark: str) -> Reads[bool]:
        reader = self._reader
        if mark == _CALLS:
            yield from reader.blanks()
            if not (yield from reader.take(_CALL)):
                return False
        name = yield from reader.until(_BETWEEN, LONGEST_NAME)
        if name is not None and name.strip() == "function":
            name = yield from reader.until("\n", LONGEST_NAME)
        name = (name or "").strip()
        yield from reader.blanks()
        fence = yield from reader.take("```json", "```")
        yield from reader.blanks()
        if name not in self._task.tools or (yield from reader.peek()) != "{":
            return False
        self._begin_call(name)
        yield from self._value(self._argue)
        self._end_call()
        for end in (*(["```"] if fence else []), _CALL_END, _CALLS_END):
            yield from self._end_mark(end)
        return True

    def _bare_call(self) -> Reads[bool]:
        return False
        yield

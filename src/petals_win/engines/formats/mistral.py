"""How Mistral's models call tools, older ones by a list, newer ones one by one."""

from __future__ import annotations

import secrets
from typing import ClassVar

from petals_win.engines.formats.answer import ALPHANUMERIC, LONGEST_NAME
from petals_win.engines.formats.json_calls import JsonCalls
from petals_win.engines.formats.reader import Reads

_CALLS, _ARGUMENTS, _ID = "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"


class MistralCalls(JsonCalls):
    """[TOOL_CALLS][{"name": ..., "arguments": {...}}], or [TOOL_CALLS]name[CALL_ID]id[ARGS]{...} with or without the id."""

    begins: ClassVar[tuple[str, ...]] = (_CALLS,)
    marks: ClassVar[tuple[str, ...]] = (_ARGUMENTS, _ID)

    def _call(self, mark: str) -> Reads[bool]:
        reader = self._reader
        yield from reader.blanks()
        if (yield from reader.peek()) in ("[", "{"):
            return (yield from self._objects())
        name = yield from reader.word(lambda c: c not in "[{" and not c.isspace(), LONGEST_NAME)
        its_id = ""
        if (yield from reader.take(_ID)):
            its_id = yield from reader.word(str.isalnum, LONGEST_NAME)
        yield from reader.take(_ARGUMENTS)
        yield from reader.blanks()
        if name not in self._task.tools or (yield from reader.peek()) != "{":
            return False
        self._begin_call(name, its_id)
        yield from self._value(self._argue)
        self._end_call()
        return True

    def _new_id(self) -> str:
        """Templates of Mistral's take no other ids in what comes back."""
        return "".join(secrets.choice(ALPHANUMERIC) for _ in range(9))

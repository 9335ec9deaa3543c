"""How gpt-oss answers: in messages, each on a channel for thoughts, calls or text."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import ClassVar

from petals_win.engines.formats.answer import AnswerParser
from petals_win.engines.formats.reader import Reads

_START, _CHANNEL, _MESSAGE, _CONSTRAIN = "<|start|>", "<|channel|>", "<|message|>", "<|constrain|>"
_ENDS = ("<|end|>", "<|call|>", "<|return|>")
_LONGEST_HEAD = 300  # characters of what says whose message it is, and for whom
_BETWEEN = "\n\n"  # two messages of one kind


class HarmonyAnswer(AnswerParser):
    """<|channel|>analysis<|message|>...<|end|><|start|>assistant<|channel|>commentary to=functions.name<|message|>{...}<|call|>.

    The recipient may stand before the channel, too. What is for no tool that there is, is text.
    """

    marks: ClassVar[tuple[str, ...]] = (_START, _CHANNEL, _MESSAGE, _CONSTRAIN, *_ENDS)

    def _read(self) -> Reads[None]:
        self._said = self._thought = False
        _, start, begun = self._task.prompt.rpartition(_START)
        head, message, _ = begun.partition(_MESSAGE)
        if start and message:
            yield from self._message(head)
        while not self.stopped and (yield from self._reader.peek()):
            yield from self._message((yield from self._head()))

    def _head(self) -> Reads[str]:
        """What stands before a message, read with the mark behind it; "" where the message begins without."""
        reader = self._reader
        yield from reader.blanks()
        begun = yield from reader.take(_CHANNEL, _START, "to=")
        if not begun:
            reader.rewind()
            return ""
        reader.rewind()
        if (head := (yield from reader.until(_MESSAGE, _LONGEST_HEAD))) is None:
            yield from reader.blanks()
            yield from reader.take(_CHANNEL, _START)
        return head or ""

    def _message(self, head: str) -> Reads[None]:
        reader = self._reader
        reader.forget()
        channel = re.search(re.escape(_CHANNEL) + r"\s*(\w+)", head)
        recipient = re.search(r"to=functions\.([^\s<]+)", head)
        if recipient and recipient[1] in self._task.tools:
            self._begin_call(recipient[1])
            arguments = False

            def argue(text: str) -> None:
                nonlocal arguments
                arguments = True
                self._argue(text)

            yield from self._body(argue)
            if not arguments:
                self._argue("{}")
            self._end_call()
        elif channel and channel[1] == "analysis":
            self._blanks = _BETWEEN if self._thought else ""
            yield from self._body(self._think)
        else:
            self._blanks = _BETWEEN if self._said else ""
            yield from self._body(self._say)
        self._blanks = ""

    def _body(self, out: Callable[[str], None]) -> Reads[None]:
        """A message up to its end; marks that have no place in it are left out."""
        reader = self._reader
        while mark := (yield from reader.pass_until(out, *self.marks)):
            if mark in (_START, _CHANNEL):
                return
            yield from reader.take(mark)
            if mark in _ENDS:
                reader.forget()
                return

    def _say(self, text: str) -> None:
        self._said = True
        super()._say(text)

    def _think(self, text: str) -> None:
        self._thought = True
        super()._think(text)

"""From the text of an answer to events: what is thought, what is said, which tools are called. The base of all formats.

Knows the events, tools by name, and how thoughts are marked. Does not know tokens, nor how a call is written.
"""

from __future__ import annotations

import secrets
import string
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from petals_win.engines.base import Event, Thought, Token, ToolCallArguments, ToolCallBegun
from petals_win.engines.formats.reader import Reader, Reads

ALPHANUMERIC = string.ascii_letters + string.digits
LONGEST_NAME = 200  # characters of a tool's name, or of what else stands between two marks


@dataclass(frozen=True)
class Tags:
    """What stands around a thought."""

    begin: str
    end: str


@dataclass(frozen=True)
class Task:
    """What is known of an answer before it comes.

    tools: the functions that may be called: name to the JSON schema of its parameters.
    parallel: whether there may be several calls; else the answer ends with the first.
    tags: how the model marks its thoughts; None: it has no thoughts.
    prompt: the text that the model reads, or its end. continued: of it, what the assistant has said already.
    controls: id and text of the model's tokens that are control tokens, and no text, among the marks of the format.
    """

    tools: Mapping[str, Mapping[str, Any]]
    parallel: bool = True
    tags: Tags | None = None
    prompt: str = ""
    continued: str = ""
    controls: Mapping[int, str] = field(default_factory=dict)


class AnswerParser:
    """Turns the text of one answer into events, as it comes. This one knows thoughts, a subclass calls of tools.

    The events are the same wherever the text is cut, but for how pieces of text and arguments are cut themselves. What
    looks like a call and is none, or one of no tool that there is, is text.

    A subclass says with which marks a call may begin, and reads one in `_call`.
    """

    # Marks of the format: those with which a call begins, and others. A model may have control tokens for them.
    begins: ClassVar[tuple[str, ...]] = ()
    marks: ClassVar[tuple[str, ...]] = ()

    def __init__(self, task: Task) -> None:
        self._task = task
        self._reader = Reader()
        self._events: list[Event] = []
        self._blanks = ""  # at the end of what was said, which is left out before a call and behind a thought
        self._calls = 0
        self._open = False  # whether the last call goes on
        self._work = self._read()
        self.stopped = False

    @property
    def controls(self) -> Mapping[int, str]:
        """Tokens that have to be fed by this text, though they are none of an answer that is shown as it is."""
        return self._task.controls

    @property
    def called(self) -> bool:
        """Whether a tool was called."""
        return self._calls > 0

    def feed(self, text: str) -> list[Event]:
        """The events of the next piece. If `stopped` then, nothing of what would follow counts."""
        self._reader.text += text
        return self._go_on()

    def finish(self) -> list[Event]:
        """What is still held back, at the end of the answer."""
        self._reader.ended = True
        return self._go_on()

    def _go_on(self) -> list[Event]:
        next(self._work, None)
        events, self._events = self._events, []
        return events

    # What a subclass has.

    def _call(self, mark: str) -> Reads[bool]:
        """Read one call or several, behind the mark, or before it returns False, in which case nothing was told of it."""
        raise NotImplementedError

    def _bare_call(self) -> Reads[bool]:
        """As `_call`, at the beginning of the answer, without a mark."""
        return False
        yield

    # What a subclass uses.

    def _say(self, text: str) -> None:
        """Where there are tools, blanks wait for what follows: before a call and at the end of calls they are left out."""
        said, self._blanks = self._blanks + text, ""
        if self._task.tools:
            kept = said.rstrip()
            said, self._blanks = kept, said[len(kept) :]
        if said:
            self._events.append(Token(said))

    def _think(self, text: str) -> None:
        said = self._blanks + text
        kept = said.rstrip()
        self._blanks = said[len(kept) :]
        if kept:
            self._events.append(Thought(kept))

    def _begin_call(self, name: str, its_id: str = "") -> None:
        """From here on it is a call, whatever comes."""
        self._blanks = ""
        self._events.append(ToolCallBegun(self._calls, its_id or self._new_id(), name))
        self._calls, self._open = self._calls + 1, True
        self._reader.forget()

    def _argue(self, text: str) -> None:
        if text:
            self._events.append(ToolCallArguments(self._calls - 1, text))

    def _end_call(self) -> None:
        self._open = False
        self._reader.forget()
        self.stopped = not self._task.parallel

    def _new_id(self) -> str:
        return "call_" + "".join(secrets.choice(ALPHANUMERIC) for _ in range(24))

    # The answer as a whole.

    def _read(self) -> Reads[None]:
        if self._task.tags is not None:
            yield from self._thoughts(self._task.tags)
        yield from self._text()
        if not self.called:
            self._events += [Token(self._blanks)] if self._blanks else []

    def _thoughts(self, tags: Tags) -> Reads[None]:
        reader = self._reader
        opened = self._task.prompt.rstrip().endswith(tags.begin)
        opened |= self._task.continued.rfind(tags.begin) > self._task.continued.rfind(tags.end)
        yield from reader.blanks()
        found = yield from reader.take(tags.begin)
        if not found and not opened:
            reader.rewind()
            return
        yield from reader.blanks()
        reader.forget()
        yield from reader.pass_until(self._think, tags.end)
        self._blanks = ""
        yield from reader.take(tags.end)
        yield from reader.blanks()
        reader.forget()

    def _text(self) -> Reads[None]:
        """Text and calls, up to the end."""
        reader = self._reader
        begins = self.begins if self._task.tools else ()
        controls = tuple(self.controls.values())
        if self._task.tools and not (yield from self._bare_call()):
            reader.rewind()
        while not self.stopped and (
            mark := (yield from reader.pass_until(self._say, *dict.fromkeys((*begins, *controls))))
        ):
            yield from reader.take(mark)
            if mark in begins and (yield from self._call(mark)):
                continue
            reader.rewind()
            yield from reader.take(mark)
            reader.forget()
            if mark not in controls:
                self._say(mark)

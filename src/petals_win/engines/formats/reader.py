"""Text that comes in pieces, read as if all of it were there. Knows no format and no event."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import TypeVar

from petals_win.engines.stopping import overlap

T = TypeVar("T")

# What reads text is a generator: it yields where it needs text that has not come yet, and returns what it has read.
Reads = Generator[None, None, T]


class Reader:
    """The text of an answer. `at` is how far it is read; what is behind that can be read again until `forget` is called.

    All that its methods find is the same wherever the text was cut into pieces.
    """

    def __init__(self) -> None:
        self.text = ""
        self.at = 0
        self.ended = False

    def forget(self) -> None:
        """What is read up to now is done with: `rewind` leads here."""
        self.text, self.at = self.text[self.at :], 0

    def rewind(self) -> None:
        """Read again from where `forget` was called last."""
        self.at = 0

    def peek(self) -> Reads[str]:
        """The next character, which stays unread; "" at the end."""
        while self.at == len(self.text):
            if self.ended:
                return ""
            yield
        return self.text[self.at]

    def take(self, *literals: str) -> Reads[str]:
        """Read the one of the literals that comes next, the longest if there are several; "" if none does."""
        while True:
            rest = len(self.text) - self.at
            if self.ended or not any(
                rest < len(each) and each.startswith(self.text[self.at : self.at + len(each)]) for each in literals
            ):
                break
            yield
        found = max((each for each in literals if self.text.startswith(each, self.at)), key=len, default="")
        self.at += len(found)
        return found

    def word(self, belongs: Callable[[str], bool], longest: int | None = None) -> Reads[str]:
        """Read characters for as long as they belong to the word, but no more than the longest one has."""
        start = self.at
        while longest is None or self.at - start < longest:
            following = yield from self.peek()
            if not following or not belongs(following):
                break
            self.at += 1
        return self.text[start : self.at]

    def blanks(self) -> Reads[str]:
        return (yield from self.word(str.isspace))

    def until(self, mark: str, longest: int | None = None) -> Reads[str | None]:
        """Read up to a mark and the mark itself; None, and nothing read, if it does not come within `longest` characters."""
        start = searched = self.at
        while (found := self.text.find(mark, searched)) < 0:
            if self.ended or (longest is not None and len(self.text) - start > longest + len(mark)):
                return None
            searched = max(start, len(self.text) - len(mark) + 1)
            yield
        if longest is not None and found - start > longest:
            return None
        self.at = found + len(mark)
        return self.text[start:found]

    def pass_until(self, out: Callable[[str], None], *marks: str) -> Reads[str]:
        """Hand over text as it comes, up to the first of the marks, and forget it. Returns the mark, unread; "" at the end.

        No mark may have another one in its middle or at its beginning.
        """
        while True:
            found = [(at, mark) for mark in marks if (at := self.text.find(mark, self.at)) >= 0]
            at, mark = min(found, default=(len(self.text), ""))
            if not found and not self.ended:
                at -= max((overlap(self.text[self.at :], each) for each in marks), default=0)
            if piece := self.text[self.at : at]:
                out(piece)
            self.at = at
            self.forget()
            if mark or self.ended:
                return mark
            yield

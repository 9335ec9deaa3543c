"""Where an answer begins and ends, in text that arrives in pieces. Knows text only: no tokens, no engine."""

from __future__ import annotations

from collections.abc import Sequence


class WithoutRepeat:
    """Leaves out the beginning of an answer as far as it repeats `known`, which the reader has already."""

    def __init__(self, known: str):
        self._known = known

    def feed(self, text: str) -> str:
        """Take the next piece and return what of it is new."""
        same = 0
        while same < min(len(text), len(self._known)) and text[same] == self._known[same]:
            same += 1
        # After the first character that differs, nothing is a repetition any more.
        self._known = self._known[same:] if same == len(text) else ""
        return text[same:]


class StopStrings:
    """Lets text through until one of the stop strings is complete, which is cut off with everything after it.

    The end of the text so far is held back as long as it could be the beginning of a stop string. The result does
    not depend on where the pieces are cut: the stop string that is complete first counts, of several the longest.
    """

    def __init__(self, stops: Sequence[str]):
        self._stops = tuple(stop for stop in stops if stop)
        self._held = ""
        self.met: str | None = None  # the stop string that was complete

    @property
    def stopped(self) -> bool:
        """Whether a stop string is complete."""
        return self.met is not None

    def feed(self, text: str) -> str:
        """Take the next piece and return what may be shown now. Afterwards `stopped` tells whether to go on."""
        if self.stopped:
            return ""
        self._held += text
        found = [(at + len(stop), at) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            end, at = min(found)
            shown, self.met, self._held = self._held[:at], self._held[at:end], ""
            return shown
        keep = max((overlap(self._held, stop) for stop in self._stops), default=0)
        cut = len(self._held) - keep
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown

    def flush(self) -> str:
        """Return what is still held back, at the end of the text."""
        shown, self._held = self._held, ""
        return shown


def overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop` (shorter than all of it)."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)

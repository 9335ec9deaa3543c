"""Which entries of the DHT make sense, whatever they say, and a count of those that do not.

Knows the shape of hivemind's entries as plain values. Does not import hivemind, which imports this.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

logger = logging.getLogger(__name__)

S = TypeVar("S")

MOST_BYTES = 64 << 10  # of one entry; an announcement takes about one KiB
MOST_ENTRIES = 1000  # below one key
LONGEST_TEXT = 512
_MOST_SECONDS = 86400.0  # that an entry may still live; announcements live for a minute or two


class BadRecord(ValueError):
    """A record that makes no sense; the message says why. It is skipped, and never reaches a user as an error."""


class Skipped:
    """Counts the records that were skipped, each time that one is, and logs the first."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.count = 0

    def add(self, where: str, why: object, count: int = 1) -> None:
        """One more record, found `where`, was skipped because of `why`."""
        with self._lock:
            first, self.count = self.count == 0, self.count + count
        level = logging.WARNING if first else logging.DEBUG
        rest = " Such records are skipped; more of them will not be mentioned." if first else ""
        logger.log(level, "A peer announced something that makes no sense (%.100s: %.200s).%s", where, why, rest)


skipped = Skipped()


def check_entry(subkey: object, value: object, expires: object, now: float) -> None:
    """Raise BadRecord if this cannot be an entry of a dictionary in the DHT.

    :param value: serialized
    :param expires: in DHT time (seconds), as `now`
    """
    if not isinstance(subkey, str) or len(subkey) > LONGEST_TEXT:
        raise BadRecord(f"its name is no text but {type(subkey).__name__}")
    if not isinstance(value, bytes) or len(value) > MOST_BYTES:
        raise BadRecord("its value is too large, or none")
    check_expiry(expires, now)


def check_expiry(expires: object, now: float) -> None:
    """Raise BadRecord unless `expires` is a time, at most a day from `now`."""
    if isinstance(expires, bool) or not isinstance(expires, int | float) or not expires <= now + _MOST_SECONDS:
        raise BadRecord("it does not say when it ends, or ends too late")


def sane_entries(items: object, now: float) -> Iterator[tuple[str, bytes, float]]:
    """The entries of a dictionary as another peer sent it, without those that cannot be any."""
    if not isinstance(items, list | tuple):
        skipped.add("a dictionary", "it is none")
        return
    for item in items[:MOST_ENTRIES]:
        try:
            subkey, value, expires = item
            check_entry(subkey, value, expires, now)
        except (TypeError, ValueError) as e:
            skipped.add("an entry of a dictionary", e)
        else:
            yield subkey, value, expires
    if len(items) > MOST_ENTRIES:
        skipped.add("a dictionary", f"it has {len(items)} entries", len(items) - MOST_ENTRIES)


def decode_entries(
    entries: Iterable[tuple[Any, tuple[Any, Any]]], decode: Callable[[Any, Any, Any], S]
) -> dict[Any, tuple[S, Any]]:
    """Every (value, expiration) by its subkey whose value can be decoded.

    :param decode: called with subkey, serialized value and expiration; whatever it raises is about that entry alone
    """
    decoded = {}
    for subkey, (value, expires) in entries:
        try:
            decoded[subkey] = decode(subkey, value, expires), expires
        except Exception as e:
            skipped.add(f"the entry {subkey!r}", f"its value cannot be read: {e!r}")
    return decoded

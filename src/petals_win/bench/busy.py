"""A program that keeps one core busy, beside which something is measured. Knows processes alone."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

from petals_win.host.children import spawn

_PROGRAM = """
from petals_win.host.children import exit_with_parent
exit_with_parent()
while True:
    pass
"""


@contextlib.contextmanager
def busy_program(wanted: bool = True) -> Iterator[None]:
    """For the length of a with block, another program computes on one core, at this one's priority. It ends with this one."""
    if not wanted:
        yield
        return
    child = spawn([sys.executable, "-c", _PROGRAM])
    try:
        yield
    finally:
        child.stop()

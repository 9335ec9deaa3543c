"""Make MPFuture a plain future of one process.

Why: the original is built on a pipe, a waiter thread and one byte of shared memory for each future. Windows shares
    tensors by names that outlive the process, and setting a result inside a running loop fails there
    ("Cannot run the event loop while another loop is running"). A node is one process: a thread-safe future does.
Status: windows-only
Upstream-issue: none
Drop-when: hivemind offers its DHT and handlers without processes.
"""

from petals_win.upstream.declare import replace_module

replace_module("hivemind.utils.mpfuture", digest="228f4de2907968a8")

from concurrent.futures import InvalidStateError
from typing import TypeVar

from petals_win.host.futures import AwaitableFuture

ResultType = TypeVar("ResultType")


class MPFuture(AwaitableFuture[ResultType]):
    """A future that any thread may fulfil and any thread or event loop may await."""

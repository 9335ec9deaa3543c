"""Run a client's calls on a thread with the host's event loop, and refuse to wait for them on that thread itself.

Why: RemoteExpertWorker checks process ids for forks and lets its own thread wait for itself: when Python's garbage collector
    happened to run there and closed a forgotten inference session, the client hung for ever. No call had a deadline.
Status: pending
Upstream-issue: none
Drop-when: upstream's worker refuses calls from its own thread.
"""

from petals_win.upstream.declare import replace_module

replace_module("hivemind.moe.client.remote_expert_worker", digest="68349ca90ec84c0e")

import threading
from typing import Any, Coroutine, Optional, Union

from petals_win.host.futures import AwaitableFuture
from petals_win.host.loop import LoopThread


class RemoteExpertWorker:
    """The one thread of this process on whose event loop clients call servers."""

    _thread: Optional[LoopThread] = None
    _lock = threading.Lock()

    @classmethod
    def run_coroutine(cls, coro: Coroutine, return_future: bool = False) -> Union[Any, AwaitableFuture]:
        """The coroutine's result, or a future of it. Raises RuntimeError instead of waiting on the worker's own thread."""
        with cls._lock:
            if cls._thread is None or not cls._thread.is_alive():
                cls._thread = LoopThread("client")
                cls._thread.start()
        return cls._thread.submit(coro) if return_future else cls._thread.call(coro)

"""Count the bytes of open sessions on the event loop, as they are taken, and let those who find no room wait in line.

Why: MemoryCache shares counters, locks and a pipe between processes and asserts that allocation happens in another process
    than use ("AssertionError: must be called by a ConnectionHandler, not runtime"). It also took all that a session announced
    at once, so that a few chats that said no limit filled a node.
Status: superseded-by petals_win.span
Upstream-issue: none
Drop-when: never; it goes with backend_on_the_span.
"""

from petals_win.upstream.declare import replace_module

replace_module("petals.server.memory_cache", digest="f1dbfb4c2286adf7")

from petals_win.errors import NodeFull as AllocationFailed
from petals_win.node.budget import CacheBudget as MemoryCache

"""Answer all requests of a node on the DHT's event loop, by petals_win.node.petals_rpc.

Why: upstream starts eight handler processes and connects them by multiprocessing queues, listened to from executor threads
    ("PicklingError" under spawn); pushed tensors had to find the process that owns their session. Each request went block by block
    through pools of tasks, with two pipes for each hop. Nothing was ever pushed from server to server, since the next one was
    looked for in the request that opened the session, where the client cannot name it yet.
Status: superseded-by petals_win.node.petals_rpc
Upstream-issue: https://github.com/bigscience-workshop/petals/issues/550
Drop-when: never; this is where upstream's client finds the names of the RPCs.
"""

from petals_win.upstream.declare import replace_module

replace_module("petals.server.handler", digest="4409f3ce5c719778")

from petals_win.node.petals_rpc import TransformerConnectionHandler

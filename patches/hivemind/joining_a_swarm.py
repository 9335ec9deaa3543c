"""Join a swarm without asking the router for anything unless told to, and say in a sentence why it fails.

Why: every daemon, a client's too, asked the router by UPnP to open its port to the internet. Clocks that differ by more than three
    seconds, a peer that does not answer and one that cannot reach this PC ended a start in a traceback ("ValidationError: local time
    must be within 3 seconds of others", "RuntimeError: DHTNode bootstrap failed").
Status: pending
Upstream-issue: none
Drop-when: hivemind maps no port unless it is told to; the sentences are the distribution's own.
"""

from petals_win.upstream.declare import add_import, bases, swap_call

add_import("hivemind.p2p.p2p_daemon", "from functools import partial")
swap_call(
    "hivemind.p2p.p2p_daemon:P2P.is_identity_taken",
    "cls.create",
    "partial(cls.create, nat_port_map=False)",
    digest="6de8f8160e249843",
)
add_import("hivemind.dht.node", "from petals_win.dht.joining import NobodyAnswers")
swap_call(
    "hivemind.dht.node:DHTNode.create",
    "P2P.create",
    "partial(P2P.create, nat_port_map=False)",
    digest="6acfff9d4f70e1b9",
)
swap_call("hivemind.dht.node:DHTNode.create", "RuntimeError", "NobodyAnswers", digest="6acfff9d4f70e1b9")
add_import("hivemind.dht.protocol", "from petals_win.errors import UserError")
add_import("hivemind.dht.protocol", "from petals_win.dht.joining import clocks_differ, out_of_reach")
bases("hivemind.dht.protocol:ValidationError", "UserError", digest="b4fe3d529dee467d")
swap_call(
    "hivemind.dht.protocol:DHTProtocol.call_ping",
    "ValidationError",
    "out_of_reach(ValidationError)",
    digest="a0520033f507d037",
    nth=1,
)
swap_call(
    "hivemind.dht.protocol:DHTProtocol.call_ping",
    "ValidationError",
    "clocks_differ(ValidationError, response.dht_time - time_requested)",
    digest="a0520033f507d037",
    nth=2,
)

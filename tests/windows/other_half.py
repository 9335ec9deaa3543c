"""Blocks 15:30 of the default model on this PC, in a swarm whose first half is elsewhere, at the command of a test.

Usage: other_half.py PEER

Prints JSON lines: {"text": what a client on this PC generates, "ended_by": a port}. The first connection to that port of
127.0.0.1 has the node ended by force; the last line is {"seconds": how long its daemon then ran}.
"""

from __future__ import annotations

import json
import socket
import sys

from greedy import Client
from test_on_windows import seconds_until_gone

from petals_win.models.source import DEFAULT_MODEL
from petals_win.swarm.local import LocalSwarm

WAIT_SECONDS = 240


def main(peer: str) -> None:
    with (
        LocalSwarm(DEFAULT_MODEL, ["15:30"], options=["--quant", "none", "--peers", peer]) as node,
        socket.socket() as command,
    ):
        node.wait_until_serving()
        client = Client([peer])
        text = client.text()
        client.close()
        command.bind(("127.0.0.1", 0))
        command.listen()
        command.settimeout(WAIT_SECONDS)
        print(json.dumps({"text": text, "ended_by": command.getsockname()[1]}), flush=True)
        command.accept()[0].close()
        print(json.dumps({"seconds": seconds_until_gone(node.nodes[0].child.pid)}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])

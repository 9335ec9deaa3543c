"""The node's end of the lines that peers have opened to it: requests of many sessions come in, their answers go out.

Knows lines and who is at their other end. Does not know sessions. An answer goes only to the peer that has opened its session.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from google.protobuf.message import DecodeError
from hivemind.p2p import PeerID

from petals_win.node.wire import ExpertRequest, ExpertResponse
from petals_win.swarm.lines import OPEN_SECONDS, BadFrame, Line

logger = logging.getLogger(__name__)

_MOST_OF_A_PEER = 16


class ServedLines:
    """Lines that are open here.

    :param take: hands a request to the session of that name, from a peer; False if that does not take it
    """

    def __init__(self, take: Callable[[str, ExpertRequest, PeerID], bool]):
        self._take = take
        self._lines: dict[tuple[PeerID, str], Line] = {}

    async def serve(self, stream: Any, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Read a line until it ends. The first message, which is empty, tells its name, and is sent back."""
        line, peer_id, key = Line(reader, writer), stream.peer_id, None
        try:
            async with asyncio.timeout(OPEN_SECONDS):
                [(name, _)] = await line.read()
            if sum(peer == peer_id for peer, _ in self._lines) >= _MOST_OF_A_PEER:
                raise BadFrame(f"A peer may have {_MOST_OF_A_PEER} lines")
            self._lines[key := (peer_id, name)] = line  # the peer has given up an earlier one of that name
            line.send(name, b"")
            while True:
                for session, message in await line.read():
                    if not self._take(session, ExpertRequest.FromString(message), peer_id):
                        line.send(session, b"")
        except (OSError, EOFError, ValueError, DecodeError) as e:
            logger.debug("A line from …%s has ended: %r", str(peer_id)[-6:], e)
        finally:
            if key is not None and self._lines.get(key) is line:
                del self._lines[key]
            line.close()

    async def answer(self, owner: PeerID, name: object, session: object, answer: ExpertResponse) -> bool:
        """Send an answer on the line of that name of the session's owner; False if there is none, or it does not take it."""
        line = self._lines.get((owner, name)) if isinstance(name, str) else None
        if line is None or not isinstance(session, str) or not line.send(session, answer.SerializeToString()):
            return False
        with suppress(ConnectionError):  # the owner sees that the line has ended, too
            await line.drain()
        return True

    def close(self) -> None:
        """End all lines."""
        for line in self._lines.values():
            line.close()

"""End a stream for the caller when the peer has ended it, whatever the caller still has to say.

Why: at the end of a peer's answers the caller's side waited until all of its own requests had been sent. A session sends none before
    it has the answer to the last one, so the loss of a server in the middle of a step went unnoticed until the time-out of three
    minutes.
Status: pending
Upstream-issue: none
Drop-when: upstream stops sending when the answers end.
"""

from petals_win.upstream.declare import add, replace


@replace("hivemind.p2p.p2p_daemon:P2P._iterate_protobuf_stream_handler", digest="2b97e386bd6e519a")
async def _iterate_protobuf_stream_handler(self, peer_id, name, requests, output_protobuf_type) -> TOutputStream:
    _info, reader, writer = await self.call_binary_stream_handler(peer_id, name)
    sending = asyncio.create_task(self._send_all(requests, writer))
    return self._answers(output_protobuf_type, reader, writer, sending, f"{name} at {peer_id}")


@add("hivemind.p2p.p2p_daemon:P2P")
async def _send_all(self, messages: TInputStream, writer: asyncio.StreamWriter) -> None:
    async for message in messages:
        await self.send_protobuf(message, writer)
    await self.send_protobuf(P2P.END_OF_STREAM, writer)


@add("hivemind.p2p.p2p_daemon:P2P")
async def _answers(
    self,
    kind: Type[Message],
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    sending: asyncio.Task,
    whose: str,
) -> TOutputStream:
    try:
        while True:
            try:
                answer, error = await self.receive_protobuf(kind, reader)
            except asyncio.IncompleteReadError:
                break
            if error is not None:
                raise P2PHandlerError(f"{whose} failed: {error.message}")
            yield answer
        if sending.done():
            sending.result()  # raises what kept the requests from being sent
    finally:
        sending.cancel()
        writer.close()

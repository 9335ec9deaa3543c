"""Write each message to p2pd in one piece.

Why: the marker, the eight bytes of length and the payload of a stream message, and every single byte of a length on the control
    connection, were writes of their own: each a system call, a wake-up of the daemon and a frame on the network. A decoding
    step is a few kilobytes and pays that on each of its hops.
Status: pending
Upstream-issue: none
Drop-when: upstream writes a message at once.
"""

from petals_win.upstream.declare import replace


@replace("hivemind.p2p.p2p_daemon:P2P.send_protobuf", digest="49de89c743b7a795")
@staticmethod
async def send_protobuf(protobuf: Union[TOutputProtobuf, RPCError], writer: asyncio.StreamWriter) -> None:
    marker = P2P.ERROR_MARKER if isinstance(protobuf, RPCError) else P2P.MESSAGE_MARKER
    payload = protobuf.SerializeToString()
    header = marker + len(payload).to_bytes(P2P.HEADER_LEN, P2P.BYTEORDER)
    first = 2**16 - len(header)
    writer.write(header + payload[:first])
    for offset in range(first, len(payload), 2**16):
        writer.write(payload[offset : offset + 2**16])
        await writer.drain()  # so that a large tensor is not copied into the transport's buffer as a whole
    await writer.drain()


@replace("hivemind.p2p.p2p_daemon_bindings.utils:write_pbmsg", digest="1310b37d3dc9bb47")
async def write_pbmsg(stream: asyncio.StreamWriter, pbmsg: PBMessage) -> None:
    payload = pbmsg.SerializeToString()
    length, prefix = len(payload), bytearray()
    while length > 0x7F:
        prefix.append(0x80 | length & 0x7F)
        length >>= 7
    prefix.append(length)
    stream.write(bytes(prefix) + payload)
    await stream.drain()

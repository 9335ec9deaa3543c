"""Calls over gRPC: TLS with the worker's own certificate, which callers have pinned, and the shared key in the metadata.

Knows grpc.aio. Does not know what requests and replies mean. The service is that of jobs.proto; beside it there is the standard
health service, for callers with the key, and no reflection.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import logging
import os
import socket
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from typing import Any

os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # its own lines tell strangers' mistakes, as many as they make

import grpc  # noqa: E402
from grpc_health.v1 import health, health_pb2, health_pb2_grpc  # noqa: E402

from petals_win.errors import UserError, printable  # noqa: E402
from petals_win.host.ports import check_port_free  # noqa: E402
from petals_win.jobs.failures import LinkLost, LinkRefused  # noqa: E402
from petals_win.jobs.keys import OwnSecrets  # noqa: E402
from petals_win.jobs.links import CLOSE_S, CONNECT_S, HANDSHAKE_S, MOST_CALLS, Address, Answer  # noqa: E402
from petals_win.jobs.model import METHODS, MOST_BYTES  # noqa: E402
from petals_win.jobs.schema import SERVICE  # noqa: E402

logger = logging.getLogger(__name__)

_KEY = "petals-win-key"
_NAME = "localhost"  # in every worker's certificate; what counts is that it is the pinned one
_MOST_STRANGERS = 256  # that are remembered, so that each is logged once
_REFUSED = "The key is missing or wrong."
_BOTH = (
    ("grpc.max_receive_message_length", MOST_BYTES),
    ("grpc.max_send_message_length", MOST_BYTES),
    ("grpc.max_metadata_size", 8192),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
)
_SERVER = (
    *_BOTH,
    ("grpc.so_reuseport", 0),
    ("grpc.max_concurrent_streams", MOST_CALLS),
    ("grpc.server_handshake_timeout_ms", int(HANDSHAKE_S * 1000)),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
)
_CLIENT = (
    *_BOTH,
    ("grpc.ssl_target_name_override", _NAME),
    ("grpc.enable_http_proxy", 0),
    ("grpc.enable_retries", 0),
    ("grpc.use_local_subchannel_pool", 1),
)


def new_door(secrets: OwnSecrets) -> GrpcDoor:
    return GrpcDoor(secrets)


class GrpcDoor:
    """A Door."""

    def __init__(self, secrets: OwnSecrets):
        self.pin = secrets.pin("grpc")
        self._secrets = secrets
        self._server: grpc.aio.Server | None = None
        self._health = health.aio.HealthServicer()  # pyright: ignore[reportAttributeAccessIssue]

    async def open(self, host: str, port: int, answer: Answer) -> int:
        if port:
            check_port_free(host, port)
        tls = self._secrets.tls
        proof = grpc.ssl_server_credentials([(tls.key.read_bytes(), tls.cert.read_bytes())])
        server = self._server = grpc.aio.server(
            interceptors=[_KeyRequired(self._secrets.key)], options=_SERVER, maximum_concurrent_rpcs=MOST_CALLS
        )
        self._jobs = _Jobs(answer)
        server.add_generic_rpc_handlers([self._jobs])
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        for service in ("", SERVICE):
            await self._health.set(service, health_pb2.HealthCheckResponse.SERVING)
        where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        try:
            bound = server.add_secure_port(where, proof)
        except RuntimeError as e:
            raise UserError(f"Nothing can listen on {where}. Choose another address or port with --listen.") from e
        await server.start()
        return bound

    async def drain(self) -> None:
        await self._health.enter_graceful_shutdown()

    async def close(self) -> None:
        if self._server is not None:
            await self._server.stop(0)
            await asyncio.wait_for(self._jobs.idle.wait(), CLOSE_S)  # what it has cancelled ends a moment later


class _Jobs(grpc.GenericRpcHandler):
    """The service, without classes made from the .proto: messages pass as bytes."""

    def __init__(self, answer: Answer):
        self.idle = asyncio.Event()
        self.idle.set()
        self._answer, self._running = answer, 0
        self._handlers = {
            f"/{SERVICE}/{method}": grpc.unary_stream_rpc_method_handler(self._handler(method)) for method in METHODS
        }

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        return self._handlers.get(handler_call_details.method)

    def _handler(self, method: str) -> Callable[..., AsyncIterator[bytes]]:
        async def handle(request: bytes, context: grpc.aio.ServicerContext) -> AsyncIterator[bytes]:
            self._running += 1
            self.idle.clear()
            try:
                async with contextlib.aclosing(self._answer(method, request, _address_of(context))) as replies:
                    async for reply in replies:
                        yield reply
            finally:
                self._running -= 1
                if not self._running:
                    self.idle.set()

        return handle


class _KeyRequired(grpc.aio.ServerInterceptor):
    """Lets nobody in without the key, before anything of the request is read."""

    def __init__(self, key: str):
        self._key = key.encode()
        self._strangers: set[str] = set()
        self._refusal = grpc.stream_stream_rpc_method_handler(self._refuse)

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler:
        metadata: Any = handler_call_details.invocation_metadata
        given = [value for name, value in metadata or () if name == _KEY]
        if len(given) == 1 and hmac.compare_digest(str(given[0]).encode(errors="replace"), self._key):
            return await continuation(handler_call_details)
        return self._refusal

    async def _refuse(self, requests: object, context: grpc.aio.ServicerContext) -> None:
        stranger = _address_of(context)
        if stranger not in self._strangers and len(self._strangers) < _MOST_STRANGERS:
            self._strangers.add(stranger)
            logger.warning("%s is refused: it has no key, or a wrong one. Said once for each address.", stranger)
        await context.abort(grpc.StatusCode.UNAUTHENTICATED, _REFUSED)


def _address_of(context: grpc.aio.ServicerContext) -> str:
    """The caller's address without its port: "ipv4:192.168.1.5:50123" is 192.168.1.5."""
    return printable(context.peer().partition(":")[2].rpartition(":")[0].strip("[]"))[:64]


async def connect(address: Address, key: str) -> GrpcLink:
    """Raises LinkLost if nobody answers, LinkRefused if it is not the one that is pinned."""
    try:
        certificate = await asyncio.wait_for(asyncio.to_thread(_certificate_of, address), CONNECT_S + 1)
    except (OSError, TimeoutError) as e:
        raise LinkLost(f"{address} cannot be reached: {printable(str(e)) or 'no answer in time'}.") from e
    pin = hashlib.sha256(certificate).hexdigest()
    if not hmac.compare_digest(pin, address.pin or ""):
        raise LinkRefused(
            f"{address} has another certificate than the one that is named behind the #. If the worker was set up anew, take the address "
            "that it prints now; else it is another program."
        )
    link = GrpcLink(address, key, ssl.DER_cert_to_PEM_cert(certificate).encode())
    try:
        await asyncio.wait_for(link.channel.channel_ready(), CONNECT_S)
    except TimeoutError as e:
        await link.close()
        raise LinkLost(
            f"{address} does not answer, or its certificate is not valid now: look at the clocks of both PCs."
        ) from e
    except BaseException:
        await link.close()
        raise
    return link


def _certificate_of(address: Address) -> bytes:
    """The certificate (DER) of whoever listens there, unchecked."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    with socket.create_connection((address.host, address.port), CONNECT_S) as plain:
        with context.wrap_socket(plain) as wrapped:
            certificate = wrapped.getpeercert(binary_form=True)
    if not certificate:
        raise OSError("it shows no certificate")
    return certificate


class GrpcLink:
    """A Link."""

    def __init__(self, address: Address, key: str, certificate: bytes):
        host = f"[{address.host}]" if ":" in address.host else address.host
        proof = grpc.ssl_channel_credentials(root_certificates=certificate)
        self.channel = grpc.aio.secure_channel(f"{host}:{address.port}", proof, options=_CLIENT)
        self._address = address
        self._metadata = ((_KEY, key),)
        self._methods = {method: self.channel.unary_stream(f"/{SERVICE}/{method}") for method in METHODS}
        self._closed = False

    async def call(self, method: str, request: bytes, seconds: float) -> AsyncGenerator[bytes, None]:
        if self._closed:
            raise LinkLost(f"The connection to {self._address} is closed.")
        call = self._methods[method](request, timeout=seconds, metadata=self._metadata)
        try:
            async for reply in call:
                yield reply
        except grpc.aio.AioRpcError as error:
            raise self._lost(error) from error
        except asyncio.CancelledError:
            # Closing the channel cancels its calls, which is no matter of the task that reads.
            this = asyncio.current_task()
            if self._closed and not (this and this.cancelling()):
                raise LinkLost(f"The connection to {self._address} is closed.") from None
            raise
        finally:
            call.cancel()

    def _lost(self, error: grpc.aio.AioRpcError) -> LinkLost:
        said = printable(error.details() or "") or error.code().name
        match error.code():
            case grpc.StatusCode.UNAUTHENTICATED:
                return LinkRefused(f"{self._address} refuses the key. Copy the key file of that worker to this PC.")
            case grpc.StatusCode.UNIMPLEMENTED:
                return LinkRefused(f"{self._address} is no worker of this version: {said}")
            case grpc.StatusCode.DEADLINE_EXCEEDED:
                return LinkLost(f"{self._address} did not answer in time.")
            case _:
                return LinkLost(f"The connection to {self._address} is lost: {said}")

    async def close(self) -> None:
        self._closed = True
        await self.channel.close()

"""End a session at a server within a deadline, also one that was never used, and never wait in a finalizer.

Why: closing waited without a deadline for the server's last word, and so did __del__, which Python may call on the very thread
    that has to do the work (seen as a client that hangs for ever). A session that was opened but not stepped kept its stream,
    and with it a place at the server, until the server's timeout of five minutes.
Status: pending
Upstream-issue: none
Drop-when: upstream closes sessions with a deadline and without waiting in __del__.
"""

from petals_win.upstream.declare import add, add_import, replace

add_import("petals.client.inference_session", "from contextlib import suppress")


@add("petals.client.inference_session")
def _close_timeout() -> float:
    return 3.0  # seconds; the server frees the session's cache anyway when the stream ends


@replace("petals.client.inference_session:_ServerInferenceSession.close", digest="395753a3bba07c81")
def close(self):
    """End the session at its server. Safe to call twice."""
    if not self.closed:
        self.closed = True
        RemoteExpertWorker.run_coroutine(self._aclose_stream())


@replace("petals.client.inference_session:_ServerInferenceSession._aclose_stream", digest="3a2ccdc4ac1521d7")
async def _aclose_stream(self):
    stream, requests = self._outputs_stream, self._inputs_queue
    self._outputs_stream = self._inputs_queue = None
    with suppress(StopAsyncIteration, asyncio.TimeoutError, asyncio.CancelledError):
        if self.stepped:
            requests.put_nowait(runtime_pb2.ExpertRequest())  # without tensors: no more steps
            await asyncio.wait_for(anext(stream), _close_timeout())
        else:
            # An async generator that was never started does not clean up when it is closed; one that is cancelled does.
            reading = asyncio.ensure_future(anext(stream))
            await asyncio.sleep(0)
            reading.cancel()
            await reading


@replace("petals.client.inference_session:_ServerInferenceSession.__del__", digest="e365e4137ddb5fe8")
def __del__(self):
    if not self.closed:
        self.closed = True
        with suppress(RuntimeError):  # the interpreter is ending
            RemoteExpertWorker.run_coroutine(self._aclose_stream(), return_future=True)


@replace("petals.client.inference_session:InferenceSession.__del__", digest="e365e4137ddb5fe8")
def __del__(self):
    self._server_sessions.clear()  # each ends by itself, without waiting

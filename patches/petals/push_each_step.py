"""Push the output of each step to the next server, as the client asks for it in that step.

Why: the server looked for the next server in the request that opened the session, where the client cannot name one yet, so
    nothing was ever pushed and every token took one more hop through the client. It would also have pushed the beams of the
    first step. A push that loses the race against the client's own request is harmless, but was a warning to the user.
Status: pending
Upstream-issue: https://github.com/bigscience-workshop/petals/issues/550
Drop-when: the pinned release pushes by the metadata of the step.
"""

from petals_win.upstream.declare import add, swap_call

swap_call(
    "petals.server.handler:TransformerConnectionHandler.rpc_inference",
    "iterate_rpc_inference",
    "self._steps_with_pushes",
    digest="2c0926d41eb42c8e",
)
swap_call(
    "petals.server.handler:TransformerConnectionHandler._iterate_inference_steps",
    "self._log_request",
    "self._log_late_push",
    digest="c97b1e0fe1ac0b31",
    nth=2,
)


@add("petals.server.handler:TransformerConnectionHandler")
def _log_late_push(self, method: str, uids: Sequence[ModuleUID], context: P2PContext, *, warning: str) -> None:
    self._log_request(method, uids, context, debug=warning)


@add("petals.server.handler:TransformerConnectionHandler")
async def _steps_with_pushes(self, **session) -> AsyncIterator[Tuple[Sequence[runtime_pb2.Tensor], bool]]:
    pushes = set()  # keeps the tasks from being collected
    async for request, metadata, outputs, may_push in iterate_rpc_inference(**session):
        if may_push and metadata.get("next_servers"):
            push = asyncio.create_task(self._push_outputs(request, outputs[0], metadata))
            pushes.add(push)
            push.add_done_callback(pushes.discard)
        yield outputs, False

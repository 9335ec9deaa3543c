"""Keep a session alive: give a server that takes over all that its predecessor was sent, wait for one that is full.

Why: the session at the new server got its predecessor's inputs but began to count at 0 ("AssertionError: Broken input cache"),
    so no session survived. Outputs for the replayed tokens went on to servers that had them already, reordered beams were
    replayed in their first order, and deep prompts, which only the first step carries, were not replayed at all. Each token
    copied the whole history. A server that had no room, or refused a request, was taken for one that had failed and was
    avoided by everybody; a session that waited could not be given up; a long prompt was one message.
Status: pending
Upstream-issue: https://github.com/bigscience-workshop/petals/issues/587
Drop-when: the issue is closed by a release.
"""

from petals_win.upstream.declare import add, add_import, replace

add_import("petals.client.inference_session", "import threading")
add_import("petals.client.inference_session", "from hivemind.p2p import P2PHandlerError")
add_import("petals.client.inference_session", "from petals.client.routing.sequence_manager import MissingBlocksError")
add_import("petals.client.inference_session", "from petals_win.errors import NodeFull, NodeRefused, node_error")
add_import("petals.client.inference_session", "from petals_win.client.pieces import piece_tokens")
add_import("petals.client.inference_session", "from petals_win.client.history import InputHistory")
add_import("petals.client.inference_session", "from petals_win.swarm.naming import chain_for")


@replace("petals.client.inference_session:_ServerInferenceSession.step", digest="14492a59b47fe5a3")
def step(
    self,
    inputs: torch.Tensor,
    prompts: torch.Tensor,
    hypo_ids: torch.LongTensor,
    *,
    step_id: str,
    new: int,
    position: int,
    patience: float,
    cancelled: threading.Event,
) -> torch.Tensor:
    """Send a step of `new` tokens at `position` and return its outputs; a new server gets, and answers, all before it too.

    :param inputs: [batch, tokens, hidden], the new tokens last
    Long inputs go in pieces.

    :param prompts: deep prompts [blocks, batch or 1, prefix, hidden] for the first tokens of a session, else DUMMY
    :param patience: seconds that the server may keep a new session waiting for room
    """
    if self.closed:
        raise RuntimeError("The session at this server is closed")
    if self.history is None:
        self.history = InputHistory()
    self.history.add(inputs, new, position, None if is_dummy(hypo_ids) else hypo_ids)
    metadata = dict(session_id=self.session_id, step_id=step_id)
    if self.stepped:
        inputs = inputs[:, -new:]
        if self.config.use_server_to_server and (next_servers := self._collect_next_servers()):
            metadata["next_servers"] = next_servers
    else:
        inputs, hypo_ids = self.history.whole(), DUMMY_INT64  # in the order of the beams already
        metadata.update(self.session_metadata, alloc_timeout=patience)
    compression = self.rpc_info["inference_schema"][0][0].compression
    outputs = []
    for number, piece in enumerate(
        inputs.split(piece_tokens(inputs, 1 if is_dummy(prompts) else prompts.shape[2]), 1)
    ):
        if number > 0:
            prompts, hypo_ids = DUMMY, DUMMY_INT64
            metadata = {key: metadata[key] for key in ("session_id", "next_servers") if key in metadata}
            metadata["step_id"] = f"{step_id}/{number}"
        tensors, metadata["args_structure"] = pack_args_kwargs(piece, prompts, hypo_ids)
        request = runtime_pb2.ExpertRequest(
            uid=self.uid,
            tensors=[serialize_torch_tensor(tensor, compression) for tensor in tensors],
            metadata=MSGPackSerializer.dumps(metadata),
        )
        self._answer = RemoteExpertWorker.run_coroutine(self._step(request, patience), return_future=True)
        if cancelled.is_set():  # by whoever did not see this answer yet
            self._answer.cancel()
        output = deserialize_torch_tensor(self._answer.result().tensors[0])
        if output.shape != piece.shape:
            raise ValueError(f"The server answered {list(output.shape)} to {list(piece.shape)}")
        outputs.append(output)
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)


@replace("petals.client.inference_session:_ServerInferenceSession._step", digest="36c37a1ab89defb6")
async def _step(self, inputs_serialized: runtime_pb2.ExpertRequest, patience: float) -> runtime_pb2.ExpertResponse:
    """The answer to one request; the first one waits `patience` seconds longer, for room at the server."""
    await self._inputs_queue.put(inputs_serialized)
    seconds = self.config.request_timeout + (0 if self.stepped else patience)
    self.stepped = True
    return await asyncio.wait_for(anext(self._outputs_stream), seconds)


@add("petals.client.inference_session:_ServerInferenceSession")
def cancel(self):
    """Give up the step in work, from any thread. The stream ends with it, and the session at the server."""
    answer = getattr(self, "_answer", None)
    if answer is not None:
        answer.cancel()


@add("petals.client.inference_session")
class SessionCancelled(Exception):
    """The session was given up by `cancel` while a step was in work."""


@add("petals.client.inference_session")
def _patience() -> float:
    return 300.0  # seconds that a step waits in all until full servers have room


@replace("petals.client.inference_session:InferenceSession.__init__", digest="c7458be197ad98c6")
def __init__(self, sequence_manager: RemoteSequenceManager, max_length: int):
    self._sequence_manager, self._max_length = sequence_manager, max_length
    self._server_sessions, self._position, self._closed = [], 0, False
    self._cancelled = threading.Event()
    self.output_ids = None


@add("petals.client.inference_session:InferenceSession")
def cancel(self):
    """Give the session up, from any thread: a step in work, or waiting for room, raises SessionCancelled at once."""
    self._cancelled.set()
    for session in list(self._server_sessions):
        session.cancel()


@replace("petals.client.inference_session:InferenceSession.step", digest="8a3827f7be542bda")
def step(
    self, inputs: torch.Tensor, prompts: Optional[torch.Tensor] = None, hypo_ids: Optional[torch.Tensor] = None
) -> torch.Tensor:
    """Hidden states [batch, tokens, hidden] through all blocks, with what the session has seen before in the servers' caches.

    A server that fails is replaced, and the step tried again, up to `max_retries` times with growing pauses. Where one has no
    room, all of the session's servers get theirs back and it waits for its turn, like a new one that has a past. Raises NodeFull
    when that takes too long, NodeRefused for what a server will not do, SessionCancelled after `cancel`.

    :param prompts: deep prompts [blocks, batch or 1, prefix, hidden], at the first step only
    :param hypo_ids: int64 [batch]: row i goes on from what was row hypo_ids[i]
    """
    if self._closed:
        raise RuntimeError("The session is closed")
    if torch.is_grad_enabled():
        logger.warning("Gradients do not flow through an inference session: call it under torch.no_grad()")
    new, position = inputs.shape[1], self._position
    if position + new > self._max_length:
        raise ValueError(f"The session holds {self._max_length} tokens, {position} are used, and {new} more came")
    prompts = DUMMY if prompts is None or is_dummy(prompts) else prompts.cpu()
    hypo_ids = DUMMY_INT64 if hypo_ids is None or is_dummy(hypo_ids) else hypo_ids.cpu()
    if not is_dummy(prompts):
        blocks, rows, length, size = prompts.shape
        if blocks != self.num_blocks or rows not in (1, len(inputs)) or length > new or size != inputs.shape[2]:
            raise ValueError(
                f"Deep prompts {list(prompts.shape)} do not fit {list(inputs.shape)} in {self.num_blocks} blocks"
            )
    if not is_dummy(hypo_ids) and (hypo_ids.shape != (len(inputs),) or hypo_ids.dtype != torch.int64):
        raise ValueError(f"hypo_ids must be {len(inputs)} int64 values")
    if position == 0:
        self._first_prompts = prompts
    hidden, step_id = inputs.cpu(), str(uuid.uuid4())
    server_idx = block_idx = attempt_no = n_full = 0
    deadline, past, told = time.monotonic() + _patience(), None, None
    while block_idx < self.num_blocks:
        server = None
        try:
            if self._cancelled.is_set():
                raise SessionCancelled("The session was given up")
            if not self._server_sessions or attempt_no >= 1:
                self._update_sequence(server_idx, block_idx, attempt_no)
                if server_idx == 0 and past is not None:
                    self._server_sessions[0].history = past
            server = self._server_sessions[server_idx]
            theirs = prompts if server.stepped else self._first_prompts
            hidden = server.step(
                hidden,
                theirs[server.span.start : server.span.end],
                hypo_ids,
                step_id=step_id,
                new=new,
                position=position,
                patience=self._patience_at(server_idx, deadline),
                cancelled=self._cancelled,
            )
        except Exception as e:
            if self._cancelled.is_set():
                raise SessionCancelled("The session was given up") from None
            refusal = node_error(str(e))
            if isinstance(refusal, NodeRefused):
                raise refusal from e
            if isinstance(refusal, NodeFull):
                delay = min(2**n_full, 15)
                if time.monotonic() + delay >= deadline:
                    raise refusal from e
                logger.debug(f"No room at a server, starting over in {delay} s: {refusal.sentence}")
                past = self._server_sessions[0].history
                self._exit_server_sessions(self._server_sessions)
                self._server_sessions.clear()
                self._cancelled.wait(delay)
                server_idx = block_idx = attempt_no = 0
                hidden, n_full = inputs.cpu(), n_full + 1
                continue
            self._sequence_manager.on_request_failure(None if server is None else server.span.peer_id)
            attempt_no, told = attempt_no + 1, e if isinstance(e, P2PHandlerError) else told
            if attempt_no == self._sequence_manager.config.max_retries:
                # That no server is left now says less than what the last one said.
                raise (told or e) if isinstance(e, MissingBlocksError) else e
            delay = self._sequence_manager.get_retry_delay(attempt_no - 1)
            who = (
                "finding servers"
                if server is None
                else f"the server of the blocks {server.span.start}:{server.span.end}"
            )
            logger.warning(f"A step failed at {who}, trying again in {delay:.0f} s: {e!r}")
            maybe_log_traceback(e)
            self._cancelled.wait(delay)
        else:
            self._sequence_manager.on_request_success(server.span.peer_id)
            server_idx, block_idx, attempt_no = server_idx + 1, server.span.end, 0
    self._position += new
    return hidden[:, -new:].to(device=inputs.device, dtype=inputs.dtype)


@add("petals.client.inference_session:InferenceSession")
def _patience_at(self, server_idx: int, deadline: float) -> float:
    """Seconds to wait for room at a new server. All sessions take their places in the order of the blocks, so that none waits
    for the other in a circle; one that has places behind a server that was replaced gives them up soon."""
    left = max(deadline - time.monotonic(), 0.0)
    return min(left, 20.0) if any(later.stepped for later in self._server_sessions[server_idx + 1 :]) else left


@replace("petals.client.inference_session:InferenceSession._enter_server_sessions", digest="a414da5ba291760e")
def _enter_server_sessions(self, chosen_spans: List[RemoteSpanInfo]) -> List[_ServerInferenceSession]:
    """A session at the server of each span, or at none; a server that cannot be reached is avoided from then on."""
    manager, opened = self._sequence_manager, []
    for span in chosen_spans:
        uids = chain_for(span.server_info)(manager.block_uids[span.start : span.end])
        request = manager.get_request_metadata("rpc_inference", uids, peer_id=span.peer_id)
        opening = _ServerInferenceSession.create(
            manager.config,
            manager.state.p2p,
            span,
            uids,
            rpc_info=manager.rpc_info,
            max_length=self._max_length,
            **request,
        )
        try:
            opened.append(RemoteExpertWorker.run_coroutine(opening))
        except Exception:
            manager.on_request_failure(span.peer_id)
            self._exit_server_sessions(opened)
            raise
    return opened

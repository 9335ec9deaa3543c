"""Give a server that takes over in the middle of a session all that its predecessor was sent.

Why: the session at the new server got its predecessor's inputs but began to count at 0 ("AssertionError: Broken input cache"),
    so no session survived. Outputs for the replayed tokens went on to servers that had them already, reordered beams were
    replayed in their first order, and deep prompts, which only the first step carries, were not replayed at all. Each token
    copied the whole history.
Status: pending
Upstream-issue: https://github.com/bigscience-workshop/petals/issues/587
Drop-when: the issue is closed by a release.
"""

from petals_win.upstream.declare import add_import, replace

add_import("petals.client.inference_session", "from petals_win.span.history import InputHistory")
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
) -> torch.Tensor:
    """Send a step of `new` tokens at `position` and return its outputs; a new server gets, and answers, all before it too.

    :param inputs: [batch, tokens, hidden], the new tokens last
    :param prompts: deep prompts [blocks, batch or 1, prefix, hidden] for the first tokens of a session, else DUMMY
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
        metadata.update(self.session_metadata)
    tensors, metadata["args_structure"] = pack_args_kwargs(inputs, prompts, hypo_ids)
    compression = self.rpc_info["inference_schema"][0][0].compression
    response = RemoteExpertWorker.run_coroutine(
        self._step(
            runtime_pb2.ExpertRequest(
                uid=self.uid,
                tensors=[serialize_torch_tensor(tensor, compression) for tensor in tensors],
                metadata=MSGPackSerializer.dumps(metadata),
            )
        )
    )
    outputs = deserialize_torch_tensor(response.tensors[0])
    if outputs.shape != inputs.shape:
        raise ValueError(f"The server answered {list(outputs.shape)} to {list(inputs.shape)}")
    return outputs


@replace("petals.client.inference_session:InferenceSession.step", digest="8a3827f7be542bda")
def step(
    self, inputs: torch.Tensor, prompts: Optional[torch.Tensor] = None, hypo_ids: Optional[torch.Tensor] = None
) -> torch.Tensor:
    """Hidden states [batch, tokens, hidden] through all blocks, with what the session has seen before in the servers' caches.

    A server that fails is replaced, and the step tried again, up to `max_retries` times with growing pauses.

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
    server_idx = block_idx = attempt_no = 0
    while block_idx < self.num_blocks:
        server = None
        try:
            if not self._server_sessions or attempt_no >= 1:
                self._update_sequence(server_idx, block_idx, attempt_no)
            server = self._server_sessions[server_idx]
            theirs = prompts if server.stepped else self._first_prompts
            hidden = server.step(
                hidden,
                theirs[server.span.start : server.span.end],
                hypo_ids,
                step_id=step_id,
                new=new,
                position=position,
            )
        except Exception as e:
            self._sequence_manager.on_request_failure(None if server is None else server.span.peer_id)
            attempt_no += 1
            if attempt_no == self._sequence_manager.config.max_retries:
                raise
            delay = self._sequence_manager.get_retry_delay(attempt_no - 1)
            who = (
                "finding servers"
                if server is None
                else f"the server of the blocks {server.span.start}:{server.span.end}"
            )
            logger.warning(f"A step failed at {who}, trying again in {delay:.0f} s: {e!r}")
            maybe_log_traceback(e)
            time.sleep(delay)
        else:
            self._sequence_manager.on_request_success(server.span.peer_id)
            server_idx, block_idx, attempt_no = server_idx + 1, server.span.end, 0
    self._position += new
    return hidden[:, -new:].to(device=inputs.device, dtype=inputs.dtype)


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

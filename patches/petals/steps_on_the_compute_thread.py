"""Hand each request to the compute thread whole, as one call of the span.

Why: upstream submits forward and backward block by block to separate task pools, with a hop between processes for each
    (two pipes and a shared-memory tensor, which Windows names and never frees).
Status: superseded-by petals_win.span
Upstream-issue: none
Drop-when: never; it goes with backend_on_the_span.
"""

from petals_win.upstream.declare import replace_module

replace_module("petals.server.block_functions", digest="61aba022009e4cbd")

from typing import Any, AsyncIterator, Callable, List, Optional, Sequence, Tuple

import torch
from hivemind.compression.serialization import deserialize_torch_tensor, serialize_torch_tensor
from hivemind.moe.expert_uid import ExpertUID
from hivemind.proto import runtime_pb2

from petals.server.backend import TransformerBackend
from petals.server.task_prioritizer import TaskPrioritizerBase
from petals.utils.misc import is_dummy
from petals.utils.packaging import unpack_args_kwargs
from petals_win.errors import NodeRefused
from petals_win.node.served import ServedSession


def _unpack(flat_tensors: Sequence[torch.Tensor], args_structure: Any) -> Sequence[Any]:
    if args_structure is None:
        return flat_tensors
    args, _kwargs = unpack_args_kwargs(flat_tensors, args_structure)
    return args


def _prompt_of_each_block(
    prompts: Optional[torch.Tensor], backends: Sequence[TransformerBackend]
) -> Optional[List[torch.Tensor]]:
    """Deep prompts [blocks, batch or 1, prefix, hidden] as one tensor for each block; None if there are none."""
    if prompts is None or is_dummy(prompts):
        return None
    if prompts.ndim != 4 or len(prompts) != len(backends):
        raise NodeRefused(
            f"Deep prompts have the shape {tuple(prompts.shape)}, but {len(backends)} blocks were asked for"
        )
    return list(prompts.to(backends[0].dtype).unbind(0))


def _hidden_states(tensor: torch.Tensor, backends: Sequence[TransformerBackend]) -> torch.Tensor:
    hidden_size = backends[0].span.hidden_size
    if tensor.ndim != 3 or tensor.shape[-1] != hidden_size:
        raise NodeRefused(
            f"Hidden states must have the shape [batch, tokens, {hidden_size}], got {tuple(tensor.shape)}"
        )
    n_tokens = tensor.shape[0] * tensor.shape[1]
    if n_tokens > backends[0].max_batch_size:
        raise NodeRefused(f"A request may have {backends[0].max_batch_size} tokens on this node, got {n_tokens}")
    return tensor.to(backends[0].dtype)


def _range_of(backends: Sequence[TransformerBackend]) -> Tuple[int, int]:
    start, end = backends[0].block_index, backends[-1].block_index + 1
    if [backend.block_index for backend in backends] != list(range(start, end)):
        raise NodeRefused("The blocks of one request must follow one another")
    return start, end


def _to_cpu(function: Callable[..., torch.Tensor], *args: Any, **kwargs: Any) -> torch.Tensor:
    # On the compute thread: waiting for a GPU must not hold up the event loop.
    return function(*args, **kwargs).cpu()


async def run_rpc_forward(
    *flat_tensors, requested_backends, prioritizer, active_adapter="", points=0, args_structure=None
) -> torch.Tensor:
    """Hidden states [batch, tokens, hidden] after the requested blocks, without a cache."""
    hidden_states, prompts, *_ = _unpack(flat_tensors, args_structure)
    hidden_states = _hidden_states(hidden_states, requested_backends)
    backend = requested_backends[0]
    return await backend.compute.submit(
        _to_cpu,
        backend.span.forward,
        hidden_states,
        *_range_of(requested_backends),
        prompts=_prompt_of_each_block(prompts, requested_backends),
        adapter=active_adapter,
        priority=prioritizer.prioritize(hidden_states, points=points, backend=backend, type="forward"),
    )


async def run_rpc_backward(
    *flat_tensors, requested_backends, prioritizer, active_adapter="", points=0, args_structure=None
) -> Sequence[torch.Tensor]:
    """Gradients with respect to the inputs and, if there were deep prompts, to them: [blocks, batch, prefix, hidden]."""
    inputs, grad_outputs, prompts, *_ = _unpack(flat_tensors, args_structure)
    inputs = _hidden_states(inputs, requested_backends)
    grad_outputs = _hidden_states(grad_outputs, requested_backends)
    backend = requested_backends[0]
    grad_inputs, grad_prompts = await backend.compute.submit(
        backend.span.backward,
        inputs,
        grad_outputs,
        *_range_of(requested_backends),
        prompts=_prompt_of_each_block(prompts, requested_backends),
        adapter=active_adapter,
        priority=prioritizer.prioritize(inputs, grad_outputs, points=points, backend=backend, type="backward"),
    )
    if grad_prompts is None:
        return [grad_inputs.cpu()]
    return [grad_inputs.cpu(), torch.stack(list(grad_prompts)).cpu()]


async def iterate_rpc_inference(
    *, input_iterator, cache_handles, requested_uids, requested_backends, active_adapter, prioritizer, points, **more
) -> AsyncIterator[Tuple[runtime_pb2.ExpertRequest, dict, Sequence[runtime_pb2.Tensor], bool]]:
    """For each request of a session: itself, its metadata, its outputs, and whether they may be pushed to the next server."""
    session: ServedSession = cache_handles
    backend, args_structure = requested_backends[0], more.get("args_structure")
    session.adapter = active_adapter or ""
    async for request, metadata in input_iterator:
        session.check_step(request.tensors[0].size)  # before its bytes become tensors
        flat_tensors = [deserialize_torch_tensor(tensor) for tensor in request.tensors]
        hidden_states, prompts, hypo_ids, *_ = _unpack(flat_tensors, args_structure)
        prompts = _prompt_of_each_block(prompts, requested_backends)
        hidden_states = await session.step(
            hidden_states.to(backend.dtype),
            prompts=prompts,
            hypo_ids=None if is_dummy(hypo_ids) else hypo_ids,
            priority=prioritizer.prioritize(
                hidden_states, hypo_ids, points=points, requested_uids=requested_uids, type="inference"
            ),
        )
        (schema,) = requested_backends[-1].outputs_schema
        output = serialize_torch_tensor(hidden_states.to(schema.dtype), schema.compression, allow_inplace=True)
        yield request, metadata, [output], prompts is None

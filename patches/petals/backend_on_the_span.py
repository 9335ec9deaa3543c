"""Describe a served block to the connection handler and leave its computation to the node's span.

Why: the backend wraps each block in tensor_parallel, counts attention heads by the class names of an old transformers, and
    keeps three task pools per block, each a chain of pipes and a thread (multiprocessing.Pipe in select() is a
    "WinError 10038" on Windows).
Status: superseded-by petals_win.span
Upstream-issue: none
Drop-when: never; this is where upstream's server meets our engine.
"""

from petals_win.upstream.declare import replace_module

replace_module("petals.server.backend", digest="13a446726d49bcea")

from typing import Any, Dict

import torch
from hivemind import BatchTensorDescriptor

from petals.server.memory_cache import MemoryCache
from petals_win.span.compute import ComputeThread
from petals_win.node.served import SESSION_TOKENS
from petals_win.span.span import Span


class TransformerBackend:
    """One served block: which one it is, how its tensors travel, and the span and thread that compute it.

    The schemas are what `rpc_info` answers and upstream clients expect: one tensor of hidden states
    [batch, tokens, hidden_size] in and out; for inference also deep prompts and hypothesis ids.
    """

    def __init__(
        self,
        block_index: int,
        *,
        span: Span,
        compute: ComputeThread,
        memory_cache: MemoryCache,
        compression: int,
        max_batch_size: int,
        session_tokens: int,
    ):
        self.block_index, self.span, self.compute = block_index, span, compute
        self.memory_cache, self.max_batch_size = memory_cache, max_batch_size
        self.session_tokens = session_tokens
        self.dtype = span.dtype
        hidden = BatchTensorDescriptor(1, 2048, span.hidden_size, dtype=span.dtype, compression=compression)
        self.args_schema, self.kwargs_schema = (hidden,), {}
        self.outputs_schema = (hidden,)
        self.forward_schema = (self.args_schema, self.kwargs_schema)
        self.inference_schema = (
            (hidden, BatchTensorDescriptor((), dtype=span.dtype), BatchTensorDescriptor((), dtype=torch.int64)),
            self.kwargs_schema,
        )
        self.cache_bytes_per_token = {torch.device(span.device): span.block_cache_bytes_per_token}

    def get_info(self) -> Dict[str, Any]:
        """What a client must know to call this block, as upstream's clients read it, and how long a session may be here."""
        return {
            SESSION_TOKENS: self.session_tokens,
            "forward_schema": self.forward_schema,
            "outputs_schema": self.outputs_schema,
            "keyword_names": (),
            "inference_schema": self.inference_schema,
        }

"""What a server of blocks is told when it starts, by the names of Petals' run_server. Knows no more than these names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from petals_win.span.kv_int8 import KvCacheDtype
from petals_win.span.quantized_linear import Quant


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """None is "choose what suits"."""

    converted_model_name_or_path: str
    initial_peers: Sequence[str] = ()
    dht_prefix: str | None = None
    public_name: str | None = None
    token: str | bool | None = field(default=None, repr=False)
    revision: str | None = None
    cache_dir: str | None = None

    block_indices: str | None = None  # "START:END"
    num_blocks: int | None = None
    balance_quality: float = 0.75  # blocks are left for others where the swarm gains more than this share
    mean_balance_check_period: float = 120.0
    mean_block_selection_delay: float = 5.0

    device: torch.device | str | None = None
    torch_dtype: str = "auto"
    quant_type: Quant | None = None
    kv_cache_dtype: KvCacheDtype = "auto"
    adapters: Sequence[str] = ()
    throughput: float | str = "auto"  # announced while the blocks are loaded; then what was measured is

    inference_max_length: int | None = None  # tokens of a session
    max_batch_size: int | None = None  # tokens of a forward or backward pass
    attn_cache_tokens: int | None = None  # at least, of all sessions together
    max_alloc_timeout: float = 600.0  # seconds that a session waits for room at most
    compression: int = 0

    # In seconds. An announcement holds for `expiration`.
    update_period: float = 60.0
    expiration: float | None = None
    request_timeout: float = 180.0
    session_timeout: float = 1800.0
    step_timeout: float = 300.0

    reachable_via_relay: bool | None = None
    use_relay: bool = True
    use_auto_relay: bool = True
    skip_reachability_check: bool = False

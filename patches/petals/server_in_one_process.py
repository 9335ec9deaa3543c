"""Run a node as one process: the DHT's event loop, one compute thread, and the main thread for its life cycle.

Why: ModuleContainer forks handlers, joins pools of processes and selects on their pipes ("OSError: [WinError 10038] An operation
    was attempted on something that is not a socket"), and splits blocks over devices by tensor_parallel. Loading and computing
    belong in one thread, else two OpenMP pools slow each other down by a quarter.
Status: superseded-by petals_win.span
Upstream-issue: none
Drop-when: upstream's server runs in one process.
"""

from petals_win.upstream.declare import add_import, remove, remove_import, replace

remove_import("petals.server.server", "mp")
remove_import("petals.server.server", "add_custom_models_from_file")
remove_import("petals.server.server", "BatchTensorDescriptor")
remove_import("petals.server.server", "Runtime")
remove_import("petals.server.server", "TransformerBackend")
remove_import("petals.server.server", "merge_inference_pools_inplace")
remove_import("petals.server.server", "load_pretrained_block")
remove_import("petals.server.server", "convert_block")
remove_import("petals.server.server", "get_block_size")
add_import("petals.server.server", "from petals.server.backend import TransformerBackend")
add_import("petals.server.server", "from petals.server.throughput import throughput_info")
add_import("petals.server.server", "from petals_win.errors import UserError")
add_import("petals.server.server", "from petals_win.span.compute import ComputeThread")
add_import("petals.server.server", "from petals_win.span.needs import choose_num_blocks, least_cache_tokens, needs_of")
add_import("petals.server.server", "from petals_win.span.needs import session_budget")
add_import("petals.server.server", "from petals_win.host.memory import available_bytes")
add_import("petals.server.server", "from petals_win.models.source import open_model")
add_import("petals.server.server", "from petals_win.span.span import Span")
add_import("petals.server.server", "from petals_win.span.speed import measure_speed")
add_import("petals.server.server", "from petals_win.swarm.naming import names_of, split_names")
add_import("petals.server.server", "from petals_win.swarm.protocol import PROTOCOL")
add_import("petals.server.server", "from petals_win.swarm.members import addresses_to_announce")
remove("petals.server.server:RuntimeWithDeduplicatedPools", digest="217f13ccc8509f36")


@replace("petals.server.server:Server._choose_num_blocks", digest="07074f64791354f7")
def _choose_num_blocks(self) -> int:
    needs = needs_of(self.block_config, self.torch_dtype, self.quant_type.name.lower())
    self._cache_bytes_per_block = needs.cache_bytes
    return choose_num_blocks(needs, self.device)


@replace("petals.server.server:ModuleContainer", digest="3257b906e23aa438")
class ModuleContainer:
    """The blocks that this node serves now: loaded, announced, and answering requests."""

    @classmethod
    def create(
        cls,
        *,
        attn_cache_bytes: int,
        block_config: PretrainedConfig,
        block_indices: Sequence[int],
        cache_dir: Optional[str],
        compression: CompressionType,
        converted_model_name_or_path: str,
        device: torch.device,
        dht: DHT,
        dht_prefix: str,
        expiration: float,
        inference_max_length: int,
        max_alloc_timeout: float,
        max_batch_size: int,
        model_info: ModelInfo,
        quant_type: QuantType,
        request_timeout: float,
        revision: Optional[str],
        server_info: ServerInfo,
        session_timeout: float,
        should_validate_reachability: bool,
        step_timeout: float,
        token: Optional[Union[str, bool]],
        torch_dtype: torch.dtype,
        update_period: float,
        **_settings_of_processes,
    ) -> ModuleContainer:
        """Announce the blocks as joining, load them, announce them as online. Nothing is left behind if that fails."""
        start, end = block_indices[0], block_indices[-1] + 1
        module_uids = [f"{dht_prefix}{UID_DELIMITER}{index}" for index in range(start, end)]
        memory_cache = MemoryCache(attn_cache_bytes, max_alloc_timeout)
        model_name, content = split_names(dht_prefix)
        server_info.protocol, server_info.content_id = PROTOCOL, content
        server_info.addresses = addresses_to_announce(dht.get_visible_maddrs(latest=True))
        server_info.state = ServerState.JOINING
        about = {"block_config": block_config, "memory_cache": memory_cache}
        pace = {"update_period": update_period, "expiration": expiration}
        announcer = ModuleAnnouncerThread(module_uids, dht, server_info, model_info, **about, **pace, daemon=True)
        announcer.dht_prefix = model_name  # under which the model is listed
        announcer.start()
        logger.info(f"Blocks {start}:{end} are joining the swarm")
        compute = ComputeThread()
        compute.start()
        try:
            source = open_model(converted_model_name_or_path, revision=revision, token=token, cache_dir=cache_dir)
            span = compute.submit(
                Span.load,
                source,
                start,
                end,
                dtype=torch_dtype,
                device=device,
                quant=quant_type.name.lower(),
                adapters=server_info.adapters,
            ).result()
            speed = compute.submit(measure_speed, span).result()
            token_bytes = span.cache_bytes_per_token
            least = max(attn_cache_bytes, least_cache_tokens(block_config) * token_bytes)
            memory_cache.total_bytes = session_budget(available_bytes(device), least, token_bytes, device)
            session_tokens = min(inference_max_length, memory_cache.total_bytes // token_bytes)
            # Upstream's clients count keys and values apart, in each block.
            announcer.bytes_per_token = max(token_bytes // (2 * span.num_blocks), 1)
            for name, value in throughput_info(speed, block_config, end - start, server_info.using_relay).items():
                setattr(server_info, name, value)
            backends = {}
            for uid, index in zip(module_uids, range(start, end)):
                backend = TransformerBackend(
                    index,
                    span=span,
                    compute=compute,
                    memory_cache=memory_cache,
                    compression=compression,
                    max_batch_size=max_batch_size,
                    session_tokens=session_tokens,
                )
                backends |= dict.fromkeys(names_of(uid), backend)
            limits = {"inference_max_length": inference_max_length, "step_timeout": step_timeout}
            limits |= {"request_timeout": request_timeout, "session_timeout": session_timeout}
            names = {
                "dht_prefix": model_name,
                "content_id": content,
                "adapters": server_info.adapters,
                "quant_type": quant_type,
            }
            handler = TransformerConnectionHandler(dht, backends, **names, **limits)
            handler.run_in_background()
            if should_validate_reachability:
                validate_reachability(dht.peer_id)
        except BaseException:
            announcer.announce(ServerState.OFFLINE)
            compute.stop()
            raise
        announcer.announce(ServerState.ONLINE)
        logger.info(
            f"Serving blocks {start}:{end} in {span.weight_bytes / 2**20:.0f} MiB of {span.device} memory, with "
            f"{memory_cache.total_bytes / 2**20:.0f} MiB for conversations of up to {session_tokens} tokens"
        )
        return cls(dht, handler, compute, announcer, f"{start}:{end}")

    def __init__(self, dht, handler, compute, announcer, blocks: str):
        self.dht, self.handler, self.compute, self.dht_announcer, self.blocks = (
            dht,
            handler,
            compute,
            announcer,
            blocks,
        )
        self.ready = threading.Event()
        self.ready.set()

    def is_healthy(self) -> bool:
        """Whether all threads that serve these blocks are alive."""
        return self.dht.is_alive() and self.compute.is_alive() and self.dht_announcer.is_alive()

    def is_alive(self) -> bool:
        return self.compute.is_alive()

    def join(self, timeout: Optional[float] = None) -> None:
        self.compute.join(timeout)

    def shutdown(self):
        """Tell the swarm that these blocks leave, stop answering, free the memory."""
        self.ready.clear()
        self.dht_announcer.announce(ServerState.OFFLINE)
        self.handler.shutdown()
        self.compute.stop()
        logger.info(f"Blocks {self.blocks} have left the swarm")

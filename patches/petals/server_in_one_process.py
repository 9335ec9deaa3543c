"""Run a node as one process: the DHT's event loop, one compute thread, and the main thread for its life cycle.

Why: ModuleContainer forks handlers, joins pools of processes and selects on their pipes ("OSError: [WinError 10038] An operation
    was attempted on something that is not a socket"), and splits blocks over devices by tensor_parallel. The thread that announces
    a node ended with the first exception, and the node left the swarm a minute later, without a word.
Status: superseded-by petals_win.node.server
Upstream-issue: none
Drop-when: never; this is upstream's name for our server.
"""

from petals_win.upstream.declare import replace_module

replace_module("petals.server.server", digest="f6cb6ac925149f45")

from dataclasses import fields

from petals_win.errors import UserError
from petals_win.node.server import Server as OwnServer
from petals_win.node.settings import ServerSettings

_OF_PROCESSES = "num_handlers prefetch_batches sender_threads min_batch_size max_chunk_size_bytes max_disk_space"


class Server(OwnServer):
    """Takes what run_server is told; options of processes, which there are none of, change nothing."""

    def __init__(self, *, quant_type=None, tensor_parallel_devices=None, custom_module_path=None, **options):
        if len(tensor_parallel_devices or ()) > 1:
            raise UserError(
                f"A node serves on one device, but {len(tensor_parallel_devices)} were given. Start one for each GPU."
            )
        if custom_module_path is not None:
            raise UserError("Blocks are those of transformers: leave --custom_module_path out.")
        for name in (*_OF_PROCESSES.split(), "stats_report_interval"):
            options.pop(name, None)
        quant = None if quant_type is None else quant_type.name.lower()
        own = {field.name: options.pop(field.name) for field in fields(ServerSettings) if field.name in options}
        super().__init__(ServerSettings(quant_type=quant, **own), **options)
        self.inference_max_length = own.get("inference_max_length")

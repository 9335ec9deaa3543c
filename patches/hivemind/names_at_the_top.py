"""Export at the top level the names that Petals takes from there; load averaging and optimizers only on demand.

Why: hivemind 1.1.12 stopped exporting PeerID, P2P, MSGPackSerializer and others at its top level
    ("ImportError: cannot import name 'PeerID' from 'hivemind'"), and its eager import of the averager costs seconds and
    scipy, which a Petals node never uses.
Status: windows-only
Upstream-issue: none
Drop-when: Petals imports these names from the modules that define them.
"""

from petals_win.upstream.declare import replace_module

replace_module("hivemind", digest="415a94db59df1010")

import importlib

from hivemind.compression import deserialize_tensor_stream, deserialize_torch_tensor, serialize_torch_tensor
from hivemind.dht import DHT
from hivemind.p2p import P2P, P2PContext, PeerID, ServicerBase
from hivemind.utils import (
    MAX_DHT_TIME_DISCREPANCY_SECONDS,
    MPFuture,
    MSGPackSerializer,
    TensorDescriptor,
    TimedStorage,
    get_dht_time,
    get_logger,
    nested_flatten,
    nested_map,
    nested_pack,
)
from hivemind.utils.asyncio import anext
from hivemind.utils.nested import nested_compare
from hivemind.utils.tensor_descr import BatchTensorDescriptor

__version__ = "1.1.12"

_ON_DEMAND = {
    "DecentralizedAverager": "hivemind.averaging",
    "GradScaler": "hivemind.optim",
    "ModuleBackend": "hivemind.moe.server.module_backend",
    "Optimizer": "hivemind.optim",
    "RemoteExpert": "hivemind.moe.client.expert",
    "RemoteMixtureOfExperts": "hivemind.moe.client.moe",
    "RemoteSwitchMixtureOfExperts": "hivemind.moe.client.switch_moe",
    "Server": "hivemind.moe.server.server",
    "TrainingAverager": "hivemind.optim",
    "register_expert_class": "hivemind.moe.server.layers",
}


def __getattr__(name):
    if name not in _ON_DEMAND:
        raise AttributeError(f"module 'hivemind' has no attribute {name!r}")
    return getattr(importlib.import_module(_ON_DEMAND[name]), name)

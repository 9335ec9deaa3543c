"""Let the packages of hivemind.moe load nothing by themselves.

Why: a node needs three small modules of hivemind.moe, but importing any of them ran the packages' eager imports: the
    expert server, its checkpoints and prefetch_generator, none of which can start on Windows
    ("AttributeError: module 'multiprocessing.context' has no attribute 'ForkProcess'").
Status: windows-only
Upstream-issue: none
Drop-when: hivemind's own expert server runs without fork.
"""

from petals_win.upstream.declare import remove_import

remove_import("hivemind.moe", "RemoteExpert")
remove_import("hivemind.moe", "RemoteMixtureOfExperts")
remove_import("hivemind.moe", "RemoteSwitchMixtureOfExperts")
remove_import("hivemind.moe", "ModuleBackend")
remove_import("hivemind.moe", "Server")
remove_import("hivemind.moe", "background_server")
remove_import("hivemind.moe", "declare_experts")
remove_import("hivemind.moe", "get_experts")
remove_import("hivemind.moe", "register_expert_class")
remove_import("hivemind.moe.client", "RemoteExpert")
remove_import("hivemind.moe.client", "RemoteMixtureOfExperts")
remove_import("hivemind.moe.client", "RemoteSwitchMixtureOfExperts")
remove_import("hivemind.moe.server", "declare_experts")
remove_import("hivemind.moe.server", "get_experts")
remove_import("hivemind.moe.server", "register_expert_class")
remove_import("hivemind.moe.server", "ModuleBackend")
remove_import("hivemind.moe.server", "Server")
remove_import("hivemind.moe.server", "background_server")

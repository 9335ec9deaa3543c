"""Drop the per-architecture models, block loading and conversion: petals_win.span serves blocks of any decoder.

Why: petals.models and its helpers are written against transformers 4.32 to 4.34 ("ImportError: cannot import name
    'get_file_from_repo' from 'transformers.utils'"), import tensor_parallel (unmaintained, no release since 2023) and
    bitsandbytes unconditionally ("ModuleNotFoundError: No module named 'bitsandbytes'"), lock files with fcntl, which
    Windows lacks, and cover three model families. Its backends, caches and pools of tasks are shared between processes, and its
    speed test asks a stranger's server.
Status: superseded-by petals_win.span
Upstream-issue: none
Drop-when: never; this is the distribution's own engine.
"""

from petals_win.upstream.declare import remove_module, remove_package

remove_package("petals.models.bloom", digest="80cfe67023c3630b")
remove_package("petals.models.falcon", digest="eb9feed1c02774ac")
remove_package("petals.models.llama", digest="9f655cfc10c767b6")
remove_module("petals.client.from_pretrained", digest="6e5fcb0d78ac7c7d")
remove_module("petals.client.lm_head", digest="2103b977b157927f")
remove_module("petals.server.from_pretrained", digest="a4fd97766c092a96")
remove_module("petals.server.task_pool", digest="23adb24acc5c309a")
remove_module("petals.utils.cuda_graphs", digest="0c6b27f3651af9cb")
remove_module("petals.utils.disk_cache", digest="d8c16690e955eb30")
remove_module("petals.utils.peft", digest="6838f27d780bcaa9")
remove_module("petals.server.backend", digest="13a446726d49bcea")
remove_module("petals.server.block_functions", digest="61aba022009e4cbd")
remove_module("petals.server.block_utils", digest="545a28888250d1bd")
remove_module("petals.server.memory_cache", digest="f1dbfb4c2286adf7")
remove_module("petals.server.task_prioritizer", digest="a01dc0c7a2db34a7")
remove_module("petals.server.throughput", digest="dc8d560bbe8cf4e5")

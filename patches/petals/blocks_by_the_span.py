"""Drop the per-architecture models, block loading and conversion: petals_win.span serves blocks of any decoder.

Why: petals.models and its helpers are written against transformers 4.32 to 4.34 ("ImportError: cannot import name
    'get_file_from_repo' from 'transformers.utils'"), import tensor_parallel (unmaintained, no release since 2023) and
    bitsandbytes unconditionally ("ModuleNotFoundError: No module named 'bitsandbytes'"), lock files with fcntl, which
    Windows lacks, and cover three model families.
Status: superseded-by petals_win.span
Upstream-issue: none
Drop-when: never; this is the distribution's own engine.
"""

from petals_win.upstream.declare import remove_module, remove_package

remove_package("petals.models.bloom", digest="?")
remove_package("petals.models.falcon", digest="?")
remove_package("petals.models.llama", digest="?")
remove_module("petals.client.from_pretrained", digest="?")
remove_module("petals.client.lm_head", digest="?")
remove_module("petals.server.from_pretrained", digest="?")
remove_module("petals.server.task_pool", digest="?")
remove_module("petals.utils.cuda_graphs", digest="?")
remove_module("petals.utils.disk_cache", digest="?")
remove_module("petals.utils.peft", digest="?")

"""Generate by transformers' own generate(), with a cache that stands for the session's KV caches on the servers.

Why: the mixin hooks into prepare_inputs_for_generation() and _reorder_cache() as they were in transformers 4.32; transformers 5
    slices inputs by the cache's length and reorders beams through the cache object ("TypeError: generate() got … past_key_values").
Status: superseded-by petals_win.client.generation
Upstream-issue: none
Drop-when: upstream follows current transformers.
"""

from petals_win.upstream.declare import replace_module

replace_module("petals.client.remote_generation", digest="20b067650ecf8f82")

from petals_win.client.generation import RemoteGenerationMixin  # noqa: F401

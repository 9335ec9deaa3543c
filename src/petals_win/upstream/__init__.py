"""Upstream's sources: pinned, fetched by hash, patched, written to external/. Build-time only.

Knows how a patch is applied. Does not know what the patches are about.
"""

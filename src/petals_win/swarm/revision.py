"""Whether a swarm serves the same content as this PC has, or another under the same name.

Knows the records of naming.py. Does not know models.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from typing import Any

from petals.utils.dht import _get_remote_module_infos

from petals_win.errors import UserError
from petals_win.swarm.naming import MODELS, split_names

logger = logging.getLogger(__name__)


class OtherRevision(UserError):
    """The swarm serves a model of this name, but with another content."""


def check_content(dht: Any, prefix: str) -> None:
    """Raise OtherRevision if no node of the swarm has the content of `prefix`, but some have another of this name. Blocks.

    Names are the same in any case. Nodes of older versions and of upstream do not tell their content and do not count.
    """
    name, content = split_names(prefix)
    if content is None:
        return
    others = {
        other: theirs for theirs, other in _listed(dht) if theirs.casefold() == name.casefold() and other != content
    }
    if not others:
        return
    ours, *counts = _online(dht, [content, *others])
    served = [f"{others[other]} ({other})" for other, count in zip(others, counts, strict=True) if count]
    if not served:
        return
    told = f"The swarm serves {' and '.join(served)}, this PC has {name} ({content}): another revision or file format."
    if not ours:
        raise OtherRevision(
            f"{told} Together they would answer nonsense. Put the same files on all PCs, or start a swarm of its own for this one: "
            "petals-win serve --fresh, without --peers."
        )
    logger.warning("%s Nodes of the other are left out.", told)


def _listed(dht: Any) -> list[tuple[str, str]]:
    """Name and content of every model that nodes of the swarm announce, or announced a minute ago."""
    found = dht.get(MODELS, latest=True)
    prefixes = found.value if found is not None and isinstance(found.value, dict) else ()
    names = [split_names(prefix) for prefix in prefixes if isinstance(prefix, str)]
    return [(name, content) for name, content in names if content is not None]


def _online(dht: Any, contents: Sequence[str]) -> list[int]:
    """How many nodes serve each content, or are loading it."""
    keys = list(contents)
    look_up = partial(_get_remote_module_infos, uids=keys, active_adapter=None, expiration_time=None, latest=True)
    return [sum(info.state.value > 0 for info in found.servers.values()) for found in dht.run_coroutine(look_up)]

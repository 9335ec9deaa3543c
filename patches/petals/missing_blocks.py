"""Name the blocks that nobody serves in a sentence for the user's own swarm.

Why: the error sends every user to the health page of the public swarm, which knows nothing of a private one.
Status: pending
Upstream-issue: none
Drop-when: upstream's message does not assume the public swarm.
"""

from petals_win.upstream.declare import replace


@replace("petals.client.routing.sequence_manager:MissingBlocksError", digest="ee52e12377b85925")
class MissingBlocksError(RuntimeError):
    """No server that is online holds `block_indices`."""

    def __init__(self, block_indices: Union[int, Sequence[int]]):
        self.block_indices = [block_indices] if isinstance(block_indices, int) else list(block_indices)
        super().__init__(f"No server of the swarm holds the blocks {self.block_indices} now")

"""Keep the names of the quantization types and nothing that needs bitsandbytes or tensor_parallel.

Why: petals.utils.convert_block imports both at the top ("ModuleNotFoundError: No module named 'tensor_parallel'"), though a
    node needs only the enumeration that it announces to the swarm.
Status: superseded-by petals_win.span
Upstream-issue: none
Drop-when: never; conversion belongs to the span.
"""

from petals_win.upstream.declare import replace_module

replace_module("petals.utils.convert_block", digest="da54385bda420fbf")

from enum import Enum


class QuantType(Enum):
    """How a node stores its weights; the lower-case name is what it announces."""

    NONE = 0
    INT8 = 1
    NF4 = 2
    INT4 = 3

"""Import Petals with the transformers of today.

Why: the package asserts transformers < 4.35 at import ("AssertionError: Please install a proper transformers version") and
    sets environment variables for forking on macOS; nothing here forks.
Status: superseded-by petals_win.span
Upstream-issue: none
Drop-when: upstream follows current transformers.
"""

from petals_win.upstream.declare import replace_module

replace_module("petals", digest="ca9402e79eb1daf4")

import hivemind.compression.base

from petals.client import *
from petals.models import *
from petals.utils import *
from petals.utils.logging import initialize_logs

__version__ = "2.2.0.post1"

initialize_logs()
# bfloat16 travels as bfloat16: upstream Petals switches hivemind's older encoding off in the same way.
hivemind.compression.base.USE_LEGACY_BFLOAT16 = False

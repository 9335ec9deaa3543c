"""The process that builds a model for ONNX Runtime, by ONNX Runtime GenAI's own builder: `python -m` this, started by onnx_conversion.

Knows the builder's functions. A process of its own, since the builder has the whole model in memory and ends in many ways.
"""

from __future__ import annotations

import importlib
import sys

from petals_win.host.children import exit_with_parent

UNKNOWN = "petals-win-unknown-architecture"  # a line that says so, and nothing else has failed
FAILED = "petals-win-failed: "  # the beginning of a line that says why


def main() -> int:
    """The arguments are the folder of the model's plain files, the one to be made, precision, device and one for scratch."""
    exit_with_parent()
    source, made, precision, device, scratch = sys.argv[1:]
    try:
        builder = importlib.import_module("onnxruntime_genai.models.builder")
        # Only the last token's logits are wanted, and those of a whole prompt would take more memory than the model.
        options = builder.parse_extra_options(source, source, made, precision, device, scratch, ["prune_lm_head=true"])
        builder.create_model(source, source, made, precision, device, scratch, **options)
    except NotImplementedError:
        print(UNKNOWN)
        return 1
    except Exception as e:  # whatever it is, this process is there for it alone
        print(FAILED + " ".join(f"{type(e).__name__}: {e}".split()))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

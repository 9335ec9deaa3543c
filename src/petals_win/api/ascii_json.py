"""JSON that every client reads rightly. Knows how text is written into a body; not what it says."""

from __future__ import annotations

import json
from typing import Any

from starlette.responses import JSONResponse


class AsciiJson(JSONResponse):
    """A JSON body in ASCII, with escapes for all other characters.

    Windows PowerShell 5.1 reads "application/json" as Latin-1, and JSON has no charset that could tell it otherwise.
    """

    def render(self, content: Any) -> bytes:
        return json.dumps(content, ensure_ascii=True, allow_nan=False, separators=(",", ":")).encode("ascii")

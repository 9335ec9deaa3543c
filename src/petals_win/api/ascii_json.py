"""JSON that every client reads rightly. Knows how text is written into a body; not what it says."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from starlette.responses import JSONResponse


class AsciiJson(JSONResponse):
    """A JSON body in ASCII, with escapes for all other characters, that says it were UTF-8, as ASCII is.

    Windows PowerShell 5.1 reads JSON as Latin-1 unless it names a charset, and some of what stands between drops it.
    """

    def init_headers(self, headers: Mapping[str, str] | None = None) -> None:
        # Not as the class's media type, which is the one in /openapi.json.
        super().init_headers({**(headers or {}), "content-type": "application/json; charset=utf-8"})

    def render(self, content: Any) -> bytes:
        return json.dumps(content, ensure_ascii=True, allow_nan=False, separators=(",", ":")).encode("ascii")

"""What the bodies of all dialects but OpenAI's have in common. Knows how fields are left out, ignored and refused; not which."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, model_validator

from petals_win.api.documented import null_is_left_out
from petals_win.api.errors import ApiError
from petals_win.api.schemas import name_once


class Body(BaseModel):
    """A request, or a part of one. A field that is null counts as left out.

    `ignored` are fields that say nothing about the text of an answer; what is not known at all is ignored, too, and
    named in the log. `refused` are fields that would change what an answer means: each with what to do without them.
    """

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False, json_schema_extra=null_is_left_out)

    ignored: ClassVar[frozenset[str]] = frozenset()
    refused: ClassVar[Mapping[str, str]] = {}

    @model_validator(mode="before")
    @classmethod
    def _sort_out(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        given: dict[str, Any] = {}
        for name, value in data.items():
            if value is None or name in cls.ignored:
                continue
            if name in cls.model_fields:
                given[name] = value
            elif name not in cls.refused:
                name_once(name)
            elif value:
                raise ApiError(
                    400, f"{name} is not supported here. {cls.refused[name]}", code="unsupported", param=name
                )
        return given

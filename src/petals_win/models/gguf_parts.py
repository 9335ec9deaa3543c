"""The files of a model that llama.cpp's gguf-split cut into parts, such as `model-00001-of-00003.gguf`.

Knows how such files are named. Does not know what is in them.
"""

from __future__ import annotations

import re
from pathlib import Path

from petals_win.errors import UserError

_PART = re.compile(r"(?P<name>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})", re.DOTALL)


def name_of_model(path: Path) -> str:
    """The file's name without its ending and without the number of a part."""
    part = _PART.fullmatch(path.stem)
    return part["name"] if part else path.stem


def parts_of(path: Path) -> list[Path]:
    """All files of the model whose first file is `path`; that one alone if its name has no number of a part.

    Raises UserError if `path` is a later part, or parts are missing, with their names.
    """
    part = _PART.fullmatch(path.stem)
    if part is None:
        return [path]
    count = int(part["count"])
    first = path.with_name(f"{part['name']}-00001-of-{part['count']}{path.suffix}")
    if int(part["number"]) != 1:
        raise UserError(f"{path.name} is a later one of the {count} parts of a model. Name the first one: {first}")
    names = (f"{part['name']}-{number:05}-of-{part['count']}{path.suffix}" for number in range(1, count + 1))
    parts = [path.with_name(name) for name in names]
    missing = [file.name for file in parts if not file.is_file()]
    if missing:
        others = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise UserError(
            f"{path.name} is one of the {count} parts of a model, of which {path.parent} lacks {', '.join(missing[:3])}{others}. "
            "Download them into this folder."
        )
    return parts

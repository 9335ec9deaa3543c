"""Who changes what: no two declarations may change the same thing. Knows names only, no text."""

from __future__ import annotations

from collections.abc import Sequence

from petals_win.upstream.patchfile import Declaration


class Claims:
    """Claims are paths that lead from folders and files on into symbols; one covers all that lies below it."""

    def __init__(self) -> None:
        self._owners: dict[tuple[str, ...], str] = {}

    def add(self, declaration: Declaration, path: Sequence[str], shared: bool = False) -> None:
        """Raises PatchError if this or a part of it is claimed. shared: not by the same patch claiming the same again."""
        claimed = tuple(path)
        for other, owner in self._owners.items():
            common = min(len(other), len(claimed))
            if other[:common] != claimed[:common] or (shared and other == claimed and owner == declaration.patch):
                continue
            whose = "this patch changes it twice" if owner == declaration.patch else f"{owner} changes it too"
            raise declaration.refusal(f"{whose} ({'/'.join(other)}). Let one declaration make the whole change.")
        self._owners[claimed] = declaration.patch

    def patches_in(self, file: str) -> list[str]:
        """The patches that change a file ("package/module.py") or something in it, each once."""
        parts = tuple(file.split("/"))
        owners = [owner for path, owner in self._owners.items() if path[: len(parts)] == parts]
        return list(dict.fromkeys(owners))

"""Hatchling's hook: the patched upstream packages become part of the wheel. Knows where they go; `build` makes them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class UpstreamHook(BuildHookInterface):
    """Runs for the wheel only: the sdist carries lock and patches instead."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        sys.path.insert(0, str(Path(self.root) / "src"))
        from petals_win.errors import UserError
        from petals_win.upstream.build import LICENCE, Checkout, build

        checkout = Checkout(Path(self.root))
        try:
            build(checkout)
        except UserError as e:
            sys.exit(f"petals-win: {e}")
        if version == "editable":
            return  # the import roots in external/ are on the path, see dev-mode-dirs in pyproject.toml
        for pin in checkout.pins():
            import_root = checkout.external / pin.folder
            build_data["force_include"][str(import_root / pin.name)] = pin.name
            build_data["force_include"][str(import_root / LICENCE)] = f"petals_win/licences/{pin.name}.txt"

"""Hatchling's hook: the patched upstream packages, p2pd and the kernels become part of the wheel.

Knows where they go; `build` in `petals_win.upstream`, `.daemon` and `.kernels` makes them.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class UpstreamHook(BuildHookInterface):
    """Runs for the wheel only: the sdist carries lock, patches and the daemon's source instead."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        logging.basicConfig(level=logging.INFO, format="%(message)s")
        sys.path.insert(0, str(Path(self.root) / "src"))
        from petals_win.daemon import build as p2pd
        from petals_win.errors import UserError
        from petals_win.kernels import build as kernels
        from petals_win.upstream.build import LICENCE, Checkout, build

        checkout = Checkout(Path(self.root))
        try:
            build(checkout)
            if version == "editable":
                # The import roots in external/ are on the path, see dev-mode-dirs in pyproject.toml.
                p2pd.put_into_bin()
                kernels.put_into_bin()
                return
            target = p2pd.wheel_target()
            program, libraries = p2pd.build_if_changed(target), kernels.build_if_changed(target)
        except UserError as e:
            sys.exit(f"petals-win: {e}")
        for pin in checkout.pins():
            import_root = checkout.external / pin.folder
            build_data["force_include"][str(import_root / pin.name)] = pin.name
            build_data["force_include"][str(import_root / LICENCE)] = f"petals_win/licences/{pin.name}.txt"
        build_data["force_include"][str(program)] = f"petals_win/daemon/bin/{program.name}"
        for library in libraries:
            build_data["force_include"][str(library)] = f"petals_win/kernels/bin/{library.name}"
        build_data["tag"] = p2pd.wheel_tag(target)
        build_data["pure_python"] = False

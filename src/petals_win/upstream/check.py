"""Whether patches, generated trees and the register agree, and whether the result can be imported.

Knows what must hold. Does not repair anything.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from petals_win.errors import UserError
from petals_win.upstream.build import Checkout, is_up_to_date, read_trees, write_trees
from petals_win.upstream.patchfile import read_series
from petals_win.upstream.report import table_is_current

_IMPORT_DEADLINE_S = 300


def check(checkout: Checkout) -> Iterator[str]:
    """Yields one sentence for all that holds, one after another. Raises UserError at the first thing that does not."""
    patches = read_series(checkout.patches)
    yield f"{len(patches)} patches: series and headers are complete"
    trees = _build_twice(checkout)
    yield f"every patch applies, and two builds give the same {len(trees)} files"
    if not is_up_to_date(checkout) or read_trees(checkout, checkout.external) != trees:
        raise UserError(f"The trees in {checkout.external} are out of date. Run: petals-win patches build --force")
    yield "the trees in external/ are what the patches make"
    if not table_is_current(checkout.register, patches):
        raise UserError(f"The table in {checkout.register} is out of date. Run: petals-win patches table --write")
    yield f"the table in {checkout.register.name} shows these patches"
    modules = [pin.name for pin in checkout.pins()]
    _import(checkout, modules)
    yield f"{' and '.join(modules)} can be imported"


def _build_twice(checkout: Checkout) -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as temporary:
        first, second = Path(temporary) / "first", Path(temporary) / "second"
        for folder in (first, second):
            write_trees(checkout, folder)
        trees, again = read_trees(checkout, first), read_trees(checkout, second)
    differing = sorted(path for path in {*trees, *again} if trees.get(path) != again.get(path))
    if differing:
        raise UserError(
            f"Two builds of the same patches differ in {', '.join(differing)}. This is a bug of the applier."
        )
    return trees


def _import(checkout: Checkout, modules: list[str]) -> None:
    """In a process of its own: a half-imported package would stay in this one."""
    folders = [str(checkout.external / pin.folder) for pin in checkout.pins()]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([*folders, str(checkout.root / "src")])}
    command = [sys.executable, "-c", f"import {', '.join(modules)}"]
    try:
        result = subprocess.run(
            command,
            env=environment,
            cwd=checkout.root,
            capture_output=True,
            text=True,
            errors="replace",
            stdin=subprocess.DEVNULL,
            timeout=_IMPORT_DEADLINE_S,
        )
    except subprocess.TimeoutExpired as e:
        raise UserError(f"Importing {' and '.join(modules)} took over {_IMPORT_DEADLINE_S} s and was stopped.") from e
    if result.returncode:
        lines = result.stderr.strip().splitlines() or [f"exit code {result.returncode}"]
        raise UserError(
            f"The patched packages cannot be imported: {lines[-1]}. To see where, run: {' '.join(command)}"
        )

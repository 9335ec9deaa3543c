"""A made-up checkout: two small upstream packages in wheels, patches on them, and a cache that has the wheels."""

from __future__ import annotations

import hashlib
import json
import textwrap
import zipfile
from pathlib import Path

from petals_win.upstream.build import Checkout
from petals_win.upstream.fill import fill_digests

HEADER = '''"""Change something.

Why: it fails on Windows
Status: windows-only
Upstream-issue: none
Drop-when: never
"""
'''
DECLARE = """from petals_win.upstream.declare import (
    add, add_import, add_module, bases, redirect_import, remove, remove_import, remove_module, remove_package, replace,
    replace_module, set_value, swap_call,
)
"""


class Project:
    """Its upstream files can be changed until they are asked for, which packs them into wheels."""

    def __init__(self, root: Path):
        self.root = root
        self.checkout = Checkout(root, cache=root / "cache")
        self.files: dict[str, bytes] = {"alpha/__init__.py": b"", "beta/__init__.py": b"BETA = 1\n"}
        self.daemon = b"\x7fELF of the made-up daemon"
        (root / "patches").mkdir()
        (root / "external").mkdir()
        self.series: list[str] = []

    def upstream(self, path: str, text: str) -> None:
        self.files[path] = textwrap.dedent(text).lstrip("\n").encode()

    def patch(self, name: str, body: str, *, header: str = HEADER, listed: bool = True, fill: bool = True) -> Path:
        """Write a patch with its digests filled in as upstream is now, and list it."""
        path = self.root / "patches" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes((header + "\n" + DECLARE + "\n" + textwrap.dedent(body)).encode())
        if listed:
            self.series.append(name)
        self.write_series()
        if fill:
            self.pack()
            fill_digests(path, self.checkout.patches, self.checkout.upstream_files())
        return path

    def write_series(self) -> None:
        text = "".join(f"{line}\n" for line in ["# in this order", *self.series])
        (self.root / "patches" / "series").write_text(text, encoding="utf-8")

    def pack(self) -> None:
        """Write the wheels and the lock."""
        pins = []
        for name in ("alpha", "beta"):
            wheel = self.root / f"{name}-1.0-py3-none-any.whl"
            with zipfile.ZipFile(wheel, "w") as archive:
                for path, content in self.files.items():
                    if path.startswith(f"{name}/"):
                        archive.writestr(zipfile.ZipInfo(path), content)
                archive.writestr(zipfile.ZipInfo(f"{name}-1.0.dist-info/LICENSE"), f"the licence of {name}\n")
                archive.writestr(
                    zipfile.ZipInfo(f"{name}-1.0.dist-info/METADATA"),
                    f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n",
                )
                archive.writestr(
                    zipfile.ZipInfo(f"{name}-1.0.dist-info/WHEEL"),
                    "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
                )
                archive.writestr(zipfile.ZipInfo(f"{name}-1.0.dist-info/RECORD"), "")
                if name == "beta":
                    archive.writestr(zipfile.ZipInfo("beta/tools/daemon"), self.daemon)
            content = wheel.read_bytes()
            sha256 = hashlib.sha256(content).hexdigest()
            cached = self.root / "cache" / sha256 / wheel.name
            cached.parent.mkdir(parents=True, exist_ok=True)
            cached.write_bytes(content)
            pins.append(
                {
                    "name": name,
                    "version": "1.0",
                    "filename": wheel.name,
                    "sha256": sha256,
                    "bytes": len(content),
                    "licence": "MIT",
                    "origin": "the test",
                    "folder": {"alpha": "alpha-main", "beta": "beta"}[name],
                    "licence_file": f"{name}-1.0.dist-info/LICENSE",
                    "daemon": "beta/tools/daemon" if name == "beta" else None,
                }
            )
        (self.root / "external" / "upstream.lock").write_text(json.dumps({"upstream": pins}), encoding="utf-8")

    def patched(self) -> dict[str, str]:
        """All files after all patches, as text with the newlines that they have."""
        self.pack()
        return {path: content.decode() for path, content in self.checkout.patched_files().items()}

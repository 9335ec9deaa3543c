"""The generated trees external/<folder>/<package>: made from lock and patches, complete or not at all.

Knows wheels as archives and the file system. Does not know what a patch says.
"""

from __future__ import annotations

import compileall
import hashlib
import logging
import os
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from petals_win.errors import UserError
from petals_win.upstream.fetch import cache_folder, fetch
from petals_win.upstream.lock import Pin, read_lock

logger = logging.getLogger(__name__)

_STAMP = ".built-from"
LICENCE = "LICENSE"


@dataclass(frozen=True)
class Checkout:
    """The folders of one checkout. cache: where wheels are kept; None is the user's own."""

    root: Path
    cache: Path | None = None

    @property
    def external(self) -> Path:
        return self.root / "external"

    @property
    def patches(self) -> Path:
        return self.root / "patches"

    @property
    def register(self) -> Path:
        return self.root / "windows_patches.md"

    def pins(self) -> tuple[Pin, ...]:
        return read_lock(self.external / "upstream.lock")

    def wheel(self, pin: Pin) -> Path:
        """Raises UserError if it is not in the cache and cannot be fetched."""
        return fetch(pin, self.cache or cache_folder())

    def upstream_files(self) -> dict[str, bytes]:
        """Upstream as it is: the files of all packages, without the daemon."""
        files: dict[str, bytes] = {}
        for pin in self.pins():
            with zipfile.ZipFile(self.wheel(pin)) as archive:
                names = [name for name in archive.namelist() if name.startswith(f"{pin.name}/")]
                files.update((name, archive.read(name)) for name in names if name != pin.daemon and name[-1] != "/")
        return files

    def patched_files(self) -> dict[str, bytes]:
        """Upstream with all patches. Raises PatchError."""
        # LibCST takes a third of a second to import; a build that is up to date does without.
        from petals_win.upstream.apply import apply_patches
        from petals_win.upstream.patchfile import read_series

        return apply_patches(read_series(self.patches), self.upstream_files())


def this_checkout() -> Checkout:
    """The checkout that this very file lies in. Raises UserError in an installed package."""
    root = Path(__file__).resolve().parents[3]
    if not (root / "external" / "upstream.lock").is_file():
        raise UserError("Patches are applied in a checkout of petals-win; this is an installed package.")
    return Checkout(root)


def build(checkout: Checkout, *, force: bool = False) -> bool:
    """Generate the trees; False if they were up to date. Raises UserError; then the old trees are still there."""
    pins = checkout.pins()
    stale = force or not is_up_to_date(checkout)
    if stale:
        workshop = checkout.root / "build"  # on the same file system as external/, so that finished trees can be moved
        workshop.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="upstream-", dir=workshop) as temporary:
            write_trees(checkout, Path(temporary) / "new")
            _swap([pin.folder for pin in pins], Path(temporary), checkout.external)
        for pin in pins:
            compileall.compile_dir(checkout.external / pin.folder / pin.name, quiet=2)  # else each first start does it
        logger.info("Wrote %s", " and ".join(str(checkout.external / pin.folder / pin.name) for pin in pins))
    return stale


def is_up_to_date(checkout: Checkout) -> bool:
    """Whether the trees were made from the lock, patches and applier that are here now."""
    stamp = _stamp(checkout)
    return all(_stamped(checkout.external / pin.folder) == stamp for pin in checkout.pins())


def write_trees(checkout: Checkout, folder: Path) -> None:
    """Write what belongs into external/ to an empty folder. Raises UserError before anything is written."""
    files, stamp = checkout.patched_files(), _stamp(checkout)
    for pin in checkout.pins():
        import_root = folder / pin.folder
        for name in sorted(name for name in files if name.startswith(f"{pin.name}/")):
            path = import_root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(files[name])
        with zipfile.ZipFile(checkout.wheel(pin)) as archive:
            (import_root / LICENCE).write_bytes(archive.read(pin.licence_file))
        (import_root / _STAMP).write_text(stamp, encoding="utf-8")


def read_trees(checkout: Checkout, folder: Path) -> dict[str, bytes]:
    """All files of trees in such a folder by their paths, without what Python leaves there when it runs them."""
    roots = [folder / pin.folder for pin in checkout.pins()]
    paths = sorted(path for root in roots for path in root.rglob("*") if path.is_file() and path.suffix != ".pyc")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def extract_daemon(checkout: Checkout, target: Path) -> None:
    """Write the daemon for Linux on x86_64 that is in upstream's wheel to a file: the tests' reference for ours."""
    pin = next(pin for pin in checkout.pins() if pin.daemon is not None)
    assert pin.daemon is not None
    with zipfile.ZipFile(checkout.wheel(pin)) as archive:
        target.write_bytes(archive.read(pin.daemon))
    target.chmod(0o755)


def _swap(folders: Sequence[str], temporary: Path, external: Path) -> None:
    """Move the new trees in and the old ones out. If one of them cannot be moved, all old ones come back."""
    moved: list[tuple[Path, Path]] = []
    (temporary / "old").mkdir()
    try:
        for folder in folders:
            new, old, place = temporary / "new" / folder, temporary / "old" / folder, external / folder
            if place.exists():
                os.replace(place, old)
                moved.append((old, place))
            os.replace(new, place)
            moved.append((place, new))
    except OSError as e:
        for now, before in reversed(moved):
            os.replace(now, before)
        raise UserError(
            f"{external} cannot be changed ({e.strerror}). Stop what runs from there (petals-win up, serve) and try again."
        ) from e


def _stamped(folder: Path) -> str | None:
    try:
        return (folder / _STAMP).read_text(encoding="utf-8")
    except OSError:
        return None


def _stamp(checkout: Checkout) -> str:
    """A digest of all that the trees are made from: lock, patches and this applier."""
    sources = [checkout.external / "upstream.lock", checkout.patches / "series", *checkout.patches.rglob("*.py")]
    sources += Path(__file__).parent.glob("*.py")
    sha = hashlib.sha256()
    for path in sorted(sources):
        try:
            content = path.read_bytes()
        except OSError as e:
            raise UserError(f"{path} cannot be read ({e.strerror}). Restore it from version control.") from e
        sha.update(f"{'/'.join(path.parts[-2:])}\0{len(content)}\0".encode() + content)
    return sha.hexdigest()

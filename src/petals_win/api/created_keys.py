"""Keys that `petals-win key` makes: kept in this user's data folder by their hashes, and read again when they change.

A key has 256 random bits, so that a plain SHA-256 of it can be kept: there is nothing to guess it from. Knows the file and
its lock. Does not know HTTP, and not how limits are kept.

    data folder / api / keys.json       a list of CreatedKey
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from pydantic import Field, TypeAdapter, ValidationError

from petals_win.errors import UserError
from petals_win.host.folders import data_folder, private_folder, write_private
from petals_win.host.locks import hold_lock

logger = logging.getLogger(__name__)

_FRESH_S = 1.0
_LOCK_S = 10.0
_Limit = Annotated[int, Field(ge=1)]
_NAME = re.compile(r"\w[\w.@-]{0,63}")


@dataclass(frozen=True)
class CreatedKey:
    """A key without the key: its name, its hash (SHA-256, hexadecimal), when it was made (Unix time, s).

    requests_per_minute, tokens_per_minute: what whoever sends it may ask for, prompts and answers counted together; None is
    as much as they like.
    """

    name: str
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] = field(repr=False)
    created: int
    requests_per_minute: _Limit | None = None
    tokens_per_minute: _Limit | None = None


_LIST = TypeAdapter(list[CreatedKey])


class CreatedKeys:
    """The keys in a file. What another process changes counts a second later."""

    def __init__(self, folder: Path | None = None):
        """`folder` is that in this user's data folder unless given. Raises UserError for a damaged file."""
        self._folder = folder or data_folder() / "api"
        self._keys = self._read()
        self._read_at = time.monotonic()
        self._warned = ""

    def all(self) -> list[CreatedKey]:
        """The keys that are valid now, in the order in which they were made.

        While the file is damaged or cannot be read, those that were read last; none when it is gone.
        """
        if time.monotonic() - self._read_at >= _FRESH_S:
            self._read_at = time.monotonic()
            try:
                self._keys, problem = self._read(), ""
            except UserError as error:
                problem = f"{error} The keys that were read before stay valid."
            if problem and problem != self._warned:
                logger.warning(problem)
            self._warned = problem
        return self._keys

    def find(self, given: bytes) -> CreatedKey | None:
        """The key that was sent, if it is one."""
        digest = hashlib.sha256(given).hexdigest().encode()
        # Every key is compared, so that the time taken does not tell which one was nearly right.
        found = [key for key in self.all() if hmac.compare_digest(digest, key.sha256.encode())]
        return found[0] if found else None

    def create(
        self, name: str, *, requests_per_minute: int | None = None, tokens_per_minute: int | None = None
    ) -> str:
        """Make a key and return it: it is kept nowhere. Raises UserError for a name that is taken or none."""
        if not _NAME.fullmatch(name):
            raise UserError(f"{name!r} cannot be the name of a key. Take letters, digits and . _ - @, at most 64.")
        key = f"pw-{secrets.token_urlsafe(32)}"
        digest = hashlib.sha256(key.encode()).hexdigest()
        with self._changing() as keys:
            if any(key.name == name for key in keys):
                raise UserError(
                    f"There is a key {name!r} already. Take another name, or 'petals-win key revoke {name}'."
                )
            keys.append(CreatedKey(name, digest, int(time.time()), requests_per_minute, tokens_per_minute))
        return key

    def revoke(self, name: str) -> None:
        """Make a key invalid. Raises UserError if there is none of this name."""
        with self._changing() as keys:
            left = [key for key in keys if key.name != name]
            if len(left) == len(keys):
                raise UserError(f"There is no key {name!r}. 'petals-win key list' shows what there is.")
            keys[:] = left

    @contextmanager
    def _changing(self) -> Iterator[list[CreatedKey]]:
        """The keys as they are, to be changed in a with block by nobody else; written if it ends well."""
        try:
            private_folder(self._folder)
            with hold_lock(self._folder / "keys.lock", "a change of the API's keys", _LOCK_S):
                keys = self._read()
                yield keys
                write_private(self._file, _LIST.dump_json(keys, indent=1))
                self._keys = keys
        except OSError as error:
            raise UserError(
                f"The keys cannot be kept in {self._folder}: {error.strerror}. Make room there, or set PETALS_WIN_HOME "
                "to a folder that you can write to."
            ) from error

    @property
    def _file(self) -> Path:
        return self._folder / "keys.json"

    def _read(self) -> list[CreatedKey]:
        try:
            return _LIST.validate_json(self._file.read_bytes(), strict=True)
        except FileNotFoundError:
            return []
        except OSError as error:
            raise UserError(f"The keys in {self._file} cannot be read: {error.strerror}.") from error
        except ValidationError as error:
            raise UserError(
                f"{self._file} is damaged. Delete it, and make keys anew with 'petals-win key create'."
            ) from error

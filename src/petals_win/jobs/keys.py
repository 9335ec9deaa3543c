"""What workers and APIs know each other by: one key that they share, and what each worker proves by a secret of its own.

Knows files and keys. Does not know who connects, nor how.

    data folder / worker / key                  the shared key: one line of text, to be copied to the other PCs
    data folder / worker / cert.pem, key.pem    the certificate by which a worker is known over gRPC
    data folder / worker / curve.key            the private key by which it is known over ZeroMQ, 32 bytes
"""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from petals_win.errors import UserError
from petals_win.host.folders import data_folder, private_folder, write_private
from petals_win.host.locks import hold_lock
from petals_win.host.tls import Tls, self_signed

_KEY = re.compile(r"[!-~]{20,512}")
_CURVE_BYTES = 32
_OTHERS_S = 30.0


def default_key_file() -> Path:
    """Where the shared key is unless another file is named."""
    return data_folder() / "worker" / "key"


def shared_key(file: Path | None, *, make: bool) -> str:
    """The key that workers and APIs share.

    :param file: None is the one in the data folder
    :param make: whether one is made there if there is none; a file that was named has to be there
    Raises UserError if there is none, or what is there is no key.
    """
    named, file = file is not None, file or default_key_file()
    try:
        if make and not named:
            with _first_use(file.parent):
                if not file.exists():
                    write_private(file, (secrets.token_urlsafe(32) + "\n").encode())
        key = file.read_text(encoding="utf-8-sig").strip()
    except FileNotFoundError as e:
        raise UserError(
            f"The key of the workers is not there: {file}. Copy it from the PC of a worker, which prints where it has it, and name the "
            "copy, if it is elsewhere, with the option for it."
        ) from e
    except (OSError, UnicodeDecodeError) as e:
        reason = e.strerror if isinstance(e, OSError) else "it is no text"
        raise UserError(f"The key file {file} cannot be read: {reason}.") from e
    if not _KEY.fullmatch(key):
        raise UserError(
            f"{file} holds no key of workers: that is one line of 20 to 512 ASCII letters, digits and signs."
        )
    return key


@contextmanager
def _first_use(folder: Path) -> Iterator[None]:
    """One at a time: workers that start together make what there is to be made only once."""
    private_folder(folder)
    with hold_lock(folder / "lock", "the making of a worker's keys", timeout=_OTHERS_S):
        yield


@dataclass(frozen=True)
class OwnSecrets:
    """A worker's: the shared key, and the folder of what it proves itself by, which is made at first use."""

    key: str
    folder: Path

    @classmethod
    def kept(cls, key: str) -> OwnSecrets:
        """Those of this PC."""
        return cls(key, data_folder() / "worker")

    @cached_property
    def tls(self) -> Tls:
        """Raises UserError if it cannot be kept."""
        with _first_use(self.folder):
            return self_signed(self.folder)

    @cached_property
    def curve(self) -> bytes:
        """The private key of CURVE. Raises UserError if it cannot be kept."""
        file = self.folder / "curve.key"
        try:
            with _first_use(self.folder):
                if not file.exists():
                    write_private(file, secrets.token_bytes(_CURVE_BYTES))
            private = file.read_bytes()
        except OSError as e:
            raise UserError(f"The worker's own key cannot be kept in {file}: {e.strerror}. Make room there.") from e
        if len(private) != _CURVE_BYTES:
            raise UserError(f"{file} is damaged. Delete it; the worker then has another fingerprint.")
        return private

    def pin(self, scheme: str) -> str:
        """What this worker is known by."""
        return self.tls.fingerprint.replace(":", "").lower() if scheme == "grpc" else curve_public(self.curve).hex()


def curve_of_callers(key: str) -> bytes:
    """The private key of CURVE that all have who know the shared key."""
    return hashlib.blake2b(key.encode(), digest_size=_CURVE_BYTES, person=b"petals-win jobs").digest()


def curve_public(private: bytes) -> bytes:
    """The public key of CURVE that belongs to a private one."""
    raw = serialization.Encoding.Raw, serialization.PublicFormat.Raw
    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes(*raw)

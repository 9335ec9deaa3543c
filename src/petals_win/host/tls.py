"""Certificates for HTTPS: the user's own, or one that signs itself and is made here once.

Knows certificates, their files and this PC's names. Does not know sockets or HTTP.

    data folder / tls / cert.pem, key.pem       the certificate that signs itself, and its key
"""

from __future__ import annotations

import datetime
import ipaddress
import logging
import socket
import ssl
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from petals_win.errors import UserError
from petals_win.host.addresses import adapters
from petals_win.host.folders import data_folder, private_folder, write_private

logger = logging.getLogger(__name__)

_DAYS = 820  # Apple's systems refuse a certificate that is good for more than 825
_RENEW_DAYS = 14


@dataclass(frozen=True)
class Tls:
    """A certificate (with those that lead to its root) and its private key, PEM files. Raises UserError if they do not fit."""

    cert: Path
    key: Path
    self_signed: bool = False

    def __post_init__(self) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        for file, option in ((self.cert, "--tls-cert"), (self.key, "--tls-key")):
            try:
                file.read_bytes()
            except OSError as error:
                raise UserError(f"The file of {option}, {file}, cannot be read: {error.strerror}.") from error
        try:
            # With a password that is none, OpenSSL does not ask for one on the console.
            context.load_cert_chain(self.cert, self.key, password="")
        except (ssl.SSLError, ValueError) as error:
            raise UserError(
                f"{self.cert} and {self.key} are no certificate and its private key. Give two PEM files, the key without a passphrase."
            ) from error

    @property
    def _certificate(self) -> x509.Certificate:
        return x509.load_pem_x509_certificates(self.cert.read_bytes())[0]

    @property
    def fingerprint(self) -> str:
        """The certificate's SHA-256 as browsers show it: AB:CD:…"""
        return self._certificate.fingerprint(hashes.SHA256()).hex(":").upper()

    @property
    def names(self) -> list[str]:
        """The names and addresses that the certificate is for."""
        return _names_in(self._certificate)


def self_signed(folder: Path | None = None) -> Tls:
    """The certificate of this PC that signs itself, made if there is none or its time is nearly over.

    :param folder: where it is kept; that in this user's data folder unless given
    Raises UserError if it cannot be kept.
    """
    folder = folder or data_folder() / "tls"
    cert, key = folder / "cert.pem", folder / "key.pem"
    try:
        private_folder(folder)
        if not (cert.exists() and key.exists()) or _nearly_over(cert):
            _make(cert, key)
    except OSError as error:
        raise UserError(
            f"The certificate cannot be kept in {folder}: {error.strerror}. Make room there, or set PETALS_WIN_HOME to a "
            "folder that you can write to."
        ) from error
    return Tls(cert, key, self_signed=True)


def own_names() -> list[str]:
    """This PC's names and addresses, as others may write them."""
    name = socket.gethostname().lower()
    names = ["localhost", name, f"{name}.local"] if name.isascii() and name != "localhost" else ["localhost"]
    addresses = {ipaddress.ip_address(text) for text in ("127.0.0.1", "::1", *adapters())}
    return names + sorted(str(address) for address in addresses if not address.is_link_local)


def _make(cert: Path, key: Path) -> None:
    private = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "petals-win")])
    now = datetime.datetime.now(datetime.UTC)
    identifier = x509.SubjectKeyIdentifier.from_public_key(private.public_key())
    usage = x509.KeyUsage(True, False, False, False, False, False, False, False, False)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(private.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))  # clocks of PCs differ
        .not_valid_after(now + datetime.timedelta(days=_DAYS))
        .add_extension(x509.SubjectAlternativeName([_general(name) for name in own_names()]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(identifier, critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier), critical=False)
    )
    certificate = builder.sign(private, hashes.SHA256())
    pem = serialization.Encoding.PEM
    encrypted = serialization.NoEncryption()
    write_private(key, private.private_bytes(pem, serialization.PrivateFormat.PKCS8, encrypted))
    write_private(cert, certificate.public_bytes(pem))


def _general(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _names_in(certificate: x509.Certificate) -> list[str]:
    try:
        found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    return [*found.get_values_for_type(x509.DNSName), *map(str, found.get_values_for_type(x509.IPAddress))]


def _nearly_over(cert: Path) -> bool:
    try:
        [certificate, *_] = x509.load_pem_x509_certificates(cert.read_bytes())
    except ValueError:
        logger.warning("%s is damaged and is made anew", cert)
        return True
    left = certificate.not_valid_after_utc - datetime.datetime.now(datetime.UTC)
    return left < datetime.timedelta(days=_RENEW_DAYS)

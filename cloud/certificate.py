"""A certificate that the server signs itself: clients know it by its fingerprint, and need no authority."""

import datetime
import ipaddress
import os
import socket
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from common.errors import UserError
from wire.tls import fingerprint, spell_fingerprint

_VALID = datetime.timedelta(days=3650)
_CLOCKS_DIFFER = datetime.timedelta(days=1)


def make_certificate(cert: Path, key: Path, host: str) -> str:
    """Write a new certificate and its private key as PEM files.

    Args:
        cert: the certificate's file; must not exist.
        key: the key's file, which only this user can read; must not exist.
        host: the address that the server is going to listen on, one of the certificate's names.

    Returns:
        The certificate's fingerprint, as ``edge-client --tls-fingerprint`` takes it.

    Raises:
        UserError: a file exists or cannot be written.
    """
    private = ec.generate_private_key(ec.SECP256R1())
    certificate = _sign(private, host)
    hidden = private.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    for path in (key, cert):
        if path.exists():
            raise UserError(
                f"{path} exists and is not overwritten; remove it, or name others with --tls-cert and"
                " --tls-key"
            )
    _write(key, hidden, 0o600)
    try:
        _write(cert, certificate.public_bytes(serialization.Encoding.PEM), 0o644)
    except UserError:
        key.unlink()
        raise
    return spell_fingerprint(fingerprint(certificate.public_bytes(serialization.Encoding.DER)))


def _sign(private: ec.EllipticCurvePrivateKey, host: str) -> x509.Certificate:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "isthmus cloud-server")])
    now = datetime.datetime.now(datetime.UTC)
    public = private.public_key()
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _CLOCKS_DIFFER)
        .not_valid_after(now + _VALID)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .add_extension(x509.SubjectAlternativeName(_names(host)), critical=False)
        .sign(private, hashes.SHA256())
    )


def _names(host: str) -> list[x509.GeneralName]:
    """What clients may call the server, for those that verify it."""
    names: list[x509.GeneralName] = []
    for one in dict.fromkeys(("localhost", "127.0.0.1", "::1", socket.gethostname(), host)):
        try:
            address = ipaddress.ip_address(one)
        except ValueError:
            if one and one.isascii():
                names.append(x509.DNSName(one))
        else:
            if not address.is_unspecified:
                names.append(x509.IPAddress(address))
    return names


def _write(path: Path, data: bytes, mode: int) -> None:
    try:
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
            file.write(data)
    except FileExistsError:
        raise UserError(f"{path} exists and is not overwritten; remove it, or name another file") from None
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from None

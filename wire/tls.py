"""TLS 1.3: which certificates either end shows and takes, and what went wrong, in plain words.

A client knows the server by its certificate's SHA-256 fingerprint, or by an authority that signed it, or by both.
"""

from __future__ import annotations

import hashlib
import ssl
from pathlib import Path

from wire.errors import TlsFailed

__all__ = [
    "TlsFailed",
    "client_context",
    "explain_tls",
    "fingerprint",
    "parse_fingerprint",
    "server_context",
    "spell_fingerprint",
]


def server_context(cert: Path, key: Path, client_ca: Path | None = None) -> ssl.SSLContext:
    """Return what a server's `WireConfig.tls` takes.

    Args:
        cert: PEM file of its certificate, those that signed it behind it.
        key: PEM file of its private key.
        client_ca: PEM file of the authorities one of which has to have signed a client's certificate; None to ask
            for none.

    Raises:
        ValueError: a file cannot be used; the message says which and why, in one line.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.num_tickets = 0  # nobody resumes, and a ticket would be one more thing to steal
    _load_pair(context, cert, key)
    if client_ca is not None:
        _load_authorities(context, client_ca)
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def client_context(
    *, pinned: bool, ca: Path | None = None, cert: Path | None = None, key: Path | None = None
) -> ssl.SSLContext:
    """Return what a client's `WireConfig.tls` takes.

    Args:
        pinned: the server's certificate is known by its fingerprint (`WireConfig.tls_fingerprint`), and need be
            signed by nobody unless `ca` is given.
        ca: PEM file of the authorities that may have signed the server's certificate; None for the system's.
        cert: PEM file of the certificate to show to a server that asks for one; None for none.
        key: PEM file of its private key.

    Raises:
        ValueError: a file cannot be used; the message says which and why, in one line.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    if ca is not None:
        _load_authorities(context, ca)
    elif pinned:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    else:
        context.load_default_certs()
    if cert is not None and key is not None:
        _load_pair(context, cert, key)
    return context


def fingerprint(certificate: bytes) -> bytes:
    """Return the SHA-256 of a certificate in DER."""
    return hashlib.sha256(certificate).digest()


def parse_fingerprint(text: str) -> bytes:
    """Read a fingerprint: 64 hexadecimal digits, with or without colons, upper or lower case.

    Raises:
        ValueError: it is none.
    """
    digits = text.strip().replace(":", "")
    try:
        value = bytes.fromhex(digits)
    except ValueError:
        value = b""
    if len(value) != 32 or len(digits) != 64:
        raise ValueError(
            f"{text!r} is no fingerprint; give the 64 hexadecimal digits that cloud-server --make-cert printed"
        )
    return value


def spell_fingerprint(value: bytes) -> str:
    """Write a fingerprint as people read it, AB:CD:..."""
    return value.hex(":").upper()


def explain_tls(error: ssl.SSLError, *, client: bool) -> TlsFailed:
    """Say in one line what went wrong, and what to do about it.

    Args:
        error: what OpenSSL says.
        client: whether this end is the client.
    """
    reason = error.reason or ""
    if isinstance(error, ssl.SSLCertVerificationError):
        return TlsFailed((_explain_server if client else _explain_client)(error))
    for part, says in (_AT_CLIENT if client else _AT_SERVER).items():
        if part in reason:
            return TlsFailed(says)
    return TlsFailed(f"TLS failed: {reason.lower().replace('_', ' ') or error}", final=False)


_AT_CLIENT = {
    "CERTIFICATE_REQUIRED": "the server wants a client certificate; give --tls-cert and --tls-key",
    "ALERT_UNKNOWN_CA": "the server does not know who signed this client's certificate; give --tls-cert and --tls-key"
    " one that its --tls-client-ca signed",
    "ALERT_BAD_CERTIFICATE": "the server does not take this client's certificate",
    "ALERT_CERTIFICATE_EXPIRED": "this client's certificate has expired",
    "ALERT_UNSUPPORTED_CERTIFICATE": "the server does not take this client's kind of certificate",
    "ALERT_PROTOCOL_VERSION": "the server speaks no TLS 1.3",
    "UNSUPPORTED_PROTOCOL": "the server speaks no TLS 1.3",
    "WRONG_VERSION_NUMBER": "that port speaks no TLS; check the port, or leave out the --tls options",
}
_AT_SERVER = {
    "PEER_DID_NOT_RETURN_A_CERTIFICATE": "the client shows no certificate",
    "ALERT_UNKNOWN_CA": "the client does not know who signed this server's certificate",
    "ALERT_BAD_CERTIFICATE": "the client does not take this server's certificate",
    "UNSUPPORTED_PROTOCOL": "the client speaks no TLS 1.3",
    "HTTP_REQUEST": "the client speaks HTTP without TLS",
    "WRONG_VERSION_NUMBER": "the client speaks no TLS",
}
_EXPIRED, _NOT_YET_VALID, _NAME_MISMATCH, _ADDRESS_MISMATCH = 10, 9, 62, 64  # OpenSSL's X509_V_ERR_...


def _explain_server(error: ssl.SSLCertVerificationError) -> str:
    if error.verify_code == _EXPIRED:
        return "the server's certificate has expired; it needs a new one"
    if error.verify_code == _NOT_YET_VALID:
        return "the server's certificate is not valid yet; check this machine's clock"
    if error.verify_code in (_NAME_MISMATCH, _ADDRESS_MISMATCH):
        return (
            "the server's certificate is for another name; connect to a name that it holds, or pin it with"
            " --tls-fingerprint"
        )
    return (
        f"the server's certificate cannot be verified ({error.verify_message}); give --tls-ca with the authority"
        " that signed it, or pin it with --tls-fingerprint"
    )


def _explain_client(error: ssl.SSLCertVerificationError) -> str:
    return f"the client's certificate cannot be verified: {error.verify_message}"


def _load_pair(context: ssl.SSLContext, cert: Path, key: Path) -> None:
    for path in (cert, key):
        _check_readable(path)
    try:
        # Else OpenSSL would ask for the password on the terminal.
        context.load_cert_chain(cert, key, password=lambda: b"")
    except (ssl.SSLError, ValueError) as error:
        reason = getattr(error, "reason", None) or "the key is encrypted or no PEM"
        if reason == "KEY_VALUES_MISMATCH":
            raise ValueError(f"the key in {key} is not that of the certificate in {cert}") from None
        raise ValueError(
            f"{cert} and {key} are no certificate and key that can be used: {reason.lower().replace('_', ' ')};"
            " both have to be PEM, and the key without a password"
        ) from None


def _load_authorities(context: ssl.SSLContext, ca: Path) -> None:
    _check_readable(ca)
    try:
        context.load_verify_locations(ca)
    except (ssl.SSLError, ValueError) as error:
        reason = getattr(error, "reason", None) or "no PEM"
        raise ValueError(
            f"{ca} holds no certificates: {reason.lower().replace('_', ' ')}; give a PEM file"
        ) from None


def _check_readable(path: Path) -> None:
    try:
        path.open("rb").close()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from None

"""Where a server may listen with which protection, and the certificates that it makes."""

import logging
import ssl
import stat
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509

from cloud.certificate import make_certificate
from cloud.security import Security, is_loopback
from common.errors import UserError
from wire.config import WireConfig
from wire.tls import client_context, fingerprint, parse_fingerprint, server_context

TLS: dict[str, Any] = {"tls_cert": Path("cert.pem"), "tls_key": Path("key.pem")}
TOKEN: dict[str, Any] = {"token_file": Path("token")}
CLIENTS: dict[str, Any] = {"tls_client_ca": Path("ca.pem")}


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.1", "::1", "localhost"])
def test_loopback_needs_nothing(host: str) -> None:
    for settings in ({}, TLS, TOKEN, {**TLS, **TOKEN}, {"insecure": True}):
        Security(**settings).check_host(host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.5", "cloud.example", "fd00::5", ""])
@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({}, "it takes TLS (--tls-cert and --tls-key; cloud-server --make-cert writes them) and a token ("),
        (TOKEN, "it takes TLS (--tls-cert and --tls-key; cloud-server --make-cert writes them); or"),
        (TLS, "it takes a token (--token-file); or give --insecure"),
    ],
)
def test_address_that_others_reach_needs_tls_and_a_token(host: str, settings: Any, says: str) -> None:
    with pytest.raises(UserError) as caught:
        Security(**settings).check_host(host)
    assert says in str(caught.value)
    assert f"--host {host}" in str(caught.value)


@pytest.mark.parametrize("settings", [{**TLS, **TOKEN}, {**TLS, **CLIENTS}, {**TLS, **TOKEN, **CLIENTS}])
def test_address_that_others_reach_is_fine_with_both(settings: Any, caplog: pytest.LogCaptureFixture) -> None:
    Security(**settings).check_host("0.0.0.0")
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({}, "can use this server: nothing asks who they are and nothing is encrypted"),
        (TLS, "can use this server: nothing asks who they are"),
        (TOKEN, "can read along: nothing is encrypted"),
    ],
)
def test_insecure_server_says_what_is_missing(
    settings: Any, says: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        Security(**settings, insecure=True).check_host("10.0.0.5")
    assert caplog.messages == [f"anyone who can reach 10.0.0.5 {says}"]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"tls_cert": Path("cert.pem")}, "--tls-cert and --tls-key go together"),
        ({"tls_key": Path("key.pem")}, "--tls-cert and --tls-key go together"),
        (CLIENTS, "--tls-client-ca asks for certificates over TLS"),
    ],
)
def test_options_that_do_not_go_together_are_refused(settings: Any, says: str) -> None:
    with pytest.raises(UserError, match=says):
        Security(**settings)


def test_files_become_settings_of_the_connection(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_bytes(b"0123456789abcdef\n")
    token.chmod(0o600)
    make_certificate(tmp_path / "cert.pem", tmp_path / "key.pem", "0.0.0.0")
    wire = Security(token_file=token, tls_cert=tmp_path / "cert.pem", tls_key=tmp_path / "key.pem").apply(
        WireConfig(device="cuda:3")
    )
    assert (wire.device, wire.token) == ("cuda:3", b"0123456789abcdef")
    assert isinstance(wire.tls, ssl.SSLContext)
    assert Security().apply(WireConfig()) == WireConfig()
    for settings in ({"token_file": tmp_path / "none"}, TLS):
        with pytest.raises(UserError):
            Security(**settings).apply(WireConfig())


def test_made_certificate_is_what_its_fingerprint_says(tmp_path: Path) -> None:
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    printed = make_certificate(cert, key, "cloud.example")
    certificate = x509.load_pem_x509_certificate(cert.read_bytes())
    assert parse_fingerprint(printed) == fingerprint(ssl.PEM_cert_to_DER_cert(cert.read_text()))
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert {"localhost", "cloud.example"} <= set(names.get_values_for_type(x509.DNSName))
    assert "127.0.0.1" in map(str, names.get_values_for_type(x509.IPAddress))
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    server_context(cert, key)
    client_context(pinned=False, ca=cert)


def test_certificates_are_never_overwritten(tmp_path: Path) -> None:
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    for existing, other in ((cert, key), (key, cert)):
        existing.write_text("mine")
        with pytest.raises(UserError, match=f"{existing} exists and is not overwritten"):
            make_certificate(cert, key, "127.0.0.1")
        assert existing.read_text() == "mine"
        assert not other.exists()
        existing.unlink()
    with pytest.raises(UserError, match="cannot be written: No such file or directory"):
        make_certificate(tmp_path / "none" / "cert.pem", key, "127.0.0.1")
    assert not key.exists()


def test_loopback_is_told_from_the_rest() -> None:
    assert is_loopback("127.0.0.1")
    assert not is_loopback("0.0.0.0")
    assert not is_loopback("localhost.example")

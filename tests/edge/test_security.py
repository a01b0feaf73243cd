"""How a client's options become the settings of its connection."""

import ssl
from pathlib import Path
from typing import Any

import pytest

from common.errors import UserError
from edge.config import TrainConfig
from edge.security import wire_config
from tests.wire.certificates import make_pair
from wire.config import WireConfig


def of(**settings: Any) -> WireConfig:
    return wire_config(TrainConfig(server="cloud", **settings))


def test_nothing_asked_for_is_plain_tcp() -> None:
    assert of() == WireConfig()


def test_token_is_that_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_bytes(b"0123456789abcdef\n")
    path.chmod(0o600)
    assert of(token_file=path).token == b"0123456789abcdef"
    with pytest.raises(UserError, match="there is no token file"):
        of(token_file=tmp_path / "none")


def test_pinned_certificate_needs_no_authority() -> None:
    wire = of(tls_fingerprint="AB:" * 31 + "cd")
    assert wire.tls_fingerprint == bytes([0xAB] * 31 + [0xCD])
    assert wire.tls is not None
    assert wire.tls.verify_mode is ssl.CERT_NONE


def test_other_certificates_are_verified_with_their_names(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, "ca")
    for settings in ({"tls": True}, {"tls_ca": pair.cert}, {"tls": True, "tls_fingerprint": "ab" * 32}):
        wire = of(**settings)
        assert wire.tls is not None
        assert wire.tls.verify_mode is ssl.CERT_REQUIRED
        assert wire.tls.check_hostname


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"tls_fingerprint": "abc"}, "--tls-fingerprint 'abc' is no fingerprint"),
        ({"tls_cert": Path("c")}, "--tls-cert and --tls-key go together"),
        ({"tls_key": Path("k"), "tls": True}, "--tls-cert and --tls-key go together"),
        ({"tls_cert": Path("c"), "tls_key": Path("k")}, "--tls-cert is shown over TLS"),
        ({"tls_ca": Path("none.pem")}, "none.pem cannot be read"),
    ],
)
def test_options_that_do_not_go_together_are_refused(settings: Any, says: str) -> None:
    with pytest.raises(UserError, match=says):
        of(**settings)

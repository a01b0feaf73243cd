"""Tokens and TLS from the command line: a run that may take place does, one that may not ends in one line."""

import hashlib
import re
import ssl
import stat
from pathlib import Path

from tests.system.peer import Peer
from tests.system.processes import Command, run, serving, train
from tests.wire.certificates import make_pair

KNOWN = ("--import", "dropout_model")  # what the tiny job trains
TOKEN = "0123456789abcdef0123456789abcdef"


def token_file(folder: Path, name: str = "token", token: str = TOKEN) -> Path:
    path = folder / name
    path.write_text(token + "\n")
    path.chmod(0o600)
    return path


def made_certificate(folder: Path) -> tuple[tuple[str, ...], str]:
    """What a server and a client are started with, as ``--make-cert`` says."""
    made = run(
        *("cloud-server", "--make-cert", "--tls-cert", folder / "cert.pem", "--tls-key", folder / "key.pem")
    )
    assert (made.status, made.err) == (0, ""), made
    pinned = re.search(r"^--tls-fingerprint ([0-9A-F:]{95})$", made.out, re.MULTILINE)
    assert pinned is not None, made.out
    of_server = re.search(r"--tls-cert (\S+) --tls-key (\S+),", made.out)
    assert of_server is not None, made.out
    return ("--tls-cert", of_server[1], "--tls-key", of_server[2]), pinned[1]


def logged(server: Command) -> str:
    """What the server has said, which is no traceback."""
    assert "Traceback" not in server.err
    return server.err


def test_made_certificate_and_a_token_let_a_client_train(tmp_path):
    tls, fingerprint = made_certificate(tmp_path)
    token = token_file(tmp_path)
    with serving(*KNOWN, "--token-file", token, *tls) as (server, address):
        for pin in (fingerprint, fingerprint.replace(":", "").lower()):
            ended = train(address, "--steps", 2, "--token-file", token, "--tls-fingerprint", pin)
            assert (ended.status, ended.err) == (0, ""), ended
            assert "done: 2 steps" in ended.out
        assert TOKEN not in logged(server)


def test_runs_that_may_not_take_place_end_in_one_line(tmp_path):
    tls, fingerprint = made_certificate(tmp_path)
    token, other = token_file(tmp_path), token_file(tmp_path, "other", "x" * 32)
    with serving("--token-file", token, *tls) as (server, address):
        for options, says in (
            ((), "the server wants TLS; give --tls-fingerprint"),
            (("--token-file", token), "the server wants TLS"),
            (("--tls-fingerprint", fingerprint), "the server wants a token; give --token-file"),
            (("--tls-fingerprint", fingerprint, "--token-file", other), "does not know this token"),
            (("--tls-fingerprint", "00" * 32, "--token-file", token), f"of fingerprint {fingerprint}"),
            (("--tls", "--token-file", token), "cannot be verified"),
        ):
            ended = train(address, *options)
            assert ended.status == 1
            assert says in ended.error
        logged(server)


def test_client_of_a_server_without_either_is_told_so(tmp_path):
    token = token_file(tmp_path)
    with serving() as (_, address):
        assert "does not ask for the token" in train(address, "--token-file", token).error
        assert "leave out the --tls options" in train(address, "--tls-fingerprint", "00" * 32).error


def test_certificates_of_clients_stand_for_a_token(tmp_path):
    tls, fingerprint = made_certificate(tmp_path)
    authority = make_pair(tmp_path, "authority", authority=True)
    client, stranger = make_pair(tmp_path, "client", signer=authority), make_pair(tmp_path, "stranger")
    with serving(*KNOWN, *tls, "--tls-client-ca", authority.cert) as (server, address):
        pin = ("--tls-fingerprint", fingerprint)
        assert "give --tls-cert and --tls-key" in train(address, *pin).error
        strange = train(address, *pin, "--tls-cert", stranger.cert, "--tls-key", stranger.key)
        assert "--tls-client-ca signed" in strange.error
        ended = train(address, *pin, "--steps", 1, "--tls-cert", client.cert, "--tls-key", client.key)
        assert (ended.status, ended.err) == (0, ""), ended
        assert "the client shows no certificate" in logged(server)


def test_authority_vouches_for_a_server(tmp_path):
    authority = make_pair(tmp_path, "authority", authority=True)
    pair = make_pair(tmp_path, "server", signer=authority)
    tls = ("--tls-cert", pair.cert, "--tls-key", pair.key)
    with serving(*KNOWN, *tls) as (_, address):
        ended = train(address, "--steps", 1, "--tls-ca", authority.cert)
        assert (ended.status, ended.err) == (0, ""), ended
    with serving(*tls, "--host", "127.0.0.2") as (_, address):
        assert "is for another name" in train(address, "--tls-ca", authority.cert).error


def test_address_that_others_reach_is_refused_without_protection(tmp_path):
    tls, _ = made_certificate(tmp_path)
    for options, says in (
        ((), "it takes TLS (--tls-cert and --tls-key; cloud-server --make-cert writes them) and a token"),
        (tls, "it takes a token (--token-file); or give --insecure"),
        (("--token-file", token_file(tmp_path)), "it takes TLS"),
    ):
        ended = run("cloud-server", "--cpu", "--host", "0.0.0.0", "--port", 0, *options)
        assert (ended.status, ended.out) == (2, "")
        assert says in ended.error


def test_address_that_others_reach_is_taken_with_protection_or_on_demand(tmp_path):
    tls, _ = made_certificate(tmp_path)
    with serving("--host", "0.0.0.0", *tls, "--token-file", token_file(tmp_path)) as (server, _):
        assert "anyone who can reach" not in logged(server)
    with serving("--host", "0.0.0.0", "--insecure") as (server, _):
        assert "can use this server: nothing asks who they are and nothing is encrypted" in logged(server)


def test_certificate_is_made_beside_nothing_that_exists(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = run("cloud-server", "--make-cert")
    assert made.status == 0
    assert "--tls-cert cert.pem --tls-key key.pem" in made.out
    assert stat.S_IMODE((tmp_path / "key.pem").stat().st_mode) == 0o600
    before = (tmp_path / "cert.pem").read_bytes()
    again = run("cloud-server", "--make-cert")
    assert again.status == 2
    assert "key.pem exists and is not overwritten" in again.error
    assert (tmp_path / "cert.pem").read_bytes() == before


def test_wrong_files_are_one_line(tmp_path):
    short = token_file(tmp_path, "short", "short")
    for options, says in (
        (("--token-file", short), "has 5 bytes and needs 16 at least"),
        (("--token-file", tmp_path / "none"), "there is no token file"),
        (("--tls-cert", short), "--tls-cert and --tls-key go together"),
        (("--tls-cert", short, "--tls-key", short), "both have to be PEM"),
        (("--tls-client-ca", short), "give --tls-cert and --tls-key, too"),
        (("--heartbeat", "0.01"), "0.1<=x<=3600"),
    ):
        ended = run("cloud-server", "--cpu", "--port", 0, *options)
        assert (ended.status, ended.out) == (2, "")
        assert says in ended.error
    for options, says in (
        (("--token-file", short), "has 5 bytes and needs 16 at least"),
        (("--tls-fingerprint", "12:34"), "--tls-fingerprint '12:34' is no fingerprint"),
        (("--tls-cert", short, "--tls-key", short), "--tls-cert is shown over TLS"),
    ):
        ended = run("edge-client", "--server", "127.0.0.1:1", *options)
        assert (ended.status, ended.out) == (2, "")
        assert says in ended.error


def test_heartbeat_of_the_server_is_that_of_the_command_line():
    with serving("--heartbeat", 0.5) as (_, address), Peer(address) as peer:
        assert peer.greet().heartbeat_s == 0.5


def test_certificate_is_one_that_other_programs_read(tmp_path):
    _, fingerprint = made_certificate(tmp_path)
    pem = (tmp_path / "cert.pem").read_text()
    assert hashlib.sha256(ssl.PEM_cert_to_DER_cert(pem)).hexdigest() == fingerprint.replace(":", "").lower()

"""Tokens: who knows one, who does not, and what either end says of it. The token itself never crosses."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.wire.pair import SAMPLES, TOKEN, ProtocolPair, feed, frame, joined, to_bytes
from wire.auth import CLIENT_TOKEN, SERVER_TOKEN, is_proof, prove
from wire.config import WireConfig
from wire.errors import (
    AuthenticationFailed,
    LimitExceeded,
    PeerError,
    RemoteProtocolError,
    StaleTicket,
    TokenMissing,
    TooManyAttempts,
    VersionMismatch,
)
from wire.limiter import AttemptLimiter
from wire.messages import Challenge, Message, Proof, Welcome
from wire.protocol import Phase, Protocol, Role

OTHER = b"another token altogether"
REJOIN: Any = SAMPLES["rejoin"]
WELCOME: Any = SAMPLES["welcome"]


def pair_with(client: bytes | None, server: bytes | None, **settings: Any) -> ProtocolPair:
    return ProtocolPair(WireConfig(token=client, **settings), WireConfig(token=server))


def greeted_with(pair: ProtocolPair) -> tuple[bytes, list[str]]:
    """Let both ends greet each other; returns all that crossed, and the kinds of what did."""
    crossed, kinds = b"", []
    while replies := [(end, reply) for end in (pair.client, pair.server) for reply in end.take_replies()]:
        for end, reply in replies:
            kinds.append(reply.kind)
            data = joined(end.send(reply)[0])
            crossed += data
            feed(pair.other(end), data)
    return crossed, kinds


def test_ends_with_one_token_prove_it_to_each_other() -> None:
    pair = pair_with(TOKEN, TOKEN)
    crossed, kinds = greeted_with(pair)
    assert kinds == ["hello", "challenge", "proof", "welcome"]
    assert pair.client.phase is pair.server.phase is Phase.WELCOMED
    assert TOKEN not in crossed


def test_no_nonce_and_no_proof_crosses_twice() -> None:
    seen: list[bytes] = []
    for _ in range(10):
        pair = pair_with(TOKEN, TOKEN)
        pair.send(pair.client, *pair.client.take_replies())
        (challenge,) = pair.server.take_replies()
        pair.send(pair.server, challenge)
        (proof,) = pair.client.take_replies()
        pair.send(pair.client, proof)
        (welcome,) = pair.server.take_replies()
        assert isinstance(challenge, Challenge)
        assert isinstance(proof, Proof)
        assert isinstance(welcome, Welcome)
        assert welcome.mac is not None
        seen += [challenge.nonce, proof.nonce, proof.mac, welcome.nonce, welcome.mac]
    assert len(set(seen)) == 50


def test_wrong_token_is_told_in_one_line() -> None:
    pair = pair_with(OTHER, TOKEN)
    with pytest.raises(AuthenticationFailed, match="does not know this token") as caught:
        greeted_with(pair)
    assert pair.server.welcome is None
    with pytest.raises(PeerError, match="give the --token-file") as told:
        feed(pair.client, joined(pair.server.fail(caught.value)))
    assert told.value.code == "wrong_token"
    assert "\n" not in told.value.message
    assert pair.client.phase is pair.server.phase is Phase.CLOSED


def test_client_without_a_token_is_told_how_to_give_one() -> None:
    pair = pair_with(None, TOKEN)
    with pytest.raises(TokenMissing, match="the server wants a token; give --token-file") as caught:
        greeted_with(pair)
    with pytest.raises(PeerError, match="the server wants a token"):
        feed(pair.server, joined(pair.client.fail(caught.value)))


def test_client_with_a_token_refuses_a_server_that_does_not_ask_for_it() -> None:
    pair = pair_with(TOKEN, None)
    with pytest.raises(TokenMissing, match="does not ask for the token"):
        greeted_with(pair)


def test_client_refuses_a_server_that_only_pretends_to_know_the_token() -> None:
    for mac, error in ((b"\0" * 32, AuthenticationFailed), (None, TokenMissing)):
        pair = ProtocolPair(WireConfig(token=TOKEN), WireConfig(token=TOKEN)).bring_to(Phase.PROVED)
        with pytest.raises(error):
            feed(pair.client, to_bytes(replace(SAMPLES["welcome"], mac=mac)))  # type: ignore[type-var]


def test_proof_of_the_client_is_none_of_the_server() -> None:
    """Sent back as it came it would otherwise do for a server that knows nothing."""
    client = Protocol(Role.CLIENT, WireConfig(token=TOKEN))
    client.send(*client.take_replies())
    feed(client, to_bytes(Challenge(b"\7" * 32)))
    (proof,) = client.take_replies()
    assert isinstance(proof, Proof)
    client.send(proof)
    with pytest.raises(AuthenticationFailed):
        feed(client, to_bytes(replace(SAMPLES["welcome"], mac=proof.mac)))  # type: ignore[type-var]


def test_proof_is_good_for_one_challenge_only() -> None:
    recorded = pair_with(TOKEN, TOKEN)
    recorded.send(recorded.client, *recorded.client.take_replies())
    recorded.send(recorded.server, *recorded.server.take_replies())
    (proof,) = recorded.client.take_replies()
    server = pair_with(TOKEN, TOKEN).server
    feed(server, to_bytes(SAMPLES["hello"]))
    server.send(*server.take_replies())
    with pytest.raises(AuthenticationFailed):
        feed(server, to_bytes(proof))


def test_limits_of_the_handshake_hold_until_the_welcome() -> None:
    for phase in (Phase.START, Phase.GREETED, Phase.CHALLENGED, Phase.PROVED):
        for role in Role:
            end = ProtocolPair().bring_to(phase).end(role)
            with pytest.raises(LimitExceeded, match="the limit is 4096"):
                feed(end, frame({"kind": "proof", "nonce": b"x" * 5000}))


def test_nothing_but_the_proof_is_taken_once_it_is_wanted() -> None:
    for kind in ("hello", "open", "resume", "ping", "fetch", "begin"):
        server = ProtocolPair().bring_to(Phase.CHALLENGED).server
        with pytest.raises(RemoteProtocolError, match=f"the client sent {kind} in phase challenged"):
            feed(server, to_bytes(SAMPLES[kind]))


def test_client_of_version_1_is_told_so_and_not_asked_for_a_token() -> None:
    for token in (None, TOKEN):
        server = Protocol(Role.SERVER, WireConfig(token=token))
        hello = {"kind": "hello", "versions": [1], "software": "old", "max_header": 4096, "max_payload": 0}
        with pytest.raises(VersionMismatch, match="one side speaks version 3, the other version 1"):
            feed(server, frame(hello))


def test_token_is_not_in_what_settings_print() -> None:
    assert "sixteen" not in repr(WireConfig(token=TOKEN))


def test_address_that_guesses_is_refused_before_any_challenge() -> None:
    now_s = 0.0
    limiter = AttemptLimiter(lambda: now_s)
    for _ in range(5):
        pair = pair_with(OTHER, TOKEN)
        pair.server.greeting.door = limiter.of("203.0.113.7")
        with pytest.raises(AuthenticationFailed):
            greeted_with(pair)
    pair = pair_with(TOKEN, TOKEN)
    pair.server.greeting.door = limiter.of("203.0.113.7")
    with pytest.raises(TooManyAttempts, match="try again in 30 s") as caught:
        greeted_with(pair)
    assert pair.server.take_replies() == []
    assert caught.value.code == "too_many_attempts"
    now_s = 30.0
    assert greeted_with(pair_with(TOKEN, TOKEN))[1][-1] == "welcome"


def test_connections_that_were_challenged_at_once_do_not_all_get_a_guess() -> None:
    limiter = AttemptLimiter(lambda: 0.0)
    outcomes = []
    pairs = [ProtocolPair().bring_to(Phase.CHALLENGED) for _ in range(8)]
    for pair in pairs:
        pair.server.greeting.door = limiter.of("203.0.113.7")
        with pytest.raises(RemoteProtocolError) as caught:
            feed(pair.server, to_bytes(SAMPLES["proof"]))
        outcomes.append(type(caught.value))
    assert outcomes == [AuthenticationFailed] * 5 + [TooManyAttempts] * 3


@given(st.binary(min_size=1), st.binary(min_size=1), st.binary(min_size=32, max_size=32))
def test_proof_holds_for_its_own_secret_and_purpose_alone(secret: bytes, other: bytes, nonce: bytes) -> None:
    mac = prove(secret, CLIENT_TOKEN, nonce, nonce)
    assert is_proof(mac, secret, CLIENT_TOKEN, nonce, nonce)
    assert not is_proof(mac, secret, SERVER_TOKEN, nonce, nonce)
    assert not is_proof(mac, secret, CLIENT_TOKEN, nonce, nonce[::-1] + b"x")
    assert is_proof(mac, other, CLIENT_TOKEN, nonce, nonce) == (secret.rstrip(b"\0") == other.rstrip(b"\0"))


def test_welcome_without_a_token_proves_nothing() -> None:
    pair = pair_with(None, None)
    assert greeted_with(pair)[1] == ["hello", "welcome"]
    assert isinstance(pair.client.welcome, Welcome)
    assert pair.client.welcome.mac is None


def test_client_that_comes_back_is_let_in_with_its_first_message() -> None:
    pair = pair_with(TOKEN, TOKEN)
    redeemed: list[Message] = []
    pair.server.greeting.redeem = lambda message: not redeemed.append(message)  # type: ignore[func-returns-value]
    pair.client.rejoin(REJOIN, WELCOME)
    (rejoin,) = pair.client.take_replies()
    began = joined(pair.client.send(rejoin)[0]) + joined(pair.client.send(SAMPLES["begin"])[0])
    assert feed(pair.server, began) == [REJOIN, SAMPLES["begin"]]  # at once, and in one flight
    assert redeemed == [REJOIN]
    assert pair.server.take_replies() == []
    assert pair.send(pair.server, SAMPLES["ready"]) == [SAMPLES["ready"]]
    assert pair.client.phase is pair.server.phase is Phase.RUNNING
    assert pair.client.heartbeat_s == WELCOME.heartbeat_s


def test_nothing_behind_a_bad_ticket_is_looked_at() -> None:
    server = Protocol(Role.SERVER, WireConfig())  # which has given none
    with pytest.raises(StaleTicket, match="greet, and resume") as caught:
        feed(server, to_bytes(REJOIN) + b"no frame at all")
    assert caught.value.code == "stale_ticket"
    with pytest.raises(PeerError, match="greet, and resume"):
        feed(Protocol(Role.CLIENT, WireConfig()), joined(server.fail(caught.value)))


def test_client_of_another_version_cannot_rejoin() -> None:
    server = Protocol(Role.SERVER, WireConfig())
    server.greeting.redeem = lambda message: True
    with pytest.raises(StaleTicket):
        feed(server, to_bytes(replace(REJOIN, version=1)))

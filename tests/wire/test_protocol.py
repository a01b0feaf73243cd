"""Two protocol ends, joined by a link that is nothing but bytes."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.wire.pair import SAMPLES, ProtocolPair, as_sent, feed, frame, joined, to_bytes
from wire.config import WireConfig
from wire.errors import (
    AuthenticationFailed,
    ConnectionLost,
    ForeignProtocol,
    FrameError,
    HeaderError,
    LimitExceeded,
    LocalProtocolError,
    PeerError,
    RemoteProtocolError,
    TokenMissing,
    VersionMismatch,
)
from wire.frames import Limits
from wire.messages import MESSAGE_TYPES, Bye, Forward, Hello, Open, Ping, Pong, Welcome
from wire.protocol import TRANSITIONS, Phase, Protocol, Role

KINDS = sorted(MESSAGE_TYPES)

# The table as the document of the protocol has it: phase, sender, kind, next phase.
EXPECTED = {
    (Phase.START, Role.CLIENT, "hello"): Phase.GREETED,
    (Phase.START, Role.CLIENT, "rejoin"): Phase.REJOINING,
    (Phase.GREETED, Role.SERVER, "welcome"): Phase.WELCOMED,
    (Phase.GREETED, Role.SERVER, "challenge"): Phase.CHALLENGED,
    (Phase.CHALLENGED, Role.CLIENT, "proof"): Phase.PROVED,
    (Phase.PROVED, Role.SERVER, "welcome"): Phase.WELCOMED,
    (Phase.WELCOMED, Role.CLIENT, "open"): Phase.OPENING,
    (Phase.WELCOMED, Role.CLIENT, "resume"): Phase.OPENING,
    (Phase.OPENING, Role.SERVER, "ready"): Phase.RUNNING,
    (Phase.REJOINING, Role.SERVER, "ready"): Phase.RUNNING,
    **{
        (phase, Role.CLIENT, kind): phase
        for phase in (Phase.REJOINING, Phase.RUNNING)
        for kind in ("weights", "fetch", "begin", "forward", "backward", "commit", "abort", "save")
    },
    **{
        (Phase.RUNNING, Role.SERVER, kind): Phase.RUNNING
        for kind in ("weights", "forward", "backward", "committed", "abort", "saved")
    },
    **{
        (phase, role, kind): phase
        for phase in (Phase.WELCOMED, Phase.OPENING, Phase.REJOINING, Phase.RUNNING)
        for role in Role
        for kind in ("ping", "pong")
    },
    **{
        (phase, role, kind): Phase.CLOSED
        for phase in Phase
        if phase is not Phase.CLOSED
        for role in Role
        for kind in ("error", "bye")
    },
}
EVERYTHING = [(phase, role, kind) for phase in Phase for role in Role for kind in KINDS]
ALLOWED = [what for what in EVERYTHING if what in EXPECTED]
FORBIDDEN = [what for what in EVERYTHING if what not in EXPECTED]
DEALT_WITH = {"hello", "challenge", "proof", "welcome", "ping", "pong"}
# The samples prove nothing, and a client without a token cannot be challenged.
PROVES_NOTHING = {(Phase.GREETED, "challenge"), (Phase.CHALLENGED, "proof"), (Phase.PROVED, "welcome")}


def name_of(value: object) -> str:
    return value.value if isinstance(value, Phase | Role) else str(value)


# Phases.


def test_table_of_transitions_is_the_expected_one() -> None:
    table = {
        (phase, role, kind): after
        for phase, rows in TRANSITIONS.items()
        for role, row in rows.items()
        for kind, after in row.items()
    }
    assert table == EXPECTED


@pytest.mark.parametrize(("phase", "role", "kind"), ALLOWED, ids=name_of)
def test_allowed_message_moves_both_ends_to_the_same_phase(phase: Phase, role: Role, kind: str) -> None:
    pair = ProtocolPair().bring_to(phase)
    sender = pair.end(role)
    if kind == "error":
        with pytest.raises(PeerError, match="what was that"):
            pair.send(sender, SAMPLES[kind])
    elif (phase, kind) in PROVES_NOTHING:
        with pytest.raises((AuthenticationFailed, TokenMissing)):
            pair.send(sender, SAMPLES[kind])
    else:
        seen = pair.send(sender, SAMPLES[kind])
        assert [message.kind for message in seen] == ([] if kind in DEALT_WITH else [kind])
    assert pair.client.phase is pair.server.phase is EXPECTED[phase, role, kind]


@pytest.mark.parametrize(("phase", "role", "kind"), FORBIDDEN, ids=name_of)
def test_forbidden_message_is_not_sent(phase: Phase, role: Role, kind: str) -> None:
    sender = ProtocolPair().bring_to(phase).end(role)
    with pytest.raises(
        LocalProtocolError, match=f"the {role.value} cannot send {kind} in phase {phase.value}"
    ):
        sender.send(SAMPLES[kind])
    assert sender.phase is phase


@pytest.mark.parametrize(
    ("phase", "role", "kind"), [row for row in FORBIDDEN if row[0] is not Phase.CLOSED], ids=name_of
)
def test_forbidden_message_of_the_peer_is_refused(phase: Phase, role: Role, kind: str) -> None:
    pair = ProtocolPair().bring_to(phase)
    receiver = pair.other(pair.end(role))
    with pytest.raises(RemoteProtocolError) as caught:
        feed(receiver, to_bytes(SAMPLES[kind]))
    if not isinstance(caught.value, LimitExceeded):  # before the handshake no payload is taken
        assert str(caught.value) == f"the {role.value} sent {kind} in phase {phase.value}"


@pytest.mark.parametrize("role", Role, ids=name_of)
@pytest.mark.parametrize("kind", KINDS)
def test_whatever_comes_after_the_end_is_dropped(role: Role, kind: str) -> None:
    pair = ProtocolPair().bring_to(Phase.CLOSED)
    before = pair.end(role).received_bytes
    assert feed(pair.end(role), to_bytes(SAMPLES[kind])) == []
    assert feed(pair.end(role), b"\xff" * 100) == []
    assert pair.end(role).received_bytes == before + len(to_bytes(SAMPLES[kind])) + 100


def test_message_that_cannot_be_sent_leaves_everything_as_it_was() -> None:
    pair = ProtocolPair().bring_to(Phase.WELCOMED)
    with pytest.raises(LocalProtocolError):
        pair.client.send(Open(bytes(16), bytes(32), {"a": object()}))
    assert pair.client.phase is Phase.WELCOMED
    pair.send(pair.client, SAMPLES["open"])
    assert pair.server.phase is Phase.OPENING


def test_messages_that_follow_a_bye_in_one_piece_are_dropped() -> None:
    pair = ProtocolPair().bring_to(Phase.RUNNING)
    seen = feed(
        pair.server, to_bytes(SAMPLES["begin"]) + to_bytes(SAMPLES["bye"]) + to_bytes(SAMPLES["begin"])
    )
    assert [message.kind for message in seen] == ["begin", "bye"]


# The handshake.


def test_ends_greet_each_other_without_the_applications_doing() -> None:
    pair = ProtocolPair()
    assert pair.deliver_replies() == ["hello", "welcome"]
    assert pair.client.phase is pair.server.phase is Phase.WELCOMED
    assert pair.client.established
    assert pair.server.established


def test_both_ends_know_what_the_other_said() -> None:
    pair = ProtocolPair(
        WireConfig(software="edge/1"), WireConfig(software="cloud/2", device="cuda:0", heartbeat_s=7)
    )
    pair.deliver_replies()
    for end in (pair.client, pair.server):
        assert end.hello is not None
        assert end.welcome is not None
        assert (end.hello.software, end.welcome.software, end.welcome.device) == (
            "edge/1",
            "cloud/2",
            "cuda:0",
        )
        assert end.heartbeat_s == 7.0
    assert pair.client.welcome == pair.server.welcome


def test_every_welcome_has_a_nonce_of_its_own() -> None:
    nonces = set()
    for _ in range(50):
        pair = ProtocolPair()
        pair.deliver_replies()
        assert pair.client.welcome is not None
        nonces.add(pair.client.welcome.nonce)
    assert len(nonces) == 50


@pytest.mark.parametrize(
    ("client", "server", "chosen"),
    [((1,), (1,), 1), ((1, 2), (2, 1), 2), ((3, 2, 1), (1, 2), 1), ((9, 2), (3, 2), 2)],
)
def test_server_chooses_the_version_that_it_prefers(
    client: tuple[int, ...], server: tuple[int, ...], chosen: int
) -> None:
    pair = ProtocolPair(WireConfig(versions=client), WireConfig(versions=server))
    pair.deliver_replies()
    assert pair.client.welcome is not None
    assert pair.client.welcome.version == chosen


def test_server_without_a_version_in_common_says_so() -> None:
    pair = ProtocolPair(WireConfig(versions=(7, 9)), WireConfig(versions=(1,)))
    hello = joined(pair.client.send(*pair.client.take_replies())[0])
    with pytest.raises(VersionMismatch, match="version 1, the other version 7, 9") as caught:
        feed(pair.server, hello)
    with pytest.raises(PeerError, match="upgrade the older one") as told:
        feed(pair.client, joined(pair.server.fail(caught.value)))
    assert told.value.code == "version_mismatch"
    assert pair.client.phase is pair.server.phase is Phase.CLOSED


def test_client_refuses_a_version_that_it_does_not_speak() -> None:
    pair = ProtocolPair().bring_to(Phase.GREETED)
    with pytest.raises(VersionMismatch, match="version 3, the other version 5"):
        feed(pair.client, to_bytes(replace(SAMPLES["welcome"], version=5)))  # type: ignore[type-var]


def test_client_that_speaks_no_version_at_all_is_refused() -> None:
    with pytest.raises(VersionMismatch, match="no version"):
        feed(ProtocolPair().server, to_bytes(replace(SAMPLES["hello"], versions=[])))  # type: ignore[type-var]


@pytest.mark.parametrize("role", Role, ids=name_of)
@pytest.mark.parametrize("phase", [Phase.START, Phase.GREETED, Phase.CHALLENGED, Phase.PROVED], ids=name_of)
def test_fields_of_what_may_not_come_yet_are_not_looked_at(phase: Phase, role: Role) -> None:
    with pytest.raises(RemoteProtocolError, match=f"sent open in phase {phase.value}"):
        feed(ProtocolPair().bring_to(phase).end(role), frame({"kind": "open", "spec": 7}))


# Limits.


def test_only_small_frames_without_payload_are_read_before_the_handshake() -> None:
    with pytest.raises(LimitExceeded, match="payload of 64 bytes"):
        feed(ProtocolPair().server, to_bytes(SAMPLES["forward"]))
    with pytest.raises(LimitExceeded, match="the limit is 4096"):
        feed(ProtocolPair().server, frame({"kind": "hello", "software": "x" * 5000}))


def test_hello_must_offer_room_for_an_error_message() -> None:
    hello = {"kind": "hello", "versions": [1], "software": "x", "max_header": 4095, "max_payload": 0}
    with pytest.raises(HeaderError, match="max_header"):
        feed(ProtocolPair().server, frame(hello))


def test_each_end_keeps_to_the_others_limits() -> None:
    small, large = Limits(5000, 63), Limits(1 << 20, 1 << 20)
    for client, server, allowed in ((small, large, Role.CLIENT), (large, small, Role.SERVER)):
        pair = ProtocolPair(WireConfig(limits=client), WireConfig(limits=server)).bring_to(Phase.RUNNING)
        sender = pair.end(allowed)
        (received,) = pair.send(sender, SAMPLES["forward"])
        assert as_sent(received) == as_sent(SAMPLES["forward"])
        with pytest.raises(LocalProtocolError, match="the peer accepts 63"):
            pair.other(sender).send(SAMPLES["forward"])


def test_each_end_enforces_its_own_limits_after_the_handshake() -> None:
    small = WireConfig(limits=Limits(5000, 63))
    for role in Role:
        pair = ProtocolPair(small, small).bring_to(Phase.RUNNING)
        with pytest.raises(LimitExceeded, match="payload of 64 bytes was declared and the limit is 63"):
            feed(pair.end(role), to_bytes(SAMPLES["forward"]))


def test_open_may_be_as_large_as_the_server_takes() -> None:
    pair = ProtocolPair().bring_to(Phase.WELCOMED)
    job = Open(bytes(16), bytes(32), {"text": "x" * 500_000})
    assert pair.send(pair.client, job) == [job]


# Heartbeats and clocks.


def test_ping_is_answered_with_the_times_of_arrival_and_departure() -> None:
    pair = ProtocolPair(server_ahead_ns=1000).bring_to(Phase.RUNNING)
    pair.now_ns = 50
    assert pair.send(pair.client, Ping(50)) == []
    pair.now_ns = 70
    assert pair.server.take_replies() == [Pong(50, 1050, 1050)]


def test_clocks_are_compared_by_eight_pings_in_a_row() -> None:
    pair = ProtocolPair(server_ahead_ns=1_000_000).bring_to(Phase.RUNNING)
    pair.client.heartbeat()
    kinds = pair.deliver_replies(delay_ns=500)
    assert kinds == ["ping", "pong"] * 8
    assert pair.client.clock.rtt_ns == 1000
    assert pair.client.clock.offset_ns == 1_000_000


def test_later_heartbeats_send_one_ping_each() -> None:
    pair = ProtocolPair().bring_to(Phase.RUNNING)
    pair.server.heartbeat()
    assert len(pair.deliver_replies()) == 16
    for _ in range(3):
        pair.server.heartbeat()
        assert pair.deliver_replies() == ["ping", "pong"]


def test_no_ping_is_sent_before_the_handshake_and_after_the_end() -> None:
    for phase in (Phase.START, Phase.GREETED, Phase.CLOSED):
        end = ProtocolPair().bring_to(phase).client
        end.take_replies()
        end.heartbeat()
        assert end.take_replies() == []


def test_silence_of_three_heartbeats_is_a_loss() -> None:
    pair = ProtocolPair(server=WireConfig(heartbeat_s=2.0)).bring_to(Phase.RUNNING)
    for end in (pair.client, pair.server):
        assert end.timeout_s == 6.0
        pair.now_ns = 5_999_999_999
        end.heartbeat()
        pair.now_ns = 6_000_000_000
        with pytest.raises(ConnectionLost, match=r"nothing came from the peer for 6\.0 s"):
            end.heartbeat()
        pair.now_ns = 0


def test_any_byte_ends_the_silence() -> None:
    pair = ProtocolPair().bring_to(Phase.RUNNING)
    pair.now_ns = 14_000_000_000
    feed(pair.server, to_bytes(SAMPLES["forward"])[:1])
    pair.now_ns = 28_000_000_000
    pair.server.heartbeat()


def test_silence_does_not_count_while_this_end_does_not_read() -> None:
    pair = ProtocolPair().bring_to(Phase.RUNNING)
    pair.now_ns = 60_000_000_000
    pair.server.heartbeat(listening=False)
    pair.now_ns += 14_000_000_000
    pair.server.heartbeat()


def test_timeout_can_be_set_for_one_end() -> None:
    pair = ProtocolPair(WireConfig(timeout_s=1.0)).bring_to(Phase.RUNNING)
    assert (pair.client.timeout_s, pair.server.timeout_s) == (1.0, 15.0)


def test_silence_before_the_welcome_has_its_own_limit() -> None:
    end = Protocol(Role.CLIENT, WireConfig(handshake_s=3.0), lambda: 0)
    assert end.timeout_s == 3.0


def test_silence_behind_a_rejoin_has_that_limit_too_until_somebody_answers() -> None:
    pair = ProtocolPair(WireConfig(handshake_s=3.0), WireConfig(handshake_s=3.0)).bring_to(Phase.REJOINING)
    assert (pair.client.timeout_s, pair.server.timeout_s) == (3.0, 15.0)
    pair.send(pair.server, SAMPLES["ping"])  # which it does at once, while the session is still looked for
    assert pair.client.timeout_s == 15.0


def test_dishonest_pong_does_not_spoil_the_clock() -> None:
    pair = ProtocolPair().bring_to(Phase.RUNNING)
    pair.client.heartbeat()
    pair.deliver_replies()
    before = (pair.client.clock.rtt_ns, pair.client.clock.offset_ns)
    feed(pair.client, to_bytes(Pong(2**62, 0, 0)) + to_bytes(Pong(0, 10, -10)) + to_bytes(Pong(0, 0, 2**62)))
    assert (pair.client.clock.rtt_ns, pair.client.clock.offset_ns) == before


# Errors and ends.


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (FrameError("x"), "bad_frame"),
        (HeaderError("x"), "bad_header"),
        (LimitExceeded("payload", 2, 1), "limit_exceeded"),
        (RemoteProtocolError("x"), "protocol_error"),
    ],
)
def test_peer_that_broke_the_protocol_is_told(error: RemoteProtocolError, code: str) -> None:
    pair = ProtocolPair().bring_to(Phase.RUNNING)
    with pytest.raises(PeerError) as told:
        feed(pair.client, joined(pair.server.fail(error)))
    assert (told.value.code, told.value.message) == (code, str(error))
    assert pair.client.phase is pair.server.phase is Phase.CLOSED


def test_long_reasons_fit_the_frame_that_is_allowed_before_the_handshake() -> None:
    pair = ProtocolPair().bring_to(Phase.GREETED)
    with pytest.raises(PeerError, match="€" * 512):
        feed(pair.client, joined(pair.server.fail(RemoteProtocolError("€" * 5000))))


@pytest.mark.parametrize(
    "error", [ForeignProtocol(b"GET "), PeerError("x", "y"), ConnectionLost("gone")], ids=repr
)
def test_peer_to_whom_it_is_no_use_is_not_told(error: Exception) -> None:
    assert ProtocolPair().bring_to(Phase.WELCOMED).server.fail(error) == []  # type: ignore[arg-type]


def test_nothing_is_said_after_the_end() -> None:
    assert ProtocolPair().bring_to(Phase.CLOSED).server.fail(RemoteProtocolError("x")) == []


def test_loss_says_whether_a_frame_was_under_way() -> None:
    pair = ProtocolPair().bring_to(Phase.RUNNING)
    assert pair.server.receive_eof().reason == "the peer went away without saying bye"
    data = to_bytes(SAMPLES["forward"])
    feed(pair.server, data[:5])
    assert "in the middle of a frame: 5 of at least 24" in pair.server.receive_eof().reason
    feed(pair.server, data[5:-10])
    assert "54 of 64 payload bytes" in pair.server.receive_eof().reason
    assert ProtocolPair().bring_to(Phase.CLOSED).client.receive_eof().reason == "the connection was closed"


def test_received_bytes_are_counted_headers_included() -> None:
    pair = ProtocolPair().bring_to(Phase.RUNNING)
    before = pair.server.received_bytes
    pair.send(pair.client, SAMPLES["forward"])
    assert pair.server.received_bytes - before == len(to_bytes(SAMPLES["forward"]))


# For all inputs.


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from([phase for phase in Phase if phase is not Phase.CLOSED]),
    st.sampled_from(list(Role)),
    st.lists(st.sampled_from(KINDS), max_size=8),
    st.binary(max_size=40),
)
def test_any_sequence_of_frames_is_taken_or_refused_with_a_typed_error(
    phase: Phase, role: Role, kinds: list[str], noise: bytes
) -> None:
    receiver = ProtocolPair().bring_to(phase).end(role)
    stream = b"".join(to_bytes(SAMPLES[kind]) for kind in kinds) + noise
    try:
        messages = feed(receiver, stream)
    except (RemoteProtocolError, PeerError):
        return
    assert not DEALT_WITH & {message.kind for message in messages}


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from([Forward, Bye, Ping, Hello, Welcome]), max_size=6))
def test_what_one_end_may_send_the_other_may_receive(types: list[type]) -> None:
    pair = ProtocolPair().bring_to(Phase.RUNNING)
    for message_type in types:
        try:
            data = joined(pair.client.send(SAMPLES[message_type.kind])[0])
        except LocalProtocolError:
            continue
        feed(pair.server, data)
        assert pair.client.phase is pair.server.phase

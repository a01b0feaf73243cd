"""Messages, their fields, and what a header may hold."""

import tracemalloc
from dataclasses import fields, replace
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.wire.pair import DESC, PAYLOAD, ROOMY, SAMPLES, as_sent, frame, joined, read_frames, to_bytes
from wire.errors import CorruptPayload, HeaderError, LocalProtocolError, RemoteProtocolError
from wire.fields import fits
from wire.frames import PRELUDE_SIZE, Frame, FrameReader, Limits
from wire.messages import (
    MESSAGE_TYPES,
    RULES,
    Backward,
    Begin,
    Bye,
    Challenge,
    Commit,
    Forward,
    Hello,
    Message,
    Open,
    Ping,
    Proof,
    Ready,
    Rejoin,
    Resume,
    Save,
    Saved,
    Weights,
    Welcome,
)
from wire.serialize import decode, encode


def received(data: bytes) -> Message:
    (one,) = read_frames(FrameReader(ROOMY), data)
    return decode(one)


def received_header(packed: bytes, payload: bytes = b"") -> Message:
    return decode(Frame(packed, memoryview(bytearray(payload)), PRELUDE_SIZE + len(packed) + len(payload)))


def opened(spec: dict[str, Any]) -> Open:
    return Open(bytes(16), bytes(32), spec)


def header_of(message: Message) -> dict[str, Any]:
    """A message's header, to be broken."""
    data = to_bytes(message)
    header: dict[str, Any] = msgpack.unpackb(data[24 : 24 + int.from_bytes(data[8:12], "big")])
    return header


def test_there_is_a_sample_of_every_kind() -> None:
    assert set(SAMPLES) == set(MESSAGE_TYPES)


@pytest.mark.parametrize("kind", SAMPLES)
def test_message_comes_back_as_it_was_sent(kind: str) -> None:
    assert as_sent(received(to_bytes(SAMPLES[kind]))) == as_sent(SAMPLES[kind])


@pytest.mark.parametrize("kind", SAMPLES)
def test_header_holds_the_kind_and_then_the_fields_in_their_order(kind: str) -> None:
    names = [f.name for f in fields(SAMPLES[kind]) if f.name != "payload"]
    assert list(header_of(SAMPLES[kind])) == ["kind", *names]


@pytest.mark.parametrize("kind", SAMPLES)
def test_fields_are_read_in_any_order(kind: str) -> None:
    message = SAMPLES[kind]
    turned = dict(reversed(header_of(message).items()))
    assert as_sent(received(frame(turned, bytes(getattr(message, "payload", b""))))) == as_sent(message)


@pytest.mark.parametrize(
    ("kind", "name"), [(kind, name) for kind in SAMPLES for name in RULES[MESSAGE_TYPES[kind]]]
)
def test_message_without_a_field_is_refused_and_the_field_named(kind: str, name: str) -> None:
    header = header_of(SAMPLES[kind])
    del header[name]
    with pytest.raises(HeaderError, match=rf"missing fields \['{name}'\]"):
        received(frame(header))


@pytest.mark.parametrize("kind", SAMPLES)
def test_message_with_a_field_more_is_refused(kind: str) -> None:
    with pytest.raises(HeaderError, match=r"unknown fields \['more'\]"):
        received(frame(header_of(SAMPLES[kind]) | {"more": 1}))


def test_keys_of_several_types_are_refused() -> None:
    with pytest.raises(HeaderError, match="unknown fields"):
        received(frame({"kind": "bye", "reason": "x", b"more": 1, "most": 2}))


# Every kind of field: a value that is just allowed, and those just beyond.

FIELDS: dict[str, tuple[Message, str, list[Any], list[Any]]] = {
    "step": (
        SAMPLES["begin"],
        "step",
        [0, 2**63 - 1],
        [-1, 2**63, 1.0, True, None, "1", [1]],
    ),
    "count": (SAMPLES["begin"], "chunks", [1, 2**31 - 1], [0, 2**31, False, 1.0]),
    "size": (SAMPLES["hello"], "max_payload", [0, 2**63 - 1], [-1, 2**63, 1.5]),
    "header limit": (SAMPLES["hello"], "max_header", [4096], [4095, -1, "4096"]),
    "nanoseconds": (SAMPLES["ping"], "t_ns", [-(2**63), 2**63 - 1], [2**63, 0.0, True, None]),
    "seconds": (
        SAMPLES["welcome"],
        "heartbeat_s",
        [0.01, 3600.0],
        [0.0, 3600.5, 5, float("nan"), float("inf"), None],
    ),
    "session id": (SAMPLES["open"], "session", [bytes(16)], [bytes(15), bytes(17), "x" * 16, None, 7]),
    "digest": (SAMPLES["open"], "secret", [bytes(32)], [bytes(31), bytes(33), "x" * 32, None]),
    "optional digest": (SAMPLES["welcome"], "mac", [None, bytes(32)], [b"", bytes(31), False]),
    "nonce": (SAMPLES["challenge"], "nonce", [bytes(32)], [bytes(31), None]),
    "optional step": (SAMPLES["resume"], "step", [None, 0, 2**63 - 1], [-1, 2**63, 1.0, True]),
    "steps": (SAMPLES["resume"], "saved", [[], [0, 5], [1] * 1024], [[1] * 1025, [-1], ["1"], None, 3]),
    "optional number": (
        SAMPLES["commit"],
        "scale",
        [None, 0.0, -1.5, float("inf")],
        [1, True, "1.0", [1.0]],
    ),
    "flag": (SAMPLES["begin"], "evaluate", [True, False], [0, 1, None, "true"]),
    "code": (SAMPLES["error"], "code", ["", "x" * 64, "ü" * 64], ["x" * 65, b"x", None]),
    "name": (SAMPLES["fetch"], "what", ["", "x" * 256], ["x" * 257, b"weights", 1]),
    "sentence": (SAMPLES["bye"], "reason", ["", "x" * 1024], ["x" * 1025, None]),
    "versions": (
        SAMPLES["hello"],
        "versions",
        [[], [0, 2**16], [1] * 64],
        [[1] * 65, [2**16 + 1], [-1], ["1"], [True], 1, {"1": 1}],
    ),
    "plain map": (
        SAMPLES["open"],
        "spec",
        [{}, {"a": [None, True, 1.5, -(2**63), 2**64 - 1, "s", b"b", {"c": []}]}, {"x": "x" * 70_000}],
        [None, [], "spec", {b"a": 1}, {"a": {b"b": 1}}],
    ),
}
ALLOWED = [(*FIELDS[what][:2], value) for what in FIELDS for value in FIELDS[what][2]]
FORBIDDEN = [(*FIELDS[what][:2], value) for what in FIELDS for value in FIELDS[what][3]]


@pytest.mark.parametrize(("message", "name", "value"), ALLOWED)
def test_value_within_the_range_crosses(message: Message, name: str, value: Any) -> None:
    changed = replace(message, **{name: value})
    assert as_sent(received(to_bytes(changed))) == as_sent(changed)


@pytest.mark.parametrize(("message", "name", "value"), FORBIDDEN)
def test_value_beyond_the_range_is_not_sent(message: Message, name: str, value: Any) -> None:
    with pytest.raises(LocalProtocolError, match=rf"{message.kind}\.{name} has to be"):
        to_bytes(replace(message, **{name: value}))


@pytest.mark.parametrize(("message", "name", "value"), FORBIDDEN)
def test_value_beyond_the_range_is_refused(message: Message, name: str, value: Any) -> None:
    with pytest.raises(HeaderError, match=rf"{message.kind}\.{name} has to be"):
        received(frame(header_of(message) | {name: value}))


def test_norm_that_is_not_a_number_crosses() -> None:
    message = received(to_bytes(replace(SAMPLES["backward"], norm_sq=float("nan"))))  # type: ignore[type-var]
    assert isinstance(message, Backward)
    assert message.norm_sq is not None
    assert np.isnan(message.norm_sq)


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


def test_plain_values_nest_sixteen_levels_and_no_more() -> None:
    assert received(to_bytes(opened({"a": nested(15)}))) == opened({"a": nested(15)})
    with pytest.raises(LocalProtocolError, match="16 levels"):
        to_bytes(opened({"a": nested(16)}))
    with pytest.raises(HeaderError, match="16 levels"):
        received(frame(header_of(SAMPLES["open"]) | {"spec": {"a": nested(16)}}))


@pytest.mark.parametrize("value", [list(range(65_537)), {str(n): n for n in range(4097)}])
def test_more_items_than_a_reader_takes_are_not_sent(value: Any) -> None:
    with pytest.raises(LocalProtocolError):
        to_bytes(opened({"a": value}))


@pytest.mark.parametrize(
    "message",
    [
        Bye("\ud800"),
        opened({"a": "\udfff"}),
        Weights(0, True, ["a"], [{"size": 0, "a": object()}]),
        Weights(0, True, ["a"], [{"size": 0, "a": 2**64}]),
    ],
    ids=["half a character", "half a character inside", "an object", "a huge number"],
)
def test_what_msgpack_does_not_carry_is_not_sent(message: Message) -> None:
    with pytest.raises(LocalProtocolError):
        to_bytes(message)


# Headers that are no messages.

NO_MESSAGES = {
    "nothing": b"",
    "a map cut short": b"\x82\xa4kind",
    "two maps": b"\x80\x80",
    "a reserved byte": b"\xc1",
    "text that is not UTF-8": b"\x81\xa4kind\xa2\xff\xff",
    "a list": b"\x91\x01",
    "a number": b"\x01",
    "nil": b"\xc0",
    "a map with numbers for keys": b"\x81\x01\x02",
    "a map with a list for a key": b"\x81\x90\x02",
    "an empty map": b"\x80",
    "no kind": msgpack.packb({"reason": "x"}),
    "a kind that is a number": msgpack.packb({"kind": 3}),
    "a kind that is bytes": msgpack.packb({"kind": b"bye", "reason": "x"}),
    "a kind that is a list": msgpack.packb({"kind": ["bye"]}),
    "an unknown kind": msgpack.packb({"kind": "dance"}),
    "an array that declares four billion items": b"\xdd\xff\xff\xff\xff",
    "a map that declares four billion items": b"\xdf\xff\xff\xff\xff",
    "text that declares four billion bytes": b"\xdb\xff\xff\xff\xff",
    "an extension": b"\x82\xa4kind\xa4open\xa4spec\x81\xa1a\xd4\x05\x01",
    "an extension of no bytes": b"\x82\xa4kind\xa4open\xa4spec\x81\xa1a\xc7\x00\x05",
    "a timestamp": b"\x82\xa4kind\xa4open\xa4spec\x81\xa1a\xd6\xff\x00\x00\x00\x01",
    "a timestamp of no bytes": b"\x82\xa4kind\xa4open\xa4spec\x81\xa1a\xc7\x00\xff",
    "a deep nest that ends": b"\x91" * 1000 + b"\xc0",
    "a deep nest that does not": b"\x91" * 2000,
    "a kind that is a deep nest": b"\x81\xa4kind" + b"\x91" * 1000 + b"\xc0",
    "a field that is a deep nest": b"\x82\xa4kind\xa3bye\xa6reason" + b"\x91" * 1000 + b"\xc0",
    "a spec that is a deep nest": b"\x82\xa4kind\xa4open\xa4spec" + b"\x81\xa1a" * 500 + b"\xc0",
}


@pytest.mark.parametrize("packed", NO_MESSAGES.values(), ids=NO_MESSAGES)
def test_header_that_is_no_message_is_refused(packed: bytes) -> None:
    with pytest.raises(HeaderError) as caught:
        received_header(packed)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("packed", [b"\x91" * 990 + b"\xc0", b"\x81\xa4kind" + b"\x91" * 990 + b"\xc0"])
def test_deep_nest_is_refused_from_deep_in_a_program(packed: bytes) -> None:
    def descend(levels: int) -> None:
        if levels:
            descend(levels - 1)
        else:
            received_header(packed)

    with pytest.raises(HeaderError):
        descend(300)


def test_arrays_that_declare_more_than_the_header_holds_take_no_memory() -> None:
    nest = b"\xdc\xff\xff" * 1000
    tracemalloc.start()
    try:
        with pytest.raises(HeaderError):
            received_header(nest)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes < 1 << 20


# Limits of the receiver.


def test_header_above_the_peers_limit_is_not_sent() -> None:
    with pytest.raises(LocalProtocolError, match="the peer accepts 4096"):
        encode(opened({"a": "x" * 5000}), Limits(4096, 0))


def test_payload_above_the_peers_limit_is_not_sent() -> None:
    message = SAMPLES["forward"]
    assert encode(message, Limits(4096, 64))
    with pytest.raises(LocalProtocolError, match="the peer accepts 63"):
        encode(message, Limits(4096, 63))


# Payloads.


def test_payload_is_sent_from_where_it_lies() -> None:
    values = np.arange(6, dtype=np.float32)
    buffers, size = encode(Forward(1, 0, False, ["x"], [DESC], [values, bytes(40)]), ROOMY)
    assert size == sum(len(buffer) for buffer in buffers)
    values[0] = 7
    assert joined(buffers[1:])[:4] == np.float32(7).tobytes()


def test_payload_is_received_where_it_lies() -> None:
    (one,) = read_frames(FrameReader(ROOMY), to_bytes(SAMPLES["forward"]))
    message = decode(one)
    assert isinstance(message, Forward)
    assert message.payload is one.payload


@pytest.mark.parametrize("payload", [PAYLOAD, [PAYLOAD], [PAYLOAD[:5], b"", PAYLOAD[5:]], bytearray(PAYLOAD)])
def test_payload_may_be_given_in_pieces(payload: Any) -> None:
    message = received(to_bytes(Forward(1, 0, False, ["x"], [DESC], payload)))
    assert isinstance(message, Forward)
    assert message.payload == PAYLOAD


def test_payload_with_gaps_in_memory_is_not_sent() -> None:
    with pytest.raises(LocalProtocolError, match="contiguous"):
        to_bytes(Forward(1, 0, False, ["x"], [DESC], np.zeros((6, 2), np.float32)[:, 0]))


@pytest.mark.parametrize("size", [0, 23, 24, 25, 63, 65, 128])
def test_payload_of_another_length_than_described_does_not_cross(size: int) -> None:
    with pytest.raises(LocalProtocolError, match="do not fit together"):
        to_bytes(Forward(1, 0, False, ["x"], [DESC], bytes(size)))
    with pytest.raises(CorruptPayload, match="payload bytes"):
        received(frame(header_of(SAMPLES["forward"]), bytes(size)))


@pytest.mark.parametrize("names", [[], ["x", "y"]])
def test_as_many_names_as_tensors_cross(names: list[str]) -> None:
    with pytest.raises(LocalProtocolError, match="do not fit together"):
        to_bytes(Forward(1, 0, False, names, [DESC], PAYLOAD))
    with pytest.raises(HeaderError, match=f"{len(names)} names, 1 tensors"):
        received(frame(header_of(SAMPLES["forward"]) | {"names": names}, PAYLOAD))


@pytest.mark.parametrize("kind", [kind for kind, sample in SAMPLES.items() if not hasattr(sample, "payload")])
def test_message_without_tensors_has_no_payload(kind: str) -> None:
    with pytest.raises(CorruptPayload, match="has no payload"):
        received(frame(header_of(SAMPLES[kind]), b"x"))


@pytest.mark.parametrize(
    "desc",
    [
        None,
        [],
        {},
        {"size": -1},
        {"size": 2**48 + 1},
        {"size": 1.0},
        {"size": True},
        {"parts": {}},
        {"parts": [{"size": "1"}]},
        {"parts": "abc"},
    ],
)
def test_description_without_sizes_is_refused(desc: Any) -> None:
    with pytest.raises(HeaderError, match=r"forward\.tensors has to be"):
        received(frame(header_of(SAMPLES["forward"]) | {"tensors": [desc]}, b""))


def test_descriptions_nest_sixteen_levels_and_no_more() -> None:
    desc: dict[str, Any] = {"size": 64}
    for _ in range(16):
        desc = {"parts": [desc]}
    header = header_of(SAMPLES["forward"])
    assert received(frame(header | {"tensors": [desc]}, bytes(64)))
    with pytest.raises(HeaderError):
        received(frame(header | {"tensors": [{"parts": [desc]}]}, bytes(64)))


@pytest.mark.parametrize(
    ("sizes", "length"),
    [([], 0), ([0], 0), ([1], 64), ([64], 64), ([65], 128), ([1, 1], 128), ([1, 0], 64), ([100, 0, 28], 192)],
)
def test_every_leaf_takes_a_multiple_of_64(sizes: list[int], length: int) -> None:
    descs = [{"size": size} for size in sizes]
    assert [n for n in range(400) if fits(descs, n)] == [length]
    assert [n for n in range(400) if fits([{"parts": descs}], n)] == [length]


# For all inputs.

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False)
    | TEXT
    | st.binary(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=10,
)
WILD = PLAIN | st.floats() | st.dictionaries(st.binary(max_size=4) | TEXT, PLAIN, max_size=3)
PLAIN_MAP = st.dictionaries(TEXT, PLAIN, max_size=4)
STEP = st.integers(0, 2**63 - 1)
NUMBER = st.none() | st.floats(allow_nan=False)
NANOSECONDS = st.integers(-(2**63), 2**63 - 1)
LEAF = st.integers(0, 200).map(lambda size: {"size": size})
DESCS = st.recursive(
    LEAF,
    lambda inner: st.lists(inner, max_size=3).map(lambda parts: {"codec": "c", "meta": {}, "parts": parts}),
    max_leaves=5,
)
TENSORS = st.lists(st.tuples(TEXT, DESCS), max_size=4)


def lengths(descs: list[dict[str, Any]]) -> int:
    def leaves(desc: dict[str, Any]) -> int:
        parts = desc.get("parts")
        return -(-desc["size"] // 64) * 64 if parts is None else sum(map(leaves, parts))

    return sum(map(leaves, descs))


def with_tensors(make: Any, *values: st.SearchStrategy[Any]) -> st.SearchStrategy[Message]:
    def build(parts: tuple[Any, ...]) -> Message:
        *given_values, tensors = parts
        descs = [desc for _, desc in tensors]
        payload = bytes(range(256)) * (lengths(descs) // 256 + 1)
        message: Message = make(
            *given_values,
            names=[name for name, _ in tensors],
            tensors=descs,
            payload=payload[: lengths(descs)],
        )
        return message

    return st.tuples(*values, TENSORS).map(build)


DIGEST, SESSION = st.binary(min_size=32, max_size=32), st.binary(min_size=16, max_size=16)
MESSAGES = st.one_of(
    st.builds(
        Hello,
        st.lists(st.integers(0, 2**16), max_size=64),
        TEXT,
        st.integers(4096, 2**63 - 1),
        st.integers(0, 2**63 - 1),
    ),
    st.builds(
        Welcome,
        st.integers(0, 2**63 - 1),
        TEXT,
        st.integers(4096, 2**63 - 1),
        st.integers(0, 2**63 - 1),
        DIGEST,
        st.none() | DIGEST,
        st.floats(0.01, 3600.0),
        TEXT,
    ),
    st.builds(Challenge, DIGEST),
    st.builds(Proof, DIGEST, DIGEST),
    st.builds(Open, SESSION, DIGEST, PLAIN_MAP),
    st.builds(Resume, SESSION, DIGEST, st.none() | STEP, st.booleans(), NUMBER, st.lists(STEP, max_size=5)),
    st.builds(
        Rejoin,
        st.integers(0, 2**63 - 1),
        st.integers(4096, 2**63 - 1),
        st.integers(0, 2**63 - 1),
        SESSION,
        DIGEST,
        DIGEST,
        STEP,
        st.booleans(),
        NUMBER,
    ),
    st.builds(Ready, STEP, st.booleans(), st.booleans(), TEXT, TEXT, DIGEST, st.none() | DIGEST, PLAIN_MAP),
    st.builds(Save, STEP, STEP),
    st.builds(Saved, STEP, TEXT),
    st.builds(Begin, STEP, st.integers(1, 2**31 - 1), st.booleans()),
    st.builds(Commit, STEP, NUMBER),
    st.builds(Ping, NANOSECONDS),
    st.builds(Bye, TEXT),
    with_tensors(
        lambda step, chunk, evaluate, **rest: Forward(step, chunk, evaluate, **rest),
        STEP,
        STEP,
        st.booleans(),
    ),
    with_tensors(
        lambda step, chunk, norm_sq, **rest: Backward(step, chunk, norm_sq=norm_sq, **rest),
        STEP,
        STEP,
        NUMBER,
    ),
    with_tensors(lambda seq, last, **rest: Weights(seq, last, **rest), STEP, st.booleans()),
)


@settings(max_examples=300, deadline=None)
@given(MESSAGES)
def test_every_valid_message_comes_back_exactly(message: Message) -> None:
    assert as_sent(received(to_bytes(message))) == as_sent(message)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_arbitrary_bytes_for_a_header_are_a_typed_error(noise: bytes) -> None:
    try:
        received_header(noise)
    except RemoteProtocolError:
        return
    raise AssertionError("noise was taken for a message")


@settings(max_examples=200, deadline=None)
@given(WILD)
def test_arbitrary_values_for_a_header_are_a_typed_error(value: Any) -> None:
    with pytest.raises(HeaderError):
        received_header(msgpack.packb(value))


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(sorted(SAMPLES)), st.data())
def test_message_with_arbitrary_values_in_it_is_good_or_a_typed_error(kind: str, data: st.DataObject) -> None:
    header = header_of(SAMPLES[kind])
    for name in data.draw(st.lists(st.sampled_from(sorted(header)), min_size=1, max_size=3)):
        header[name] = data.draw(WILD)
    header |= data.draw(st.dictionaries(TEXT | st.binary(max_size=4), PLAIN, max_size=2))
    payload = bytes(getattr(SAMPLES[kind], "payload", b""))
    try:
        message = received_header(msgpack.packb(header), payload)
    except RemoteProtocolError:
        return
    assert header_of(message) == header or header != header  # NaN is not equal to itself


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(["weights", "forward", "backward"]), DESCS | PLAIN, st.integers(0, 300))
def test_arbitrary_descriptions_fit_the_payload_or_are_a_typed_error(
    kind: str, desc: Any, nbytes: int
) -> None:
    header = header_of(SAMPLES[kind]) | {"tensors": [desc]}
    try:
        received_header(msgpack.packb(header), bytes(nbytes))
    except RemoteProtocolError:
        return
    assert nbytes == lengths([desc])


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(sorted(SAMPLES)), st.data())
def test_header_with_a_changed_byte_is_a_message_or_a_typed_error(kind: str, data: st.DataObject) -> None:
    stream = to_bytes(SAMPLES[kind])
    header_end = 24 + int.from_bytes(stream[8:12], "big")
    packed = bytearray(stream[24:header_end])
    packed[data.draw(st.integers(0, len(packed) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        message = received_header(bytes(packed), stream[header_end:])
    except RemoteProtocolError:
        return
    assert message.kind in MESSAGE_TYPES


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(sorted(SAMPLES)), st.data())
def test_header_cut_short_is_a_typed_error(kind: str, data: st.DataObject) -> None:
    packed = msgpack.packb(header_of(SAMPLES[kind]))
    with pytest.raises(HeaderError):
        received_header(packed[: data.draw(st.integers(0, len(packed) - 1))])

"""Frames: cutting a stream of bytes."""

import contextlib
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.wire.pair import ROOMY, SAMPLES, CountingPool, read_frames, to_bytes
from wire.errors import ForeignProtocol, FrameError, LimitExceeded, RemoteProtocolError
from wire.frames import (
    MAX_SPLIT,
    PRELUDE_SIZE,
    Frame,
    FrameReader,
    Limits,
    encode_frame_head,
    encode_piece_head,
    padding,
    split_frame_head,
)

LIMITS = Limits(max_header=100, max_payload=1000)

GOLDEN_PIECES = (
    "495354480101 0002000000010000 000000000005d809 c2e3804953544801 0200020000000000 0000"
    "0000000003e4 e692016162634953 5448010200020000 0000000000000000 000293e1a2976465"
)


def prelude(
    header: bytes,
    payload_len: int,
    *,
    magic: bytes = b"ISTH",
    frame_format: int = 1,
    flags: int = 0,
    number: int = 0,
    header_len: int | None = None,
) -> bytes:
    """A prelude written from the protocol's description alone."""
    fields = struct.pack(
        "!4sBBHIQ",
        magic,
        frame_format,
        flags,
        number,
        len(header) if header_len is None else header_len,
        payload_len,
    )
    return fields + struct.pack("!I", zlib.crc32(fields + header))


def whole(header: bytes, payload: bytes = b"") -> bytes:
    return encode_frame_head(header, len(payload)) + payload


def contents(frames: list[Frame]) -> list[tuple[bytes, bytes, int]]:
    return [(frame.header, bytes(frame.payload), frame.size) for frame in frames]


def test_head_of_a_frame_is_as_described() -> None:
    head = encode_frame_head(b"header", 77)
    assert head == prelude(b"header", 77) + b"header"
    assert head[:20].hex() == "49535448" + "01" + "00" + "0000" + "00000006" + "000000000000004d"


def test_checksum_is_that_of_zlib_over_prelude_and_header() -> None:
    head = encode_frame_head(b"header", 77)
    assert int.from_bytes(head[20:24], "big") == zlib.crc32(head[:20] + b"header")


def test_frame_is_read_back() -> None:
    (frame,) = read_frames(FrameReader(LIMITS), whole(b"header", b"payload"))
    assert frame.header == b"header"
    assert frame.payload == b"payload"
    assert frame.size == PRELUDE_SIZE + 6 + 7


def test_frame_without_header_and_payload_is_a_frame() -> None:
    assert contents(read_frames(FrameReader(LIMITS), whole(b"") * 3)) == [(b"", b"", 24)] * 3


def test_frames_that_come_at_once_are_all_read() -> None:
    stream = whole(b"a") + whole(b"b", b"payload") + whole(b"c", bytes(900)) + whole(b"d")
    headers = [frame.header for frame in read_frames(FrameReader(LIMITS), stream)]
    assert headers == [b"a", b"b", b"c", b"d"]


def test_stream_that_comes_byte_by_byte_gives_the_same_frames() -> None:
    stream = whole(b"a", b"xyz") + whole(b"b" * 100, bytes(1000)) + whole(b"c")
    piecewise = read_frames(FrameReader(LIMITS), stream, [1] * len(stream))
    assert contents(piecewise) == contents(read_frames(FrameReader(LIMITS), stream))


def test_header_larger_than_what_is_read_at_once_arrives_whole() -> None:
    header = bytes(range(256)) * 400
    reader = FrameReader(ROOMY)
    stream = whole(b"small", b"p" * 5000) + whole(header, b"payload") + whole(b"after")
    frames = read_frames(reader, stream, [777] * 1000)
    assert [frame.header for frame in frames] == [b"small", header, b"after"]


def test_memory_of_a_large_header_is_let_go() -> None:
    reader = FrameReader(ROOMY)
    read_frames(reader, whole(bytes(1 << 20)))
    assert len(reader.next_buffer()) <= 1 << 13


def test_next_buffer_is_never_empty_while_frames_are_taken_out() -> None:
    reader = FrameReader(ROOMY)
    for _ in range(500):
        read_frames(reader, whole(b"x" * 37, b"y" * 11), [13] * 100)
        assert len(reader.next_buffer()) > 0


def test_payload_stays_where_it_was_received() -> None:
    reader = FrameReader(ROOMY)
    payload = bytes(range(256)) * 1000
    assert read_frames(reader, whole(b"header", payload)[:PRELUDE_SIZE]) == []
    assert read_frames(reader, b"header") == []
    received_into = np.frombuffer(reader.next_buffer(), np.uint8)
    (frame,) = read_frames(reader, payload)
    kept = np.frombuffer(frame.payload, np.uint8)
    assert kept.__array_interface__["data"] == received_into.__array_interface__["data"]


def test_payload_is_writable_and_aligned() -> None:
    frames = read_frames(FrameReader(ROOMY), b"".join(whole(b"h", bytes(n)) for n in (1, 100, 5000, 100_000)))
    for frame in frames:
        assert not frame.payload.readonly
        assert np.frombuffer(frame.payload, np.uint8).__array_interface__["data"][0] % 64 == 0


def test_payloads_of_frames_that_are_kept_do_not_change() -> None:
    reader = FrameReader(ROOMY)
    frames = [read_frames(reader, whole(b"h", bytes([n]) * 40_000))[0] for n in range(8)]
    assert all(bytes(frame.payload) == bytes([n]) * 40_000 for n, frame in enumerate(frames))


def test_payloads_that_nobody_keeps_share_one_buffer() -> None:
    reader = FrameReader(ROOMY)
    addresses = set()
    for _ in range(8):
        (frame,) = read_frames(reader, whole(b"h", bytes(40_000)))
        addresses.add(np.frombuffer(frame.payload, np.uint8).__array_interface__["data"][0])
        del frame
    assert len(addresses) == 1


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        (prelude(b"", 0, frame_format=2), "format 2"),
        (prelude(b"", 0, flags=1), "flags 1"),
        (prelude(b"", 0, flags=2), "flags 2"),
        (prelude(b"", 9, flags=3, number=1), "flags 3"),
        (prelude(b"", 0, number=1), "number 1"),
        (prelude(b"xy", 0) + b"xz", "checksum"),
        (prelude(b"xy", 0)[:-1] + b"\x00" + b"xy", "checksum"),
    ],
)
def test_bytes_that_are_no_frame_are_refused(broken: bytes, says: str) -> None:
    with pytest.raises(FrameError, match=says):
        read_frames(FrameReader(LIMITS), broken)


def test_wrong_magic_at_the_start_is_another_protocol() -> None:
    with pytest.raises(ForeignProtocol, match="does not speak") as caught:
        read_frames(FrameReader(LIMITS), b"SSH-2.0-OpenSSH")
    assert not caught.value.http


@pytest.mark.parametrize("first", [b"HTTP/1.1 400", b"GET / HTTP", b"POST", b"PRI * HTTP/2.0"])
def test_http_is_known_by_its_first_four_bytes(first: bytes) -> None:
    with pytest.raises(ForeignProtocol, match="HTTP") as caught:
        read_frames(FrameReader(LIMITS), first[:4], [1] * 4)
    assert caught.value.http


def test_wrong_magic_later_is_a_damaged_stream() -> None:
    with pytest.raises(FrameError, match="damaged") as caught:
        read_frames(FrameReader(LIMITS), whole(b"a") + prelude(b"", 0, magic=b"GET "))
    assert not isinstance(caught.value, ForeignProtocol)


@pytest.mark.parametrize(
    ("what", "header_len", "payload_len"),
    [("header", 101, 0), ("header", 2**32 - 1, 0), ("payload", 0, 1001), ("payload", 0, 2**64 - 1)],
)
def test_declared_size_above_the_limit_is_refused_before_anything_is_allocated(
    what: str, header_len: int, payload_len: int
) -> None:
    pool = CountingPool()
    reader = FrameReader(LIMITS, pool)
    with pytest.raises(LimitExceeded) as caught:
        read_frames(reader, prelude(b"", payload_len, header_len=header_len))
    assert (caught.value.what, caught.value.size) == (what, header_len or payload_len)
    assert pool.taken == []
    assert len(reader.next_buffer()) <= 1 << 13


def test_sizes_at_the_limit_are_accepted() -> None:
    stream = whole(bytes(100), bytes(1000))
    assert contents(read_frames(FrameReader(LIMITS), stream)) == [(bytes(100), bytes(1000), 1124)]


def test_nothing_is_allocated_for_a_payload_whose_header_is_damaged() -> None:
    pool = CountingPool()
    with pytest.raises(FrameError):
        read_frames(FrameReader(LIMITS, pool), prelude(b"xy", 1000) + b"xz")
    assert pool.taken == []


def test_limits_may_change_between_frames() -> None:
    reader = FrameReader(Limits(10, 0))
    read_frames(reader, whole(b"a"))
    reader.limits = LIMITS
    assert len(read_frames(reader, whole(b"b" * 50, bytes(500)))) == 1


def test_reader_knows_how_far_a_frame_has_come() -> None:
    reader = FrameReader(LIMITS)
    assert not reader.mid_frame
    read_frames(reader, whole(b"header", bytes(100))[:10])
    assert reader.mid_frame
    assert reader.progress == "10 of at least 24 header bytes had arrived"
    read_frames(reader, whole(b"header", bytes(100))[10:50])
    assert reader.mid_frame
    assert reader.progress == "20 of 100 payload bytes had arrived"
    read_frames(reader, bytes(80))
    assert not reader.mid_frame


@pytest.mark.parametrize("nbytes", [0, 1, 63, 64, 65, 1000])
def test_padding_leads_to_the_next_multiple_of_64(nbytes: int) -> None:
    zeros = padding(nbytes)
    assert (nbytes + len(zeros)) % 64 == 0
    assert zeros == bytes(len(zeros))
    assert len(zeros) < 64


# For all inputs.

FRAMES = st.lists(
    st.tuples(
        st.binary(max_size=100),
        st.integers(0, 1000) | st.sampled_from([511, 512, 513, 4071, 4072, 4096, 5000]),
    ),
    max_size=6,
)
PIECES = st.lists(st.integers(1, 700), max_size=60)


@settings(max_examples=150, deadline=None)
@given(FRAMES, PIECES)
def test_stream_gives_the_same_frames_however_it_is_cut(
    parts: list[tuple[bytes, int]], pieces: list[int]
) -> None:
    sent = [(header, (header + b"payload")[:9] * (nbytes // 9 + 1)) for header, nbytes in parts]
    sent = [(header, body[:nbytes]) for (header, body), (_, nbytes) in zip(sent, parts, strict=True)]
    stream = b"".join(whole(header, payload) for header, payload in sent)
    reader = FrameReader(ROOMY)
    frames = read_frames(reader, stream, pieces)
    assert [(frame.header, bytes(frame.payload)) for frame in frames] == sent
    assert sum(frame.size for frame in frames) == len(stream)
    assert not reader.mid_frame


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=300), st.booleans(), PIECES)
def test_arbitrary_bytes_are_refused_with_a_typed_error_or_wait_for_more(
    noise: bytes, after_a_frame: bool, pieces: list[int]
) -> None:
    pool = CountingPool()
    reader = FrameReader(LIMITS, pool)
    with contextlib.suppress(RemoteProtocolError):
        read_frames(reader, (whole(b"a") if after_a_frame else b"") + noise, pieces)
    assert all(taken <= LIMITS.max_payload + 4096 for taken in pool.taken)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1), st.binary(max_size=100), PIECES)
def test_whatever_sizes_are_declared_nothing_is_allocated_beyond_the_limits(
    header_len: int, payload_len: int, rest: bytes, pieces: list[int]
) -> None:
    pool = CountingPool()
    reader = FrameReader(LIMITS, pool)
    with contextlib.suppress(RemoteProtocolError):
        read_frames(reader, prelude(rest, payload_len, header_len=header_len) + rest, pieces)
    assert all(taken <= LIMITS.max_payload + 4096 for taken in pool.taken)
    assert len(reader.next_buffer()) <= 1 << 13


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(sorted(SAMPLES)), st.data())
def test_truncated_frame_is_no_frame_yet(kind: str, data: st.DataObject) -> None:
    stream = to_bytes(SAMPLES[kind])
    reader = FrameReader(ROOMY)
    assert read_frames(reader, stream[: data.draw(st.integers(0, len(stream) - 1))]) == []


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(sorted(SAMPLES)), st.data())
def test_single_changed_byte_of_prelude_or_header_is_always_noticed(kind: str, data: st.DataObject) -> None:
    stream = bytearray(to_bytes(SAMPLES[kind]))
    head_len = PRELUDE_SIZE + int.from_bytes(stream[8:12], "big")
    at = data.draw(st.integers(0, head_len - 1))
    stream[at] ^= data.draw(st.integers(1, 255))
    reader = FrameReader(ROOMY)
    try:
        frames = read_frames(reader, bytes(stream))
    except RemoteProtocolError:
        return
    # A changed length asks for more than there is, which the checksum will tell once it has come.
    assert 8 <= at < 20
    assert frames == []
    assert reader.mid_frame


# Frames in pieces.


def split(header: bytes, payload_len: int, number: int) -> bytes:
    return split_frame_head(encode_frame_head(header, payload_len), number)


def piece(number: int, data: bytes) -> bytes:
    return encode_piece_head(number, len(data)) + data


def test_heads_of_a_frame_in_pieces_are_as_described() -> None:
    assert split(b"header", 77, 3) == prelude(b"header", 77, flags=1, number=3) + b"header"
    assert encode_piece_head(3, 50) == prelude(b"", 50, flags=2, number=3)


def test_frame_in_pieces_is_these_bytes() -> None:
    sent = split(b"\x80", 5, 2) + piece(2, b"abc") + piece(2, b"de")
    assert sent.hex(" ", 8) == GOLDEN_PIECES


def test_frame_in_pieces_is_read_whole_once_the_last_has_come() -> None:
    reader = FrameReader(LIMITS)
    assert read_frames(reader, split(b"header", 7, 1) + piece(1, b"pay")) == []
    assert reader.mid_frame
    assert reader.progress == "3 of 7 payload bytes had arrived"
    (frame,) = read_frames(reader, piece(1, b"load"))
    assert contents([frame]) == [(b"header", b"payload", 3 * PRELUDE_SIZE + 6 + 7)]
    assert not reader.mid_frame


def test_other_frames_come_between_pieces() -> None:
    stream = split(b"large", 8, 2) + piece(2, b"abcd") + whole(b"urgent", b"now") + piece(2, b"efgh")
    assert [(f.header, bytes(f.payload)) for f in read_frames(FrameReader(LIMITS), stream)] == [
        (b"urgent", b"now"),
        (b"large", b"abcdefgh"),
    ]


def test_only_what_is_sure_to_come_counts_as_missing() -> None:
    reader = FrameReader(LIMITS)
    read_frames(reader, split(b"h", 100, 1))
    assert reader.missing == 0
    read_frames(reader, piece(1, bytes(30))[:-10])
    assert reader.missing == 10
    read_frames(reader, bytes(10))
    assert reader.missing == 0


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_frames_in_pieces_come_out_however_they_are_interleaved_and_cut(data: st.DataObject) -> None:
    payloads = data.draw(st.lists(st.binary(min_size=1, max_size=3000), min_size=1, max_size=MAX_SPLIT))
    left = dict(enumerate(payloads))
    stream = b"".join(split(b"h%d" % number, len(payload), number) for number, payload in left.items())
    while left:
        number = data.draw(st.sampled_from(sorted(left)))
        length = data.draw(st.integers(1, len(left[number])))
        stream += piece(number, left[number][:length])
        left[number] = left[number][length:]
        if not left[number]:
            del left[number]
        if data.draw(st.booleans()):
            stream += whole(b"between", b"x" * length)
    cuts = data.draw(st.lists(st.integers(1, 700), max_size=50))
    frames = read_frames(FrameReader(ROOMY), stream, cuts)
    got = {frame.header: bytes(frame.payload) for frame in frames if frame.header != b"between"}
    assert got == {b"h%d" % number: payload for number, payload in enumerate(payloads)}
    assert sum(frame.size for frame in frames) == len(stream)


@pytest.mark.parametrize(
    ("stream", "error", "says"),
    [
        (piece(1, b"x"), FrameError, "none of a frame"),
        (split(b"h", 4, 1) + piece(2, b"x"), FrameError, "none of a frame"),
        (split(b"h", 4, 1) + piece(1, b"12345"), FrameError, "none of a frame"),
        (split(b"h", 4, 1) + piece(1, b"1234") + piece(1, b"5"), FrameError, "none of a frame"),
        (split(b"h", 4, 1) + prelude(b"x", 2, flags=2, number=1) + b"x12", FrameError, "none of a frame"),
        (split(b"h", 4, 1) * 2, FrameError, "the number 1"),
        (split(b"h", 1001, 1), LimitExceeded, "payload of 1001"),
        (
            b"".join(split(b"h", 4, number) for number in range(MAX_SPLIT + 1)),
            LimitExceeded,
            "number of frames in pieces",
        ),
    ],
)
def test_pieces_that_make_no_frame_are_refused(
    stream: bytes, error: type[RemoteProtocolError], says: str
) -> None:
    with pytest.raises(error, match=says):
        read_frames(FrameReader(LIMITS), stream)

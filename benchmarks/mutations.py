"""Frames that are almost right: each mutation changes one thing of a real frame.

The checksum is made right again wherever that lets the mutation come further, for a frame that fails its checksum
is seen by no check behind it.
"""

from __future__ import annotations

import copy
import random
import struct
import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import msgpack

from wire.messages import MESSAGE_TYPES, RULES, Message
from wire.prelude import FIELDS, MAGIC, PIECE, SPLIT, encode_frame_head, encode_piece_head, split_frame_head


class RealFrame(NamedTuple):
    """A frame of a real client: its header as msgpack read it, and its payload."""

    header: dict[str, Any]
    payload: bytes

    @property
    def kind(self) -> str:
        """The message's."""
        return str(self.header.get("kind"))

    @classmethod
    def of(cls, message: Message) -> RealFrame:
        """The frame of a message without a payload."""
        fields = {name: getattr(message, name) for name in RULES[type(message)]}
        return cls({"kind": message.kind, **fields}, b"")

    def encode(self) -> bytes:
        """As it went over the wire."""
        return encode_frame_head(msgpack.packb(self.header), len(self.payload)) + self.payload


Mutation = Callable[[random.Random, RealFrame, Sequence[RealFrame]], bytes]

ODD_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2**31, 2**63 - 1, 2**63, 2**64 - 1, -(2**63)),
    *(0.0, -0.0, float("nan"), float("inf"), 1e308, 5e-324),
    *("", "x" * 5000, "\0", "../../etc/passwd", "\ud7ff", b"", b"\0" * 32, b"\xff" * 70_000),
    *([], {}, [0] * 5000, [[]] * 500, {"": 0}, {"parts": []}, [None, 1, "a", b"b", {}]),
)


def prelude(header_len: int, payload_len: int, *, flags: int = 0, number: int = 0, form: int = 1) -> bytes:
    """A prelude with a checksum that would be right for a frame without a header."""
    fields = FIELDS.pack(MAGIC, form, flags, number, header_len, payload_len)
    return fields + struct.pack("!I", zlib.crc32(fields))


def flip_bits(draw: random.Random, frame: RealFrame, others: Sequence[RealFrame]) -> bytes:
    """One to eight bits of the whole frame."""
    return _flipped(draw, frame.encode())


def flip_header_bits(draw: random.Random, frame: RealFrame, others: Sequence[RealFrame]) -> bytes:
    """Bits of the header, the checksum right."""
    header = _flipped(draw, msgpack.packb(frame.header))
    return encode_frame_head(header, len(frame.payload)) + frame.payload


def swap_fields(draw: random.Random, frame: RealFrame, others: Sequence[RealFrame]) -> bytes:
    """Two fields' values, the one for the other."""
    header = dict(frame.header)
    one, other = draw.choice(list(header)), draw.choice(list(header))
    header[one], header[other] = header[other], header[one]
    return RealFrame(header, frame.payload).encode()


def odd_field(draw: random.Random, frame: RealFrame, others: Sequence[RealFrame]) -> bytes:
    """Some value, anywhere in the header, becomes another."""
    header = copy.deepcopy(frame.header)
    place: Any = header
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = draw.choice(keys)
        if not isinstance(place[key], (dict, list)) or not place[key] or draw.random() < 0.3:
            break
        place = place[key]
    value = place[key]
    near = [value + 1, value - 1, -value, value * 2] if type(value) is int and abs(value) < 2**61 else []
    place[key] = draw.choice([*ODD_VALUES, *near, *near])
    return RealFrame(header, frame.payload).encode()


def field_missing(draw: random.Random, frame: RealFrame, others: Sequence[RealFrame]) -> bytes:
    """One field less."""
    header = dict(frame.header)
    del header[draw.choice(list(header))]
    return RealFrame(header, frame.payload).encode()


def field_added(draw: random.Random, frame: RealFrame, others: Sequence[RealFrame]) -> bytes:
    """A field that the message does not have, or that another message has."""
    header = {**draw.choice(others).header, **frame.header}
    header[draw.choice(["x", "kind2", "__class__"])] = draw.choice(ODD_VALUES)
    return RealFrame(header, frame.payload).encode()


def kind_of_another(draw: random.Random, frame: RealFrame, others: Sequence[RealFrame]) -> bytes:
    """The fields of one message under the name of another."""
    kind = draw.choice([*MESSAGE_TYPES, "nonsense"])
    return RealFrame({**frame.header, "kind": kind}, frame.payload).encode()


def out_of_order(draw: random.Random, frame: RealFrame, others: Sequence[RealFrame]) -> bytes:
    """Some other frame of the session, as it was."""
    return draw.choice(others).encode()


def repeated(draw: random.Random, frame: RealFrame, others: Sequence[RealFrame]) -> bytes:
    """Two to five times."""
    return frame.encode() * draw.randint(2, 5)


def truncated(draw: random.Random, frame: RealFrame, others: Sequence[RealFrame]) -> bytes:
    """Its beginning."""
    data = frame.encode()
    return data[: draw.randrange(len(data))]


def bytes_lost(draw: random.Random, frame: RealFrame, others: Sequence[RealFrame]) -> bytes:
    """A piece from its middle is missing, and a frame follows."""
    data = frame.encode()
    first = draw.randrange(len(data))
    return data[:first] + data[first + draw.randint(1, 64) :] + draw.choice(others).encode()


def huge_sizes(draw: random.Random, frame: RealFrame, others: Sequence[RealFrame]) -> bytes:
    """Lengths that are declared and do not come."""
    header_len = draw.choice([0, 1, 4096, 4097, 1 << 20, (1 << 20) + 1, 2**31, 2**32 - 1])
    payload_len = draw.choice([0, 1, 1 << 30, (1 << 30) + 1, 2**40, 2**63, 2**64 - 1])
    return prelude(header_len, payload_len) + frame.encode()[24:]


def header_declares_much(draw: random.Random, frame: RealFrame, others: Sequence[RealFrame]) -> bytes:
    """A list, map, string or extension of four billion items, of which a few come."""
    opening = draw.choice([b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xdb\xff\xff\xff\xff"])
    extension = b"\xc9\xff\xff\xff\xff\x01"
    header = draw.choice([opening, extension, b"\x81\xa4kind" + opening, b"\xdc\xff\xff" + b"\xc0" * 65535])
    return encode_frame_head(header + bytes(draw.randrange(8)), 0)


def deep_nesting(draw: random.Random, frame: RealFrame, others: Sequence[RealFrame]) -> bytes:
    """Lists in lists, maps in maps, thousands deep."""
    opening = draw.choice([b"\x91", b"\x81\xa1a", b"\x81\xa4spec", b"\x81\xa5parts"])
    depth = draw.choice([15, 17, 600, 1300])
    nested = opening * depth + b"\xc0"
    if draw.random() < 0.5:
        return encode_frame_head(nested, 0)
    packed = msgpack.packb(frame.header)
    return encode_frame_head(bytes([packed[0] + 1]) + packed[1:] + b"\xa1x" + nested, 0)


def payload_noise(draw: random.Random, frame: RealFrame, others: Sequence[RealFrame]) -> bytes:
    """The payload is noise of the same length."""
    return frame._replace(payload=draw.randbytes(len(frame.payload))).encode()


def payload_resized(draw: random.Random, frame: RealFrame, others: Sequence[RealFrame]) -> bytes:
    """The payload is longer or shorter than its descriptions say."""
    payload = frame.payload
    new = payload + draw.randbytes(draw.randint(1, 300)) if draw.random() < 0.5 else payload[:-64]
    return frame._replace(payload=new).encode()


def in_odd_pieces(draw: random.Random, frame: RealFrame, others: Sequence[RealFrame]) -> bytes:
    """A frame in pieces: right ones, of a wrong number, too many, too long, nested, or never finished."""
    payload = frame.payload or b"abcd"
    head = split_frame_head(encode_frame_head(msgpack.packb(frame.header), len(payload)), 7)
    half = max(1, len(payload) // 2)
    first = encode_piece_head(7, half) + payload[:half]
    second = encode_piece_head(7, len(payload) - half) + payload[half:] if payload[half:] else b""
    return draw.choice(
        [
            head + first + draw.choice(others).encode() + second,
            head + encode_piece_head(8, half) + payload[:half],
            head + first + first + second + second,
            head + encode_piece_head(7, len(payload) + 1) + payload + b"x",
            head + head,
            head * 2 + first,
            b"".join(split_frame_head(encode_frame_head(b"\x80", 2**29), number) for number in range(1, 10)),
            prelude(0, 0, flags=SPLIT, number=7),
            prelude(0, 0, flags=PIECE, number=7),
            prelude(0, 10, flags=draw.randrange(3, 256), number=draw.randrange(2**16)),
            first,
        ]
    )


def odd_prelude(draw: random.Random, frame: RealFrame, others: Sequence[RealFrame]) -> bytes:
    """Another format, flag or number, the checksum right."""
    flags, number, form = draw.randrange(256), draw.randrange(2**16), draw.choice([0, 1, 1, 2, 255])
    return prelude(0, 0, flags=flags, number=number, form=form) + frame.encode()


MUTATIONS: tuple[Mutation, ...] = (
    *(flip_bits, flip_header_bits, swap_fields, odd_field, odd_field, odd_field, field_missing, field_added),
    *(kind_of_another, out_of_order, repeated, truncated, bytes_lost, huge_sizes, header_declares_much),
    *(deep_nesting, payload_noise, payload_resized, in_odd_pieces, odd_prelude),
)


def _flipped(draw: random.Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(draw.randint(1, 8)):
        changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
    return bytes(changed)

"""How a message becomes a frame's header and payload, and comes out of them again."""

from __future__ import annotations

import reprlib
from collections.abc import Callable
from typing import Any

import msgpack

from wire.errors import CorruptPayload, HeaderError, LocalProtocolError
from wire.fields import MAX_ITEMS, MAX_KEYS, fits
from wire.frames import Frame, Limits, encode_frame_head
from wire.messages import MESSAGE_TYPES, RULES, Backward, Buffer, Forward, Message, Payload, Weights

__all__ = ["decode", "encode"]

_WITH_PAYLOAD = frozenset({Weights, Forward, Backward})
_SHORT = reprlib.Repr()  # what a peer sends may be long, and too deep for repr
_SHORT.maxstring = _SHORT.maxother = 80


def encode(message: Message, limits: Limits) -> tuple[list[Buffer], int]:
    """Return the buffers that make up a message's frame, and how many bytes they hold.

    The payload is not copied.

    Args:
        message: what to send.
        limits: the largest frame that the receiver accepts.

    Raises:
        LocalProtocolError: a field or the payload's size is wrong, or the frame is above `limits`.
    """
    kind = message.kind
    header: dict[str, Any] = {"kind": kind}
    for name, rule in RULES[type(message)].items():
        header[name] = value = getattr(message, name)
        if not rule.accepts(value):
            raise LocalProtocolError(f"{kind}.{name} has to be {rule.wanted}; it is {_show(value)}")
    try:
        packed: bytes = msgpack.packb(header)
    except (ValueError, TypeError, OverflowError) as error:
        raise LocalProtocolError(f"a {kind} message holds what msgpack does not carry: {error}") from None
    if len(packed) > limits.max_header:
        raise LocalProtocolError(
            f"the {kind} header takes {len(packed)} bytes; the peer accepts {limits.max_header}"
        )
    if not isinstance(message, (Weights, Forward, Backward)):
        head = encode_frame_head(packed, 0)
        return [head], len(head)
    buffers, payload_len = _buffers(message.payload)
    if len(message.names) != len(message.tensors) or not fits(message.tensors, payload_len):
        raise LocalProtocolError(
            f"{kind}: {len(message.names)} names, {len(message.tensors)} tensors and"
            f" {payload_len} payload bytes do not fit together"
        )
    if payload_len > limits.max_payload:
        raise LocalProtocolError(
            f"the {kind} payload takes {payload_len} bytes; the peer accepts {limits.max_payload}"
        )
    head = encode_frame_head(packed, payload_len)
    return [head, *buffers], len(head) + payload_len


def decode(frame: Frame, check_kind: Callable[[str], None] = lambda kind: None) -> Message:
    """Return the message in a frame; its payload is the frame's, not a copy.

    Args:
        frame: as received.
        check_kind: raises where a message of that kind may not come now, before its fields are looked at.

    Raises:
        HeaderError: the header is no valid message.
        CorruptPayload: the payload's size is not that of the tensors described.
    """
    header = _unpack(frame.header)
    kind = header.pop("kind", None)
    message_type = MESSAGE_TYPES.get(kind) if type(kind) is str else None
    if message_type is None:
        raise HeaderError(f"unknown kind of message: {_show(kind)}")
    check_kind(kind)
    rules = RULES[message_type]
    if header.keys() != rules.keys():
        missing, extra = sorted(rules.keys() - header.keys()), sorted(header.keys() - rules.keys(), key=repr)
        raise HeaderError(f"{kind} message: missing fields {missing}, unknown fields {_show(extra)}")
    for name, rule in rules.items():
        if not rule.accepts(header[name]):
            raise HeaderError(f"{kind}.{name} has to be {rule.wanted}; it is {_show(header[name])}")
    payload = frame.payload
    if message_type not in _WITH_PAYLOAD:
        if payload.nbytes:
            raise CorruptPayload(f"a {kind} message has no payload; this one has {payload.nbytes} bytes")
        return message_type(**header)
    if len(header["names"]) != len(header["tensors"]):
        raise HeaderError(f"{kind} message: {len(header['names'])} names, {len(header['tensors'])} tensors")
    if not fits(header["tensors"], payload.nbytes):
        raise CorruptPayload(f"{kind} message: {payload.nbytes} payload bytes are not what its tensors take")
    header["payload"] = payload
    return message_type(**header)


def _unpack(packed: bytes) -> dict[str, Any]:
    try:
        header = msgpack.unpackb(
            packed,
            raw=False,
            strict_map_key=True,
            max_array_len=min(MAX_ITEMS, len(packed)),  # lists are allocated as declared, before their items
            max_map_len=MAX_KEYS,
            max_ext_len=0,
            ext_hook=_refuse_extension,
        )
    except (ValueError, TypeError, RecursionError, msgpack.UnpackException) as error:
        raise HeaderError(
            f"a frame's header is not valid msgpack: {str(error) or type(error).__name__}"
        ) from None
    if not isinstance(header, dict):
        raise HeaderError(f"a frame's header has to be a map; it is {_show(header)}")
    return header


def _buffers(payload: Payload) -> tuple[list[memoryview], int]:
    buffers = []
    total = 0
    for buffer in payload if isinstance(payload, (list, tuple)) else (payload,):
        view = memoryview(buffer)
        if view.nbytes:
            if not view.c_contiguous:
                raise LocalProtocolError("a payload buffer has to be contiguous in memory")
            buffers.append(view.cast("B"))
            total += view.nbytes
    return buffers, total


def _refuse_extension(code: int, data: bytes) -> None:
    raise ValueError(f"extension type {code}")


def _show(value: object) -> str:
    text = _SHORT.repr(value)
    return text if len(text) <= 80 else text[:77] + "..."

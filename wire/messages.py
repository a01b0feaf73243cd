"""Messages: what the two ends say to each other.

Each kind of message is a frozen dataclass; its annotations are the table that headers are checked against,
in both directions: every field there, none more, each of the right type and within its range.

A message with tensors has `tensors`, their descriptions in the order of `names`, and `payload`: the leaves
of those descriptions, depth first, each followed by zeros up to a multiple of 64 bytes. To send, give the
payload as one buffer or as a sequence of buffers that are sent end to end and not copied: do not change them
before they are sent. In a received message it is one writable memoryview of bytes over the buffer it was
received into.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from wire.fields import (
    Code,
    Count,
    Descs,
    Flag,
    Name,
    Names,
    Nanoseconds,
    OptionalNumber,
    Plain,
    Rule,
    Sentence,
    Step,
    rules_of,
)
from wire.message import Message
from wire.opening import Challenge, Hello, Open, Proof, Ready, Rejoin, Resume, Welcome

__all__ = [
    "MESSAGE_TYPES",
    "RULES",
    "Abort",
    "Backward",
    "Begin",
    "Buffer",
    "Bye",
    "Challenge",
    "Commit",
    "Committed",
    "Error",
    "Fetch",
    "Forward",
    "Hello",
    "Message",
    "Open",
    "Payload",
    "Ping",
    "Pong",
    "Proof",
    "Ready",
    "Rejoin",
    "Resume",
    "Save",
    "Saved",
    "Weights",
    "Welcome",
]

Buffer = bytes | bytearray | memoryview | Any
"""Anything with the buffer protocol: bytes, memoryviews, numpy arrays."""

Payload = Buffer | Sequence[Buffer]


@dataclass(frozen=True, slots=True)
class Weights(Message):
    """Some tensors of a state dict; `last` ends the sequence."""

    kind: ClassVar[str] = "weights"
    seq: Step
    last: Flag
    names: Names
    tensors: Descs
    payload: Payload = b""


@dataclass(frozen=True, slots=True)
class Fetch(Message):
    """Client asks for tensors; the server answers with `weights` messages."""

    kind: ClassVar[str] = "fetch"
    what: Name


@dataclass(frozen=True, slots=True)
class Begin(Message):
    """Client begins a step of so many chunks."""

    kind: ClassVar[str] = "begin"
    step: Step
    chunks: Count
    evaluate: Flag


@dataclass(frozen=True, slots=True)
class Forward(Message):
    """Activations of one chunk: up at cut 1, down at cut 2."""

    kind: ClassVar[str] = "forward"
    step: Step
    chunk: Step
    evaluate: Flag
    names: Names
    tensors: Descs
    payload: Payload = b""


@dataclass(frozen=True, slots=True)
class Backward(Message):
    """Gradients of one chunk: up at cut 2, down at cut 1.

    The last one down carries the squared norm of the middle's gradients.
    """

    kind: ClassVar[str] = "backward"
    step: Step
    chunk: Step
    names: Names
    tensors: Descs
    norm_sq: OptionalNumber
    payload: Payload = b""


@dataclass(frozen=True, slots=True)
class Commit(Message):
    """Client: apply the step, gradients multiplied by `scale` where it is given."""

    kind: ClassVar[str] = "commit"
    step: Step
    scale: OptionalNumber


@dataclass(frozen=True, slots=True)
class Committed(Message):
    """Server has applied the step."""

    kind: ClassVar[str] = "committed"
    step: Step
    detail: Plain


@dataclass(frozen=True, slots=True)
class Abort(Message):
    """The step is dropped; nothing of it is applied."""

    kind: ClassVar[str] = "abort"
    step: Step
    reason: Sentence


@dataclass(frozen=True, slots=True)
class Save(Message):
    """Client: write a checkpoint of `step`, the last one concluded; never remove that of `keep`."""

    kind: ClassVar[str] = "save"
    step: Step
    keep: Step


@dataclass(frozen=True, slots=True)
class Saved(Message):
    """Server has written the checkpoint of a step, or says in `error` why it could not; else that is empty."""

    kind: ClassVar[str] = "saved"
    step: Step
    error: Sentence


@dataclass(frozen=True, slots=True)
class Ping(Message):
    """Are you there? `t_ns` is the sender's monotonic clock."""

    kind: ClassVar[str] = "ping"
    t_ns: Nanoseconds


@dataclass(frozen=True, slots=True)
class Pong(Message):
    """Answer to a ping: its time, and this end's monotonic clock when it came and when the answer left."""

    kind: ClassVar[str] = "pong"
    t_ns: Nanoseconds
    received_ns: Nanoseconds
    sent_ns: Nanoseconds


@dataclass(frozen=True, slots=True)
class Error(Message):
    """Something is wrong: `code` for programs, `message` for people. The sender closes the connection."""

    kind: ClassVar[str] = "error"
    code: Code
    message: Sentence


@dataclass(frozen=True, slots=True)
class Bye(Message):
    """The sender sends nothing more."""

    kind: ClassVar[str] = "bye"
    reason: Sentence


MESSAGE_TYPES: dict[str, type[Message]] = {
    t.kind: t
    for t in (
        *(Hello, Challenge, Proof, Welcome, Open, Resume, Rejoin, Ready, Weights, Fetch, Begin, Forward),
        *(Backward, Commit, Committed, Abort, Save, Saved, Ping, Pong, Error, Bye),
    )
}
RULES: dict[type[Message], dict[str, Rule]] = {t: rules_of(t) for t in MESSAGE_TYPES.values()}

"""Messages with which two ends begin: who they are, and where they go on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from wire.fields import (
    Digest,
    Flag,
    HeaderLimit,
    Name,
    Nonce,
    OptionalDigest,
    OptionalNumber,
    OptionalStep,
    Plain,
    Seconds,
    SessionId,
    Size,
    Step,
    Steps,
    Versions,
)
from wire.message import Message


@dataclass(frozen=True, slots=True)
class Hello(Message):
    """Client's first message: what it speaks, and the largest header and payload it accepts."""

    kind: ClassVar[str] = "hello"
    versions: Versions
    software: Name
    max_header: HeaderLimit
    max_payload: Size


@dataclass(frozen=True, slots=True)
class Challenge(Message):
    """Server wants to see that the client knows the token, which never crosses; `nonce` is fresh."""

    kind: ClassVar[str] = "challenge"
    nonce: Nonce


@dataclass(frozen=True, slots=True)
class Proof(Message):
    """Client's answer to a challenge; its own `nonce` is what the server's proof in the welcome answers."""

    kind: ClassVar[str] = "proof"
    nonce: Nonce
    mac: Digest


@dataclass(frozen=True, slots=True)
class Welcome(Message):
    """Server's answer: the version chosen, its own limits, seconds between heartbeats.

    `nonce` is fresh, for the client's proof that a session is its own; `mac` proves that the server knows the
    token, and is nil where none was asked for.
    """

    kind: ClassVar[str] = "welcome"
    version: Size
    software: Name
    max_header: HeaderLimit
    max_payload: Size
    nonce: Nonce
    mac: OptionalDigest
    heartbeat_s: Seconds
    device: Name


@dataclass(frozen=True, slots=True)
class Open(Message):
    """Client says what the server has to build: model, cuts, codecs, optimizer.

    The client chooses the session's id and secret, both at random; who knows them may resume it.
    """

    kind: ClassVar[str] = "open"
    session: SessionId
    secret: Digest
    spec: Plain


@dataclass(frozen=True, slots=True)
class Resume(Message):
    """Client wants to go on with a session after the connection was lost, or either end started again.

    `mac` proves that it knows the secret. `step` is the last step that it has concluded, applied (with `scale`)
    or not, and nil where it remembers nothing but what it has saved: checkpoints of the steps `saved`.
    """

    kind: ClassVar[str] = "resume"
    session: SessionId
    mac: Digest
    step: OptionalStep
    applied: Flag
    scale: OptionalNumber
    saved: Steps


@dataclass(frozen=True, slots=True)
class Rejoin(Message):
    """Client's first message where it has a ticket from `ready`: hello and resume in one, for a step it remembers.

    The client goes on behind it without waiting for `ready`. `mac` proves that it knows the session's secret, and
    `nonce` is for the server's proof of the same. `step`, `applied` and `scale` are as in `Resume`.
    """

    kind: ClassVar[str] = "rejoin"
    version: Size
    max_header: HeaderLimit
    max_payload: Size
    session: SessionId
    nonce: Nonce
    mac: Digest
    step: Step
    applied: Flag
    scale: OptionalNumber


@dataclass(frozen=True, slots=True)
class Ready(Message):
    """Server has built what it was asked for, or found it again.

    Both ends go on after `step`: as they are where it is the client's own, else from their checkpoints of it.
    `need_weights` says whether the middle's weights have to come from the client first; `saves` whether the
    server can write checkpoints. `ticket` is fresh, and good for one `rejoin`; `mac` proves that the server knows the
    session's secret, and is nil where the client did not rejoin.
    """

    kind: ClassVar[str] = "ready"
    step: Step
    need_weights: Flag
    saves: Flag
    device: Name
    memory_format: Name
    ticket: Nonce
    mac: OptionalDigest
    detail: Plain

"""Peers that break the protocol, on purpose or not, against a live server: each gets a typed error, and the server
serves the next client."""

import contextlib
import os
import socket
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import msgpack
import numpy as np
import pytest
import torch

from common.seeding import derive_seed
from edge.job import Job, prepare
from tests.system.peer import HELLO, Hung, Peer
from tests.system.processes import Command, assert_serves, serving
from tests.tiny_job import TINY_JOB
from wire.frames import encode_frame_head
from wire.messages import (
    Abort,
    Backward,
    Begin,
    Bye,
    Commit,
    Error,
    Fetch,
    Forward,
    Open,
    Ping,
    Ready,
    Welcome,
)
from wire.streams import StreamEncoder, chunk_message
from wire.weights import weights_messages


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[Command, str]]:
    with serving("--import", "dropout_model") as started:
        yield started
        command, address = started
        assert_serves(address)
        assert "Traceback" not in command.err


@pytest.fixture(scope="module")
def job() -> Job:
    """A job of two chunks of four samples a step."""
    return prepare(replace(TINY_JOB, test_limit=4))


@pytest.fixture
def peer(server: tuple[Command, str]) -> Iterator[Peer]:
    with Peer(server[1]) as connected:
        yield connected


@pytest.fixture
def greeted(peer: Peer) -> Peer:
    peer.greet()
    return peer


@pytest.fixture
def opened(greeted: Peer, job: Job) -> Peer:
    greeted.open(job.spec.to_map())
    return greeted


def frame(header: object, payload: bytes = b"") -> bytes:
    return encode_frame_head(msgpack.packb(header), len(payload)) + payload


def prelude(header_len: int, payload_len: int, *, magic: bytes = b"ISTH", frame_format: int = 1) -> bytes:
    fields = struct.pack("!4sBBHIQ", magic, frame_format, 0, 0, header_len, payload_len)
    return fields + struct.pack("!I", zlib.crc32(fields))


# Bytes that are no message.

NO_FRAMES = {
    "garbage": b"\x00\xff" * 500,
    "an HTTP request": b"GET / HTTP/1.1\r\nHost: a\r\n\r\n",
    "a TLS greeting": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(32),
}

BROKEN_FRAMES = {
    "an unknown frame format": (prelude(10, 0, frame_format=9), "bad_frame"),
    "a wrong checksum": (frame({"kind": "bye", "reason": "x"})[:-1] + b"y", "bad_frame"),
    "a header of 4 GiB": (prelude(2**32 - 1, 0), "limit_exceeded"),
    "a payload of 2**63 bytes": (prelude(20, 2**63), "limit_exceeded"),
    "a header that is no msgpack": (encode_frame_head(b"\xc1\xc1\xc1", 0), "bad_header"),
    "an empty header": (encode_frame_head(b"", 0), "bad_header"),
    "a header that is a list": (frame([1, 2, 3]), "bad_header"),
    "a header with keys that are numbers": (frame({1: 2}), "bad_header"),
    "an unknown kind": (frame({"kind": "dance"}), "bad_header"),
    "a kind that is a map": (frame({"kind": {"a": []}}), "bad_header"),
    "a message without its fields": (frame({"kind": "bye"}), "bad_header"),
    "fields of other types": (frame({"kind": "bye", "reason": 7}), "bad_header"),
    "a deep nest": (encode_frame_head(b"\x91" * 2000, 0), "bad_header"),
}


@pytest.mark.parametrize("data", NO_FRAMES.values(), ids=NO_FRAMES)
def test_what_speaks_another_protocol_is_hung_up_on(
    server: tuple[Command, str], peer: Peer, data: bytes
) -> None:
    peer.send_bytes(data)
    assert peer.receive() is None


@pytest.mark.parametrize(("data", "code"), BROKEN_FRAMES.values(), ids=BROKEN_FRAMES)
def test_broken_first_frame_is_answered_with_a_typed_error(peer: Peer, data: bytes, code: str) -> None:
    peer.send_bytes(data)
    assert peer.error().code == code


@pytest.mark.parametrize(("data", "code"), BROKEN_FRAMES.values(), ids=BROKEN_FRAMES)
def test_broken_frame_after_the_handshake_is_answered_with_a_typed_error(
    greeted: Peer, data: bytes, code: str
) -> None:
    greeted.send_bytes(data)
    assert greeted.error().code == code


def test_garbage_after_the_handshake_is_a_damaged_stream(greeted: Peer) -> None:
    greeted.send_bytes(b"GET / HTTP/1.1\r\n\r\n" + bytes(64))
    assert greeted.error().code == "bad_frame"


def test_payload_of_a_message_that_has_none_is_refused(greeted: Peer) -> None:
    greeted.send_bytes(frame({"kind": "ping", "t_ns": 1}, bytes(64)))
    assert greeted.error().code == "corrupt_payload"


@pytest.mark.parametrize("cut", [1, 23, 24, 40, -1])
def test_frame_cut_short_ends_the_connection_and_nothing_else(
    server: tuple[Command, str], peer: Peer, cut: int
) -> None:
    peer.send_bytes(frame(HELLO)[:cut])
    peer.end_sending()
    assert peer.receive() is None


def test_hello_byte_by_byte_is_a_hello(peer: Peer) -> None:
    for byte in frame(HELLO):
        peer.send_bytes(bytes([byte]))
    assert isinstance(peer.receive(), Welcome)


def test_version_that_the_server_does_not_speak_is_named(peer: Peer) -> None:
    peer.send_bytes(frame(HELLO | {"versions": [7, 9]}))
    error = peer.error()
    assert error.code == "version_mismatch"
    assert "7, 9" in error.message
    assert "version 3" in error.message


# Messages out of turn.

EARLY = [
    Begin(1, 1, False),
    Bye("x"),
    Ping(1),
    Fetch("weights"),
    Ready(0, True, False, "cpu", "contiguous", bytes(32), None, {}),
]


@pytest.mark.parametrize("message", EARLY, ids=lambda m: m.kind)
def test_nothing_comes_before_hello(peer: Peer, message: Any) -> None:
    peer.send(message)
    answer = peer.receive()
    assert answer is None if isinstance(message, Bye) else isinstance(answer, Error), answer


@pytest.mark.parametrize(
    "message", [Begin(1, 1, False), Fetch("weights"), Commit(1, None)], ids=lambda m: m.kind
)
def test_no_step_comes_before_a_job(greeted: Peer, message: Any) -> None:
    greeted.send(message)
    assert greeted.error().code == "protocol_error"


@pytest.mark.parametrize(
    "header",
    [HELLO, {"kind": "committed", "step": 1, "detail": {}}, {"kind": "open", "spec": {}}],
    ids=lambda header: header["kind"],
)
def test_what_only_the_server_says_or_says_once_is_refused(opened: Peer, header: dict[str, Any]) -> None:
    opened.send_bytes(frame(header))
    assert opened.error().code == "protocol_error"


# Jobs that are none.


def changed(job: Job, **changes: Any) -> dict[str, Any]:
    """The job's map with fields replaced; `model__name` means the field `name` of `model`."""
    spec = job.spec.to_map()
    for path, value in changes.items():
        *outer, last = path.split("__")
        inner = spec
        for name in outer:
            inner[name] = dict(inner[name])
            inner = inner[name]
        inner[last] = value
    return spec


BAD_JOBS: dict[str, tuple[dict[str, Any], str]] = {
    "an unknown model": ({"model__name": "dropout_nett"}, "dropout_net"),
    "an unknown cut": ({"cuts": ["stem", "bloks"]}, "blocks"),
    "cuts in the wrong order": ({"cuts": ["blocks", "stem"]}, "before"),
    "a path as weights": ({"model__weights": "/etc/passwd"}, "never by a path"),
    "a file as weights": ({"model__weights": "passwords.pt"}, "never by a path"),
    "an unknown codec": ({"codecs__cut1.act": "int8+zip"}, "zip"),
    "a codec that needs an argument": ({"codecs__cut1.act": "int8:"}, "colon"),
    "an unknown bottleneck": ({"bottlenecks": ["jar", ""]}, "jar"),
    "a bottleneck too large to build": ({"bottlenecks": ["conv:999999x1/999999x1", ""]}, "999999"),
    "a bottleneck of too many layers": ({"bottlenecks": ["conv:" + "/".join(["8x1"] * 999), ""]}, "999"),
    "a billion classes": ({"model__num_classes": 10**9}, "1000000000"),
    "a classifier without classes": ({"model__num_classes": 0}, "class"),
    "an image as large as a city": ({"model__image_size": 10**6}, "1000000"),
    "an image of less than nothing": ({"model__image_size": -3}, "-3"),
    "a chunk larger than any frame": ({"chunk_size": 65_536, "model__image_size": 512}, "chunk"),
    "a number where text belongs": ({"amp": 7}, "amp"),
    "a learning rate that is not a number": ({"optim__lr": float("nan")}, "learning rate"),
    "an optimizer that is not there": ({"optim__name": "luck"}, "luck"),
    "a field too many": ({"exec": "import os"}, "exec"),
    "a seed beyond 64 bits": ({"seed": 2**64 - 1}, "seed"),
    "a model seed beyond 64 bits": ({"model__seed": 2**64 - 1}, "seed"),
}


@pytest.mark.parametrize(("changes", "says"), BAD_JOBS.values(), ids=BAD_JOBS)
def test_job_that_cannot_be_done_is_refused_with_the_reason(
    greeted: Peer, job: Job, changes: dict[str, Any], says: str
) -> None:
    greeted.send(Open(bytes(16), bytes(32), changed(job, **changes)))
    error = greeted.error()
    assert error.code == "refused", error
    assert says in error.message, error


# Steps that are none.


def forward(
    job: Job, step: int = 1, chunk: int = 0, *, evaluate: bool = False, **instead: torch.Tensor
) -> Forward:
    tensors = {info.name: torch.zeros(info.batched(4)) for info in job.parts.cut1}
    return _message(job, "cut1.act", instead or tensors, step, chunk, evaluate)  # type: ignore[return-value]


def backward(job: Job, step: int = 1, chunk: int = 0, *, samples: int = 4) -> Backward:
    tensors = {info.name: torch.zeros(info.batched(samples)) for info in job.parts.cut2}
    return _message(job, "cut2.grad", tensors, step, chunk, None)  # type: ignore[return-value]


def _message(
    job: Job, stream: str, tensors: dict[str, torch.Tensor], step: int, chunk: int, evaluate: bool | None
) -> Forward | Backward:
    encoder = StreamEncoder(job.spec.codecs[stream], gradient=stream.endswith("grad"))
    encodings = encoder.encode(tensors, seed=derive_seed(0))
    return chunk_message(
        encodings,
        list(tensors),
        step,
        chunk,
        backward=evaluate is None,
        evaluate=bool(evaluate),
        norm_sq=None,
    )


def entry(job: Job) -> str:
    return job.parts.cut1[0].name


BEGIN = Begin(1, 2, False)

BAD_STEPS: dict[str, tuple[Callable[[Job], list[Any]], str, str]] = {
    "a chunk outside a step": (lambda job: [forward(job)], "protocol_error", "outside"),
    "a chunk of another step": (lambda job: [BEGIN, forward(job, step=2)], "protocol_error", "outside"),
    "a chunk beyond the last": (
        lambda job: [BEGIN, forward(job, chunk=2)],
        "protocol_error",
        "chunks 0 to 1",
    ),
    "a chunk number of 63 bits": (
        lambda job: [BEGIN, forward(job, chunk=2**62)],
        "protocol_error",
        "chunks 0 to 1",
    ),
    "a chunk twice": (lambda job: [BEGIN, forward(job), forward(job)], "protocol_error", "twice"),
    "a third chunk in flight": (
        lambda job: [BEGIN, forward(job), forward(job, chunk=1), forward(job, chunk=2)],
        "protocol_error",
        "in flight",
    ),
    "a gradient before its chunk": (lambda job: [BEGIN, backward(job)], "protocol_error", "before"),
    "an evaluation's chunk in training": (
        lambda job: [BEGIN, forward(job, evaluate=True)],
        "protocol_error",
        "evaluat",
    ),
    "a training chunk in evaluation": (
        lambda job: [Begin(0, 1, True), forward(job, step=0)],
        "protocol_error",
        "evaluat",
    ),
    "a gradient in evaluation": (
        lambda job: [Begin(0, 1, True), backward(job, step=0)],
        "protocol_error",
        "1B0",
    ),
    "other names": (
        lambda job: [BEGIN, forward(job, stranger=torch.zeros(4, 8, 8, 8))],
        "corrupt_payload",
        "stranger",
    ),
    "another dtype": (
        lambda job: [BEGIN, forward(job, **{entry(job): torch.zeros(4, 8, 8, 8, dtype=torch.int32)})],
        "corrupt_payload",
        "int32",
    ),
    "another shape": (
        lambda job: [BEGIN, forward(job, **{entry(job): torch.zeros(4, 8, 8, 7)})],
        "corrupt_payload",
        "[4, 8, 8, 7]",
    ),
    "no dimensions": (
        lambda job: [BEGIN, forward(job, **{entry(job): torch.tensor(0.0)})],
        "corrupt_payload",
        "[]",
    ),
    "no samples": (
        lambda job: [BEGIN, forward(job, **{entry(job): torch.zeros(0, 8, 8, 8)})],
        "corrupt_payload",
        "[0, 8, 8, 8]",
    ),
    "more samples than a chunk has": (
        lambda job: [BEGIN, forward(job, **{entry(job): torch.zeros(5, 8, 8, 8)})],
        "corrupt_payload",
        "",
    ),
    "a commit of another step": (lambda job: [BEGIN, Commit(2, None)], "protocol_error", "commit"),
    "a commit before the chunks": (lambda job: [BEGIN, Commit(1, None)], "protocol_error", "commit"),
    "a commit of no step": (lambda job: [Commit(0, None)], "protocol_error", "commit"),
    "a commit of an evaluation": (
        lambda job: [Begin(1, 1, True), Commit(1, None)],
        "protocol_error",
        "commit",
    ),
    "a step in a step": (lambda job: [BEGIN, Begin(2, 2, False)], "protocol_error", "before step 1 ended"),
    "a step of too many chunks": (lambda job: [Begin(1, 3, False)], "protocol_error", "limit is 2"),
    "a step that was before": (
        lambda job: [Begin(5, 1, False), Abort(5, ""), Begin(5, 1, False)],
        "protocol_error",
        "after step 5",
    ),
    "an abort of another step": (lambda job: [BEGIN, Abort(3, "")], "protocol_error", "abort"),
    "an abort of no step": (lambda job: [Abort(3, "")], "protocol_error", "abort"),
    "weights that nobody asked for": (
        lambda job: list(weights_messages(job.middle_state())),
        "protocol_error",
        "not asked for",
    ),
    "a wish for something else": (lambda job: [Fetch("/etc/passwd")], "protocol_error", "weights"),
    "a wish in the middle of a step": (
        lambda job: [BEGIN, Fetch("weights")],
        "protocol_error",
        "between steps",
    ),
}


@pytest.mark.parametrize(("messages", "code", "says"), BAD_STEPS.values(), ids=BAD_STEPS)
def test_step_out_of_order_ends_with_a_typed_error(
    opened: Peer, job: Job, messages: Callable[[Job], list[Any]], code: str, says: str
) -> None:
    for message in messages(job):
        opened.send(message)
    error = opened.error()
    assert error.code == code, error
    assert says in error.message, error


def test_gradient_of_another_number_of_samples_than_went_forward_is_refused(opened: Peer, job: Job) -> None:
    opened.send(BEGIN)
    opened.send(forward(job))
    assert isinstance(opened.receive(), Forward)
    opened.send(backward(job, samples=3))
    error = opened.error()
    assert error.code == "corrupt_payload", error
    assert "[3, 8, 8, 8]" in error.message


def test_job_whose_weights_are_awaited_takes_nothing_else(greeted: Peer, job: Job) -> None:
    assert greeted.open(changed(job, digest="0" * 64)).need_weights
    greeted.send(BEGIN)
    error = greeted.error()
    assert error.code == "protocol_error"
    assert "weights must come" in error.message


def with_first(state: dict[str, torch.Tensor], change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    name = next(iter(state))
    return {**state, name: change(state[name])}


BAD_WEIGHTS: dict[str, tuple[Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]], str]] = {
    "one is missing": (lambda state: dict(list(state.items())[1:]), "lack"),
    "one too many": (lambda state: {**state, "sudo": torch.zeros(1)}, "sudo"),
    "another shape": (lambda state: with_first(state, lambda t: t[:1]), "does not fit"),
    "another dtype": (lambda state: with_first(state, lambda t: t.half()), "does not fit"),
}


@pytest.mark.parametrize(("change", "says"), BAD_WEIGHTS.values(), ids=BAD_WEIGHTS)
def test_weights_that_do_not_fit_are_refused(
    greeted: Peer, job: Job, change: Callable[..., Any], says: str
) -> None:
    greeted.open(changed(job, digest="0" * 64))
    for message in weights_messages(change(job.middle_state())):
        greeted.send(message)
    error = greeted.error()
    assert error.code == "corrupt_payload", error
    assert says in error.message


def test_weights_out_of_order_are_refused(greeted: Peer, job: Job) -> None:
    greeted.open(changed(job, digest="0" * 64))
    (message,) = weights_messages(job.middle_state())
    greeted.send(replace(message, seq=1))
    assert greeted.error().code == "corrupt_payload"


# Payloads that lie about themselves.


def lie(desc: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {**desc, **changes}


LIES: dict[str, tuple[str, Callable[[dict[str, Any]], dict[str, Any]]]] = {
    "a shape without end": ("none", lambda desc: lie(desc, shape=[2**40, 2**40])),
    "a negative shape": ("none", lambda desc: lie(desc, shape=[-4, 8, 8, -8])),
    "no shape": ("none", lambda desc: {"size": desc["size"]}),
    "an unknown dtype": ("none", lambda desc: lie(desc, dtype="object")),
    "a dtype of another width": ("none", lambda desc: lie(desc, dtype="float64")),
    "an unknown order": ("none", lambda desc: lie(desc, order="diagonal")),
    "a codec that was not agreed on": (
        "none",
        lambda desc: {**desc, "codec": "pickle", "meta": {}, "parts": [desc]},
    ),
    "nonsense for numbers": ("int8", lambda desc: lie(desc, meta={"a": [1, 2, {}]})),
    "fewer parts": ("int8", lambda desc: lie(desc, parts=desc["parts"][:1])),
    "its parts the other way round": ("int8", lambda desc: lie(desc, parts=desc["parts"][::-1])),
    "another whole": ("int8", lambda desc: lie(desc, shape=[4, 8, 8, 9])),
    "a whole without end": ("int8", lambda desc: lie(desc, shape=[2**31, 2**31])),
    "nothing for bytes": ("lz4", lambda desc: lie(desc, meta={})),
    "a bomb": ("lz4", lambda desc: lie(desc, shape=[2**20, 2**20], meta={"size": 2**42})),
}


@pytest.mark.parametrize(("codec", "change"), LIES.values(), ids=LIES)
def test_description_that_lies_is_a_corrupt_payload(
    greeted: Peer, job: Job, codec: str, change: Callable[[dict[str, Any]], dict[str, Any]]
) -> None:
    spec = replace(job.spec, codecs={**job.spec.codecs, "cut1.act": codec})
    greeted.open(spec.to_map())
    message = forward(replace(job, spec=spec))
    assert isinstance(message.tensors[0], dict)
    message = replace(message, tensors=[change(message.tensors[0])])
    greeted.send(BEGIN)
    greeted.send_unchecked(message)
    assert greeted.error().code in ("corrupt_payload", "bad_header")


@pytest.mark.parametrize("codec", ["int8", "lz4", "fp16", "int8+lz4"])
def test_payload_of_noise_is_decoded_or_refused_and_never_worse(greeted: Peer, job: Job, codec: str) -> None:
    spec = replace(job.spec, codecs={**job.spec.codecs, "cut1.act": codec})
    greeted.open(spec.to_map())
    message = forward(replace(job, spec=spec))
    size = sum(len(buffer) for buffer in message.payload)
    noise = np.random.default_rng(0).integers(0, 256, size, np.uint8).tobytes()
    greeted.send(BEGIN)
    greeted.send(replace(message, payload=noise))
    answer = greeted.receive()
    assert isinstance(answer, Forward) or (isinstance(answer, Error) and answer.code == "corrupt_payload"), (
        answer
    )


# Peers that take too much.


def test_memory_stays_while_a_peer_sends_and_never_reads(
    server: tuple[Command, str], greeted: Peer, job: Job
) -> None:
    spec = replace(job.spec, chunk_size=512)
    greeted.open(spec.to_map())
    message = forward(job, step=0, evaluate=True, **{entry(job): torch.zeros(512, 8, 8, 8)})
    greeted.send(Begin(0, 1 << 20, True))
    before = server[0].rss_bytes()
    most = 0
    with contextlib.suppress(Hung, ConnectionError):  # or what it sends is taken and thrown away
        for chunk in range(600):  # 600 MiB in all
            greeted.send(replace(message, chunk=chunk), within_s=2.0)
            most = max(most, server[0].rss_bytes() - before)
    assert most < 100 << 20


def test_thousands_of_bad_connections_leave_memory_flat(server: tuple[Command, str]) -> None:
    command, address = server
    bad = [*NO_FRAMES.values(), *(data for data, _ in BROKEN_FRAMES.values()), frame(HELLO)[:30]]

    def attack(rounds: int) -> None:
        for number in range(rounds):
            with Peer(address) as one:
                one.send_bytes(bad[number % len(bad)])
                one.end_sending()
                one.drain()

    attack(500)
    before = command.rss_bytes()
    attack(2500)
    assert command.rss_bytes() - before < 8 << 20
    assert len(os.listdir(f"/proc/{command.pid}/fd")) < 100


def test_silent_connections_do_not_keep_others_out(server: tuple[Command, str]) -> None:
    silent = [socket.create_connection(server[1].split(":")) for _ in range(40)]
    try:
        with Peer(server[1]) as honest:
            assert isinstance(honest.greet(), Welcome)
    finally:
        for one in silent:
            one.close()


def test_more_sessions_than_allowed_are_told_so(job: Job) -> None:
    with serving("--max-sessions", 1, "--import", "dropout_model") as (_, address), Peer(address) as first:
        first.greet()
        first.open(job.spec.to_map())
        with Peer(address) as second:
            second.greet()
            second.send(Open(os.urandom(16), os.urandom(32), job.spec.to_map()))
            assert second.error().code == "busy"

"""Frames as bytes, beside what they mean: what a program in another language can be checked against.

The files in ``golden`` do not change while the protocol's version stays the same. Each holds a message's fields,
the frame's prelude, header and payload (64 bytes a line) in hexadecimal, as byte strings among the fields are too,
and for messages with tensors the
values: those given to the encoder and those that come out, or one list where they are the same, row-major. Where
"after" names another file, its message has crossed in the same streams before.
"""

import hmac
import json
from pathlib import Path
from typing import Any

import msgpack
import pytest
import torch
from torch import Tensor

from common.spec import JobSpec
from tests.wire.pair import ROOMY, TOKEN, as_sent, joined, read_frames
from wire.auth import CLIENT_TOKEN, REJOIN, REJOINED, RESUME, SERVER_TOKEN, prove
from wire.codecs.registry import always_on, codec_names
from wire.codecs.spec import parse_chain
from wire.frames import FrameReader
from wire.messages import MESSAGE_TYPES, Challenge, Message, Open, Proof, Ready, Rejoin, Resume, Welcome
from wire.serialize import decode, encode
from wire.streams import Encodings, StreamDecoder, StreamEncoder, facts_of
from wire.weights import WeightsReceiver

GOLDEN = {
    path.stem: json.loads(path.read_text()) for path in sorted((Path(__file__).parent / "golden").iterdir())
}
BYTES = {"nonce", "mac", "session", "secret", "ticket"}
WITH_TENSORS = {name: golden for name, golden in GOLDEN.items() if "tensors" in golden}


def payload_of(golden: dict[str, Any]) -> bytes:
    return b"".join(map(bytes.fromhex, golden["payload"]))


def frame_of(golden: dict[str, Any]) -> bytes:
    return bytes.fromhex(golden["prelude"]) + bytes.fromhex(golden["header"]) + payload_of(golden)


def message_of(golden: dict[str, Any]) -> Message:
    fields = dict(golden["message"])
    message_type = MESSAGE_TYPES[fields.pop("kind")]
    for name in BYTES & fields.keys():
        fields[name] = None if fields[name] is None else bytes.fromhex(fields[name])
    return message_type(**fields, **({"payload": payload_of(golden)} if "tensors" in golden else {}))


def codecs_of(descs: list[dict[str, Any]]) -> set[str]:
    nodes = [desc for desc in descs if "codec" in desc]
    return {desc["codec"] for desc in nodes}.union(*(codecs_of(desc["parts"]) for desc in nodes))


def tensors_of(golden: dict[str, Any], what: str) -> dict[str, Tensor]:
    """The tensors as given, or as they come out; in the memory order that their descriptions name."""
    tensors = {}
    for (name, listed), desc in zip(golden["tensors"].items(), golden["message"]["tensors"], strict=True):
        flat = torch.tensor(listed.get("values", listed.get(what)), dtype=getattr(torch, desc["dtype"]))
        tensors[name] = flat.view(desc["shape"])
        if desc["order"] == "NHWC":
            tensors[name] = tensors[name].contiguous(memory_format=torch.channels_last)
    return tensors


def chain_of(golden: dict[str, Any]) -> str:
    (chain,) = {str(listed["chain"]) for listed in golden["tensors"].values()}
    return chain


# Which block a library of lz4 or zstd makes of given bytes is its own affair, and so is how products are rounded.
REPRODUCIBLE = {
    name: golden
    for name, golden in WITH_TENSORS.items()
    if not {"lz4", "zstd", "lowrank"} & {stage.name for stage in parse_chain(chain_of(golden))}
}


def test_there_is_a_frame_of_every_kind() -> None:
    assert {golden["message"]["kind"] for golden in GOLDEN.values()} == set(MESSAGE_TYPES)


def test_there_is_a_frame_of_every_codec() -> None:
    chains = {chain_of(golden) for golden in WITH_TENSORS.values()}
    assert {stage.name for chain in chains for stage in parse_chain(chain)} == set(codec_names())
    described = set().union(*(codecs_of(golden["message"]["tensors"]) for golden in WITH_TENSORS.values()))
    assert described == {*codec_names(), *always_on()}
    assert {"none", "int8+lz4", "int4:group=16", "int4:hadamard", "lowrank:2"} < chains
    factors = {
        len(desc["parts"])
        for golden in WITH_TENSORS.values()
        for desc in golden["message"]["tensors"]
        if desc.get("codec") == "lowrank"
    }
    assert factors == {2, 3}  # with and without the means of maps


def decoded(decoder: StreamDecoder, golden: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors that come out, those of the message before it too."""
    if "after" in golden:
        decoded(decoder, GOLDEN[golden["after"]])
    (frame,) = read_frames(FrameReader(ROOMY), frame_of(golden))
    message: Any = decode(frame)
    return decoder.decode(message, list(golden["tensors"]))


def encoded(encoder: StreamEncoder, golden: dict[str, Any]) -> Encodings:
    """What the given tensors become, after those of the message before."""
    if "after" in golden:
        encoded(encoder, GOLDEN[golden["after"]])
    tensors = tensors_of(golden, "given")
    return encoder.encode(tensors, seed=0, facts=facts_of(tensors))


@pytest.mark.parametrize("golden", GOLDEN.values(), ids=GOLDEN)
def test_message_is_written_as_exactly_these_bytes(golden: dict[str, Any]) -> None:
    buffers, size = encode(message_of(golden), ROOMY)
    assert joined(buffers).hex() == frame_of(golden).hex()
    assert size == len(frame_of(golden))


@pytest.mark.parametrize("golden", GOLDEN.values(), ids=GOLDEN)
def test_these_bytes_are_read_as_the_message(golden: dict[str, Any]) -> None:
    (frame,) = read_frames(FrameReader(ROOMY), frame_of(golden))
    assert as_sent(decode(frame)) == as_sent(message_of(golden))


@pytest.mark.parametrize("golden", GOLDEN.values(), ids=GOLDEN)
def test_header_is_one_map_in_the_order_of_the_fields(golden: dict[str, Any]) -> None:
    header = msgpack.unpackb(bytes.fromhex(golden["header"]), object_pairs_hook=list)
    assert [key for key, _ in header] == list(golden["message"])


@pytest.mark.parametrize("golden", WITH_TENSORS.values(), ids=WITH_TENSORS)
def test_tensors_come_out_as_these_values(golden: dict[str, Any]) -> None:
    (frame,) = read_frames(FrameReader(ROOMY), frame_of(golden))
    message: Any = decode(frame)
    expected = tensors_of(golden, "decoded")
    gradient = message.kind == "backward"
    decoder = StreamDecoder(chain_of(golden), gradient=gradient, max_bytes=1 << 20)
    tensors = (
        WeightsReceiver(expected).take(message) if message.kind == "weights" else decoded(decoder, golden)
    )
    assert tensors is not None
    for name, tensor in expected.items():
        assert torch.equal(tensors[name], tensor)
        assert tensors[name].stride() == tensor.stride()


@pytest.mark.parametrize("golden", REPRODUCIBLE.values(), ids=REPRODUCIBLE)
def test_values_are_encoded_as_exactly_these_bytes(golden: dict[str, Any]) -> None:
    chain = chain_of(golden)
    gradient = golden["message"]["kind"] == "backward"
    descs, buffers = encoded(StreamEncoder(chain, gradient=gradient), golden)
    assert descs == golden["message"]["tensors"]
    assert joined(buffers).hex() == payload_of(golden).hex()


def test_proofs_are_those_of_the_token_and_of_the_session() -> None:
    challenge, proof, proved, welcome, opened, resume = (
        message_of(GOLDEN[name])
        for name in ("challenge", "proof", "welcome_proved", "welcome", "open", "resume")
    )
    assert isinstance(challenge, Challenge)
    assert isinstance(proof, Proof)
    assert isinstance(proved, Welcome)
    assert isinstance(welcome, Welcome)
    assert isinstance(opened, Open)
    assert isinstance(resume, Resume)
    assert proof.mac == prove(TOKEN, CLIENT_TOKEN, challenge.nonce, proof.nonce)
    assert proved.mac == prove(TOKEN, SERVER_TOKEN, proof.nonce, challenge.nonce)
    assert resume.session == opened.session
    assert resume.mac == prove(opened.secret, RESUME, welcome.nonce, opened.session)
    by_hand = b"isthmus client token\0" + challenge.nonce + b"\0" + proof.nonce
    assert proof.mac == hmac.new(TOKEN, by_hand, "sha256").digest()


def test_proofs_of_a_session_that_is_rejoined_are_as_the_document_says() -> None:
    opened, ready, rejoin, again = map(
        message_of, map(GOLDEN.get, ("open", "ready", "rejoin", "ready_again"))
    )
    assert isinstance(opened, Open)
    assert isinstance(ready, Ready)
    assert isinstance(rejoin, Rejoin)
    assert isinstance(again, Ready)
    assert rejoin.session == opened.session
    assert rejoin.mac == prove(opened.secret, REJOIN, ready.ticket, rejoin.nonce, opened.session)
    assert again.mac == prove(opened.secret, REJOINED, rejoin.nonce, rejoin.mac)
    assert again.ticket != ready.ticket


@pytest.mark.parametrize("name", ["open", "open_text"])
def test_job_that_is_opened_is_one_that_a_server_takes(name: str) -> None:
    message = message_of(GOLDEN[name])
    assert isinstance(message, Open)
    assert JobSpec.from_map(message.spec).to_map() == message.spec

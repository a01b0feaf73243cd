"""The middle's ends of the four streams meet the edge's."""

import pytest
import torch

from cloud.streams import Streams, check_disk
from common.errors import UserError
from common.propagate import TensorInfo
from common.spec import STREAMS
from wire.errors import CorruptPayload
from wire.streams import StreamDecoder, StreamEncoder, chunk_message

CHAINS = {"cut1.act": "fp16", "cut1.grad": "int8", "cut2.act": "none", "cut2.grad": "int8+lz4"}


def a_tensor(seed=1):
    return torch.randn(3, 4, 5, 5, generator=torch.Generator().manual_seed(seed))


def message_of(encoder, tensors, *, backward, seed=1):
    descs, buffers = encoder.encode(tensors, seed=seed)
    return chunk_message((descs, memoryview(b"".join(buffers))), list(tensors), 1, 0, backward=backward)


@pytest.mark.parametrize("cut", [1, 2])
def test_what_the_edge_encodes_is_decoded_here(cut):
    gradient = cut == 2
    chain = CHAINS[f"cut{cut}.{'grad' if gradient else 'act'}"]
    x = a_tensor()
    message = message_of(StreamEncoder(chain, gradient=gradient), {"x": x}, backward=gradient)
    decoded = Streams.make(CHAINS, 1 << 20).decoders[cut].decode(message, ["x"])["x"]
    expected = StreamDecoder(chain, gradient=gradient, max_bytes=1 << 20).decode(message, ["x"])["x"]
    assert torch.equal(decoded, expected)
    assert torch.allclose(decoded, x, atol=0.1)


@pytest.mark.parametrize("cut", [1, 2])
def test_what_is_encoded_here_is_decoded_by_the_edge(cut):
    gradient = cut == 1
    chain = CHAINS[f"cut{cut}.{'grad' if gradient else 'act'}"]
    x = a_tensor()
    message = message_of(Streams.make(CHAINS, 1 << 20).encoders[cut], {"x": x}, backward=gradient)
    decoded = StreamDecoder(chain, gradient=gradient, max_bytes=1 << 20).decode(message, ["x"])["x"]
    assert torch.allclose(decoded, x, atol=0 if chain == "none" else 0.1)


def test_gradients_are_rounded_by_chance_and_activations_are_not():
    streams = Streams.make(dict.fromkeys(STREAMS, "int8"), 1 << 20)
    payloads = {
        cut: [
            bytes(message_of(streams.encoders[cut], {"x": a_tensor()}, backward=cut == 1, seed=seed).payload)
            for seed in (1, 2, 1)
        ]
        for cut in (1, 2)
    }
    first, second, again = payloads[1]
    assert first == again != second
    assert len(set(payloads[2])) == 1


def test_a_tensor_larger_than_what_may_come_is_refused():
    x = a_tensor()
    message = message_of(StreamEncoder("none", gradient=False), {"x": x}, backward=False)
    chains = dict.fromkeys(STREAMS, "none")
    assert torch.equal(Streams.make(chains, x.nbytes).decoders[1].decode(message, ["x"])["x"], x)
    with pytest.raises(CorruptPayload, match="larger than the limit"):
        Streams.make(chains, x.nbytes - 4).decoders[1].decode(message, ["x"])


def test_a_chain_other_than_the_agreed_one_is_refused():
    message = message_of(StreamEncoder("int8", gradient=False), {"x": a_tensor()}, backward=False)
    with pytest.raises(CorruptPayload):
        Streams.make(dict.fromkeys(STREAMS, "none"), 1 << 20).decoders[1].decode(message, ["x"])


@pytest.mark.parametrize("stream", STREAMS)
def test_a_chain_that_this_side_does_not_know_is_refused(stream):
    with pytest.raises(UserError, match="unknown codec 'int9'"):
        Streams.make({**CHAINS, stream: "int9"}, 1 << 20)


def test_each_call_makes_fresh_ends():
    one, other = Streams.make(CHAINS, 1), Streams.make(CHAINS, 1)
    assert not {id(end) for end in (*one.encoders.values(), *one.decoders.values())} & {
        id(end) for end in (*other.encoders.values(), *other.decoders.values())
    }


def test_disk_that_a_job_may_take_is_bounded_over_all_that_crosses():
    maps = [TensorInfo(name=name, shape=(8, 4, 4)) for name in "ab"]
    crossing = {1: maps, 2: [maps[0], TensorInfo(name="mask", shape=(4,), dtype=torch.bool)]}
    codecs = {**dict.fromkeys(STREAMS, "delta:limit=100M+int4"), "cut2.act": "delta:limit=1G+int8"}
    check_disk(codecs, crossing, (1024 + 200) << 20)
    check_disk(dict.fromkeys(STREAMS, "int8"), crossing, 0)
    with pytest.raises(
        UserError, match=r"1.2 GiB on the server's disk, where a client may have 1: give delta a lower"
    ):
        check_disk(codecs, crossing, 1 << 30)

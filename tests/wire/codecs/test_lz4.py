"""lz4."""

import lz4.block
import pytest
import torch

from wire.codecs.base import Role
from wire.codecs.chain import Decoder, Encoder, parse_chain
from wire.errors import CorruptPayload

CHAIN = parse_chain("lz4")


def encode(x):
    encoded = Encoder(CHAIN, Role.ACTIVATION).encode(x, seed=0)
    return encoded.desc, bytearray(b"".join(encoded.buffers))


def decode(desc, payload, **options):
    return Decoder(CHAIN, Role.ACTIVATION, **options).decode(desc, payload)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_values_of_like_size_shrink_once_their_bytes_are_shuffled(dtype):
    x = (torch.randn(64, 256).abs() + 1).to(dtype)
    desc, payload = encode(x)
    assert len(payload) < 0.95 * x.nbytes
    assert torch.equal(decode(desc, payload), x)


def test_noise_is_sent_raw():
    x = torch.randint(0, 256, (5000,), dtype=torch.uint8)
    desc, payload = encode(x)
    assert "codec" not in desc
    assert torch.equal(decode(desc, payload), x)


def test_zeros_nearly_vanish():
    _, payload = encode(torch.zeros(8, 32, 56, 56))
    assert len(payload) < 8 * 32 * 56 * 56 * 4 / 200


def test_a_bomb_is_refused_before_it_is_unpacked():
    desc, payload = encode(torch.zeros(1000))
    desc["shape"] = [1 << 28]
    with pytest.raises(CorruptPayload, match="lz4 does not make"):
        decode(desc, payload)
    desc["shape"] = [50, 100]
    with pytest.raises(CorruptPayload, match="larger than the limit"):
        decode(desc, payload, max_bytes=4096)


@pytest.mark.parametrize("length", [999, 1001, 4000])
def test_a_block_of_another_length_than_declared_is_corrupt(length):
    desc, _ = encode(torch.zeros(1000, dtype=torch.uint8))
    block = lz4.block.compress(bytes(length), store_size=False)
    desc["meta"]["size"] = desc["parts"][0]["shape"][0] = desc["parts"][0]["size"] = len(block)
    with pytest.raises(CorruptPayload):
        decode(desc, bytearray(block.ljust(64, b"\0")))


def test_bytes_that_are_no_bool_are_corrupt():
    desc, _ = encode(torch.zeros(1000, dtype=torch.uint8))
    desc["dtype"] = "bool"  # as a sender does that leaves their packing out
    block = lz4.block.compress(b"\2" * 1000, store_size=False)
    desc["meta"]["size"] = desc["parts"][0]["shape"][0] = desc["parts"][0]["size"] = len(block)
    with pytest.raises(CorruptPayload, match="bool"):
        decode(desc, bytearray(block.ljust(64, b"\0")))

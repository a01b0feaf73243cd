"""zstd."""

import pytest
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from wire.codecs import compiled
from wire.codecs.base import Role
from wire.codecs.chain import Decoder, Encoder, parse_chain
from wire.errors import CorruptPayload, SpecError

CHAIN = parse_chain("zstd")


def encode(x, chain=CHAIN):
    encoded = Encoder(chain, Role.ACTIVATION).encode(x, seed=0)
    return encoded.desc, bytearray(b"".join(encoded.buffers))


def decode(desc, payload, **options):
    return Decoder(CHAIN, Role.ACTIVATION, **options).decode(desc, payload)[0]


def with_frame(desc, frame):
    """The description, changed so that it declares this frame, and the payload."""
    desc["meta"]["size"] = desc["parts"][0]["shape"][0] = desc["parts"][0]["size"] = len(frame)
    return desc, bytearray(frame.ljust(-(-len(frame) // 64) * 64, b"\0"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_values_of_like_size_shrink_once_their_bytes_are_shuffled(dtype):
    x = (torch.randn(64, 256).abs() + 1).to(dtype)
    desc, payload = encode(x)
    assert len(payload) < 0.9 * x.nbytes
    assert torch.equal(decode(desc, payload), x)


def test_noise_is_sent_raw():
    x = torch.randint(0, 256, (5000,), dtype=torch.uint8)
    desc, payload = encode(x)
    assert "codec" not in desc
    assert torch.equal(decode(desc, payload), x)


def test_zeros_vanish():
    x = torch.zeros(8, 32, 112, 112)
    desc, payload = encode(x)
    assert len(payload) < x.nbytes / 5000
    assert torch.equal(decode(desc, payload), x)


def test_any_level_is_read_by_a_decoder_of_any_other():
    x = torch.randn(64, 256).relu()
    sizes = []
    for level in (1, 19):
        desc, payload = encode(x, parse_chain(f"zstd:{level}"))
        assert torch.equal(decode(desc, payload), x)
        sizes.append(len(payload))
    assert sizes[1] < sizes[0]


@pytest.mark.parametrize(("args", "at"), [("0", 5), ("20", 5), ("-1", 5), ("x", 5), ("३", 5), ("003", 5)])
def test_a_level_that_there_is_not_is_pointed_at(args, at):
    with pytest.raises(SpecError, match="there are 1 to 19") as caught:
        parse_chain(f"zstd:{args}")
    assert caught.value.position == at


def test_a_bomb_is_refused_before_it_is_unpacked():
    desc, payload = encode(torch.zeros(1000))
    desc["shape"] = [1 << 28]
    with pytest.raises(CorruptPayload, match="zstd does not make"):
        decode(desc, payload)
    desc["shape"] = [50, 100]
    with pytest.raises(CorruptPayload, match="larger than the limit"):
        decode(desc, payload, max_bytes=4096)


@pytest.mark.parametrize("length", [0, 999, 1001, 1 << 22])
def test_a_frame_of_another_length_than_declared_is_corrupt_before_it_is_unpacked(length):
    desc, _ = encode(torch.zeros(1000, dtype=torch.uint8))
    with pytest.raises(CorruptPayload, match="does not say that it holds 1000"):
        decode(*with_frame(desc, zstandard.ZstdCompressor().compress(bytes(length))))


def test_a_frame_that_does_not_name_its_size_is_corrupt():
    desc, _ = encode(torch.zeros(1000, dtype=torch.uint8))
    frame = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(1000))
    with pytest.raises(CorruptPayload, match="does not say"):
        decode(*with_frame(desc, frame))


def test_bytes_after_the_frame_are_corrupt():
    desc, _ = encode(torch.zeros(1000, dtype=torch.uint8))
    frame = zstandard.ZstdCompressor().compress(bytes(1000))
    for more in (b"\0", frame, zstandard.ZstdCompressor().compress(b"")):
        with pytest.raises(CorruptPayload):
            decode(*with_frame(desc, frame + more))


def test_bytes_that_are_no_bool_are_corrupt():
    desc, _ = encode(torch.zeros(1000, dtype=torch.uint8))
    desc["dtype"] = "bool"  # as a sender does that leaves their packing out
    with pytest.raises(CorruptPayload, match="bool"):
        decode(*with_frame(desc, zstandard.ZstdCompressor().compress(b"\2" * 1000)))


@settings(deadline=None)
@given(st.data())
def test_any_bytes_are_corrupt_or_decode_to_the_same_shape(data):
    x = torch.arange(3000.0).view(30, 100).round(decimals=-1)
    desc, payload = encode(x)
    size = desc["meta"]["size"]
    for _ in range(data.draw(st.integers(1, 4))):
        payload[data.draw(st.integers(0, size - 1))] = data.draw(st.integers(0, 255))
    try:
        y = decode(desc, payload)
    except CorruptPayload:
        return
    assert y.shape == x.shape


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.float32, torch.float64])
def test_bytes_are_shuffled_alike_with_kernels_and_without(monkeypatch, dtype):
    x = torch.arange(3000.0).remainder(97).to(dtype)
    desc, payload = encode(x)
    monkeypatch.setattr(compiled, "kernels", lambda module, device: None)
    assert encode(x) == (desc, payload)
    assert torch.equal(decode(desc, payload), x)

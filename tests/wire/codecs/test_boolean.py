"""bits: the step of every chain that packs masks."""

from __future__ import annotations

import copy

import pytest
import torch

from tests.wire.codecs.chunks import Ends, codecs_in
from wire.codecs.chain import parse_chain
from wire.codecs.layout import padded
from wire.errors import CorruptPayload, SpecError

CHAINS = ["none", "fp16", "int8+lz4", "ragged+int4", "lowrank:4", "topk:0.1"]
SHAPES = [(), (0,), (1,), (64,), (65,), (3, 500), (1031,), (8, 128), (2, 0, 5), (2, 3, 17, 19)]


def some(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.4


@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("shape", SHAPES)
def test_masks_cross_with_eight_values_in_a_byte(shape, chain):
    x = some(*shape)
    y, encoded = Ends(chain).send(x)
    assert torch.equal(x, y)
    assert encoded.size == min(padded(x.numel()), padded(-(-x.numel() // 8)))
    assert (codecs_in(encoded.desc) == ["bits"]) is (x.numel() > 64)


def test_masks_keep_their_memory_order():
    x = some(2, 3, 17, 19).contiguous(memory_format=torch.channels_last)
    y, encoded = Ends("none").send(x)
    assert torch.equal(x, y)
    assert y.stride() == x.stride()
    assert encoded.desc["order"] == "NHWC"


def test_bits_stand_in_memory_order_the_lowest_first():
    x = torch.zeros(2, 50, dtype=torch.bool)
    x[0, 0] = x[0, 9] = x[1, 49] = True
    _, encoded = Ends("none").send(x)
    payload = b"".join(encoded.buffers)
    assert payload[:13] == bytes([1, 2, *[0] * 10, 8])


def test_rest_of_the_chain_packs_the_bits_further():
    _, encoded = Ends("zstd").send(torch.ones(64, 512, dtype=torch.bool))
    assert codecs_in(encoded.desc) == ["bits", "zstd"]
    assert encoded.size == 64


def test_masks_that_were_sent_raw_are_taken_too():
    x = some(100)
    ends = Ends("none")
    leaf = {"dtype": "bool", "shape": [100], "order": "C", "size": 100}
    y, end = ends.decoder.decode(leaf, bytearray(x.numpy().tobytes() + bytes(28)))
    assert torch.equal(x, y)
    assert end == 128


def test_spare_bits_other_than_zero_are_corrupt():
    ends = Ends("none")
    _, encoded = ends.send(some(100))
    payload = bytearray(b"".join(encoded.buffers))
    payload[12] |= 0x10
    with pytest.raises(CorruptPayload, match="spare bits"):
        ends.decoder.decode(encoded.desc, payload)


@pytest.mark.parametrize(
    ("changes", "part", "says"),
    [
        ({"dtype": "uint8"}, {}, "never takes"),
        ({"meta": {"n": 1}}, {}, "does not have"),
        ({}, {"shape": [12], "size": 12}, "not what bits makes"),
        ({"shape": [101]}, {"shape": [14], "size": 14}, "not what bits makes"),
    ],
)
def test_description_that_no_mask_has_is_corrupt(changes, part, says):
    ends = Ends("none")
    _, encoded = ends.send(some(100))
    desc = copy.deepcopy(encoded.desc) | changes
    desc["parts"][0] |= part
    with pytest.raises(CorruptPayload, match=says):
        ends.decoder.decode(desc, bytearray(64))


def test_it_is_not_written_down():
    with pytest.raises(SpecError, match="bits at character 6 of 'int8\\+bits' is always on; leave it out"):
        parse_chain("int8+bits")

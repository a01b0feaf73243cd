"""What the codecs' benchmark compares with, and how it judges."""

import torch

from benchmarks.codec_lanes import Boundary, codec_lane, naive_decode, naive_encode
from benchmarks.codecs import CHAINS, JUDGED, judge
from wire.codecs.base import Role
from wire.codecs.registry import codec_names
from wire.codecs.spec import parse_chain


def row(tensor, bottleneck="none", codec=JUDGED, speed=6.0, times=9.0, faults=0.0):
    return {
        "tensor": tensor,
        "bottleneck": bottleneck,
        "codec": codec,
        "fp32_bytes": 600_000,
        "gb_per_s": dict.fromkeys(("encode", "decode", "encode_2", "decode_2"), speed),
        "times_naive": {"encode_2": times, "decode_2": times},
        "faults": faults,
    }


def test_every_registered_codec_is_measured_but_the_one_that_needs_texts():
    measured = {stage.name for chain in CHAINS for stage in parse_chain(chain)}
    assert measured == set(codec_names()) - {"ragged"}


def test_delta_is_measured_where_samples_come_again():
    lane = codec_lane("delta+int4", Boundary("here", torch.randn(2, 3, 40, 40), Role.ACTIVATION, "none"))
    assert lane.encode().desc["parts"][0]["codec"] == "int4"
    assert lane.sent_bytes < 2 * 3 * 40 * 40
    lane.decode()
    lane.decode()


def test_the_naive_way_is_int8():
    x = torch.randn(4, 8, 14, 14) * torch.logspace(-3, 3, 8).view(-1, 1, 1)
    q, low, scale = naive_encode(x)
    assert q.dtype == torch.uint8
    assert torch.all((naive_decode(q, low, scale) - x).abs() <= scale * 0.501)


def test_a_lane_decodes_what_it_encodes():
    x = torch.randn(2, 3, 9, 9)
    lane = codec_lane("lz4", Boundary("here", x, Role.ACTIVATION, "none"))
    assert torch.equal(lane.decode(), x)
    assert lane.encode().size == lane.sent_bytes


def test_the_slowest_tensor_decides_and_other_codecs_do_not():
    fine = [row("a"), row("b", bottleneck="conv", speed=4.0), row("c", codec="lz4", speed=0.1)]
    assert all(verdict.met for verdict in judge(fine))
    slow = judge([*fine, row("d", speed=4.9)])
    assert [verdict.met for verdict in slow].count(False) == 2
    assert "(d)" in str(slow[0])
    assert not judge([*fine, row("f", bottleneck="conv", speed=1.0)])[-2].met
    assert not judge([*fine, row("g", faults=800)])[-1].met

"""What a chunk costs on this machine: real sizes, times of the parts that ran, and nothing of the model changed."""

from dataclasses import replace

import pytest
import torch

import token_model  # noqa: F401  (registers its model)
from common.errors import UserError
from edge.chunk_costs import STREAMS_OF, ChunkCosts
from edge.compress import parse_compress
from edge.opened import open_model
from tests.tiny_job import TINY_JOB

CUTS = ("stem", "blocks")
# 4 samples of [8, 8, 8] floats at either cut.
DENSE = 4 * 8 * 8 * 8 * 4


pytestmark = pytest.mark.usefixtures("one_thread")


def costs(**changes):
    config = replace(TINY_JOB, threads=1, **changes)
    opened = open_model(config)
    return opened, ChunkCosts(opened, config)


def test_sizes_are_those_of_messages_and_every_part_takes_time():
    _, measured = costs()
    cost = measured.cost(CUTS, parse_compress(("none",)))
    assert set(cost.seconds) == {"0F", "1F", "2T", "1B", "0B"}
    assert all(seconds > 0 for seconds in cost.seconds.values())
    assert set(cost.messages) == set(STREAMS_OF)
    for message in cost.messages.values():
        assert DENSE < message.size_bytes < DENSE + 300  # the frame's head
        assert message.encode_s > 0
        assert message.decode_s > 0
    assert measured.dense_bytes(CUTS) == 2 * 2 * 2 * DENSE  # both chunks, both cuts, both ways


def test_streams_that_are_set_apart_cost_their_own():
    _, measured = costs()
    cost = measured.cost(CUTS, parse_compress(("none", "cut1.grad=fp16", "cut2.act=int8")))
    sizes = {kind: message.size_bytes for kind, message in cost.messages.items()}
    assert sizes["0F"] > DENSE
    assert sizes["2T"] > DENSE
    assert DENSE / 2 < sizes["1B"] < DENSE / 2 + 300
    # A scale for each of 32 channels, as an offset and a step.
    assert DENSE / 4 + 256 < sizes["1F"] < DENSE / 4 + 256 + 300


@pytest.mark.parametrize("compress", ["lz4", "int8+zstd", "lowrank:2", "topk:0.1,feedback", "delta+int4"])
def test_codecs_that_remember_or_depend_on_values_are_measured_too(compress):
    _, measured = costs(augment=False)
    cost = measured.cost(CUTS, parse_compress((compress,)))
    assert all(0 < message.size_bytes < DENSE + 300 for message in cost.messages.values())
    if compress == "delta+int4":  # of samples seen before; the first time they would cross in half precision
        assert cost.messages["0F"].size_bytes < DENSE / 4


def test_bottlenecks_cross_as_they_are_in_the_end():
    _, measured = costs(model="token_net", cuts=("embed", "blocks"))
    cuts = ("embed", "blocks")
    dense, narrow = (
        measured.cost(cuts, parse_compress((spec,)))
        for spec in ("none", "decay:rate=0.5,steps=10,iterations=2")
    )
    # 24 wide, then 12, then 6.
    assert narrow.messages["0F"].size_bytes == pytest.approx(dense.messages["0F"].size_bytes / 4, abs=300)


def test_the_model_stays_as_it_is():
    opened, measured = costs(memory_format="auto")
    before = {name: tensor.clone() for name, tensor in opened.model.state_dict().items()}
    measured.cost(CUTS, parse_compress(("int8",)))
    measured.cost(("blocks.0", "head.0"), parse_compress(("conv:4x2,4x1",)))
    after = opened.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(parameter.grad is None for parameter in opened.model.parameters())


def test_what_was_measured_is_not_measured_again():
    _, measured = costs()
    first = measured.cost(CUTS, parse_compress(("none",)))
    assert measured.cost(CUTS, parse_compress(("none",))) == first
    assert measured.cost(CUTS, parse_compress(("none", "grad=fp16"))).seconds == first.seconds


@pytest.mark.parametrize(
    ("cuts", "compress", "said"),
    [
        (CUTS, "linear", "use codecs or another cut"),
        (CUTS, "lowrank:64", "does nothing at cut"),
        (("blocks", "stem"), "none", "must come before cut 2"),
        (("stem", "nowhere"), "none", "unknown cut 'nowhere'"),
    ],
)
def test_what_does_not_fit_is_refused(cuts, compress, said):
    _, measured = costs()
    with pytest.raises(UserError, match=said):
        measured.cost(cuts, parse_compress((compress,)))

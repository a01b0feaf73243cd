"""The comparison of orders: that the usual one is the usual one, and that either ends."""

import random

import pytest

from benchmarks import schedule_order
from benchmarks.schedule_order import CHUNKS, best, ours, random_step, usual
from common.cost import ChunkCost, Link, StepModel

UNIT = ChunkCost(seconds=dict.fromkeys(("0F", "1F", "2T", "1B", "0B"), 1.0), messages={})
FREE = Link(up_bit_s=1e9, down_bit_s=1e9)


def computed(timeline, lane):
    return " ".join(str(span.action) for span in timeline.lane(lane))


def test_the_usual_order_has_a_ready_backward_first():
    timeline = usual(StepModel.even(UNIT, CHUNKS, FREE), CHUNKS, 0)
    assert computed(timeline, "edge compute").startswith(
        "0F0 0F1 2T0 2T1 0B0 0B1 0F2 0F3 2T2 2T3 0B2 0B3 0F4"
    )
    assert timeline.max_in_flight == 2


def test_ours_is_the_order_of_the_schedule():
    timeline = ours(StepModel.even(UNIT, CHUNKS, FREE), CHUNKS, 0)
    assert computed(timeline, "edge compute").startswith("0F0 0F1 2T0 2T1 0F2 0F3 2T2 2T3 0F4")


@pytest.mark.parametrize("seed", range(5))
def test_every_chunk_is_computed_once_in_either_order_within_the_depth(seed):
    model = random_step(random.Random(seed))
    for run in (usual, ours):
        timeline = best(model, 3, run)
        assert timeline.max_in_flight <= 3
        assert len(timeline.lane("edge compute")) == 3 * CHUNKS
        assert len(timeline.lane("cloud compute")) == 2 * CHUNKS


def test_it_prints_a_ratio_for_every_bound(capsys):
    schedule_order.main(["--steps", "12"])
    printed = capsys.readouterr().out
    assert "backward first" in printed
    assert printed.count("pass") + printed.count("FAIL") >= 2

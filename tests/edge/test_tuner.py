"""Depth and lead are chosen from what was measured, and from nothing that a peer makes up."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.cost import ChunkCost, Link, StepModel
from common.lanes import COMPUTE, DECODE, ENCODE
from common.plan import Plan, best_plan
from common.simulator import simulate
from edge.tuner import FIRST_DEPTH, LATE_SHARE, MEASURED_STEPS, QUEUE_S, Tuner, measured_model

EDGE = {
    COMPUTE: {"0F": 1.0, "2T": 3.0, "0B": 5.0, "be": 9.0, "co": 9.0},
    ENCODE: {"0F": 0.1, "2T": 0.3},
    DECODE: {"2T": 0.25, "0B": 0.5},
}
CLOUD = {
    "mean_s": {
        COMPUTE: {"1F": 2.0, "1B": 4.0},
        ENCODE: {"1F": 0.2, "1B": 0.4},
        DECODE: {"1F": 0.15, "1B": 0.35},
    },
    "sizes": {"1F": 2000.4, "1B": 4000.0},
    "rate_bit_s": 2e6,
}


def measured(**changes):
    return measured_model(
        **{
            "chunks": 4,
            "edge": EDGE,
            "cloud": CLOUD,
            "sizes": {"0F": 1000.0, "2T": 3000.6},
            "up_bit_s": 1e6,
            "rtt_s": 0.5,
            "shared_cores": False,
            **changes,
        }
    )


def test_every_measurement_finds_its_place():
    (chain, *_) = measured().work()
    assert [piece.seconds for piece in chain if "compute" in piece.lane] == [1, 2, 3, 4, 5]
    assert [piece.seconds for piece in chain if "encode" in piece.lane] == [0.1, 0.2, 0.3, 0.4]
    assert [piece.seconds for piece in chain if "decode" in piece.lane] == [0.15, 0.25, 0.35, 0.5]
    # 1000 and 3001 bytes up at 1 Mbit/s, 2000 and 4000 down at 2 Mbit/s, a quarter of a second each way.
    assert [piece.seconds for piece in chain if piece.lane == "up"] == pytest.approx([0.008, 0.024008])
    assert [piece.seconds for piece in chain if piece.lane == "down"] == pytest.approx([0.008, 0.016])
    assert {piece.delay_s for piece in chain if piece.lane in ("up", "down")} == {measured().link.delay_s}


def test_chunks_and_shared_cores_are_taken_over():
    model = measured(chunks=7, shared_cores=True)
    assert len(model.chunks) == 7
    assert model.shared_cores


@pytest.mark.parametrize("rate", [0.0, -1.0, math.inf, math.nan])
def test_a_rate_that_was_not_measured_bounds_nothing(rate):
    model = measured(up_bit_s=rate, cloud={**CLOUD, "rate_bit_s": rate})
    link_s = sum(piece.seconds for piece in model.work()[0] if piece.lane in ("up", "down"))
    assert link_s < 1e-9


def test_a_round_trip_that_clocks_make_negative_is_none():
    assert measured(rtt_s=-0.1).link.delay_s == measured(rtt_s=0.0).link.delay_s


def test_a_link_delays_by_its_queues_as_far_as_it_is_busy_and_by_what_comes_late():
    late_s = LATE_SHARE * 5
    assert measured(rtt_s=0.0, up_bit_s=1e3).link.delay_s == pytest.approx(QUEUE_S + late_s)
    # 0.032 s up and 0.024 s down of the edge's 9 s
    share = 0.032008 / 9
    assert measured(rtt_s=0.0).link.delay_s == pytest.approx(QUEUE_S * share + late_s)
    assert measured(rtt_s=0.5).link.delay_s == pytest.approx(0.25 + QUEUE_S * share + late_s)


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(0, 2**63) | st.floats(0, 1e9) | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from((COMPUTE, ENCODE, DECODE, "1F", "1B", "mean_s", "sizes")), inner, max_size=4
        )
    ),
    max_leaves=8,
)


@settings(deadline=None)
@given(mean_s=PLAIN, sizes=PLAIN, rate=PLAIN)
def test_whatever_shape_the_cloud_s_measurements_have_there_is_a_model(mean_s, sizes, rate):
    model = measured(cloud={"mean_s": mean_s, "sizes": sizes, "rate_bit_s": rate})
    assert simulate(model, 2).makespan_s >= 4 * (1 + 3 + 5)  # the edge's own work at least
    assert measured(cloud={}).chunks == measured(cloud={"mean_s": 7, "sizes": [], "rate_bit_s": "x"}).chunks


def slow_link(chunks=16):
    cost = ChunkCost(seconds=dict.fromkeys(("0F", "1F", "2T", "1B", "0B"), 1.0), messages={})
    return StepModel.even(cost, chunks, Link(up_bit_s=1e12, down_bit_s=1e12, delay_s=5))


def test_some_steps_are_measured_but_not_the_first():
    tuner = Tuner(16, None)
    assert tuner.plan == Plan(FIRST_DEPTH)
    wanted = []
    for step in range(1, 20):
        tuner.stepped()
        if tuner.wants_measurements:
            wanted.append(step)
    assert tuple(wanted) == MEASURED_STEPS
    assert 1 not in wanted


def test_a_choice_is_the_simulator_s():
    tuner = Tuner(16, None)
    assert tuner.choose(slow_link()) == tuner.plan == best_plan(slow_link())
    assert tuner.plan.depth > FIRST_DEPTH


def test_a_disturbed_step_does_not_change_the_choice():
    model = slow_link()
    slow = ChunkCost(seconds={**model.chunks[0].seconds, "1F": 1000.0}, messages={})
    disturbed = StepModel.even(slow, 16, model.link)
    assert best_plan(disturbed) != best_plan(model)
    for order in ((model, disturbed), (disturbed, model)):
        tuner = Tuner(16, None)
        for one in order:
            tuner.choose(one)
        assert tuner.plan == best_plan(model)


@pytest.mark.parametrize("fixed", [1, 3, 8])
def test_a_depth_that_the_user_gave_stays(fixed):
    tuner = Tuner(8, fixed)
    assert tuner.plan.depth == fixed
    assert tuner.choose(slow_link(8)).depth == tuner.plan.depth == fixed


@settings(deadline=None)
@given(chunks=st.integers(1, 20), fixed=st.none() | st.integers(1, 40))
def test_there_are_never_more_chunks_in_flight_than_there_are(chunks, fixed):
    assert Tuner(chunks, fixed).plan.depth == min(chunks, fixed or FIRST_DEPTH)

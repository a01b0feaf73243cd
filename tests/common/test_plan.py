"""Depth and lead are those that the simulator finds best, and the smallest depth that is nearly so."""

import pytest
from hypothesis import given, settings

from common.cost import ChunkCost, Link, Message, StepModel
from common.plan import Plan, best_plan
from common.simulator import simulate
from tests.common.test_simulator import FAST, MODELS, UNIT


def seconds(model: StepModel, plan: Plan) -> float:
    links = [model.link.scaled(off) for off in (0.95, 1, 1.05)]
    return sum(simulate(model.with_link(link), plan.depth, lead=plan.lead).makespan_s for link in links)


def test_with_a_long_delay_depth_two_leaves_the_line_idle_and_the_best_plan_is_deeper() -> None:
    model = StepModel.even(UNIT, 16, Link(up_bit_s=1e12, down_bit_s=1e12, delay_s=5))
    shallow, depth = simulate(model, 2), best_plan(model).depth
    assert depth > 2
    assert simulate(model, depth).makespan_s < 0.4 * shallow.makespan_s
    assert simulate(model, depth).idle_s("edge compute") < 0.2 * shallow.idle_s("edge compute")


def test_without_delay_the_best_plan_is_shallow() -> None:
    cost = ChunkCost(seconds={"0F": 0.1, "1F": 1, "2T": 0.1, "1B": 2, "0B": 0.1}, messages={})
    assert best_plan(StepModel.even(cost, 16, FAST)) == Plan(2, 0)


@settings(deadline=None, max_examples=30)
@given(model=MODELS)
def test_best_plan_has_the_smallest_depth_within_tolerance(model: StepModel) -> None:
    plans = [Plan(depth, lead) for depth in range(1, len(model.chunks) + 1) for lead in (0, 1, 2)]
    took_s = {plan: seconds(model, plan) for plan in plans}
    enough_s = min(took_s.values()) * 1.1 * (1 + 1e-9)
    chosen = best_plan(model, tolerance=0.1)
    assert took_s[chosen] <= enough_s
    assert all(took_s[plan] > min(took_s.values()) * 1.1 for plan in plans if plan.depth < chosen.depth)


@pytest.mark.parametrize("depth", [1, 4])
def test_where_the_depth_is_given_only_the_lead_is_chosen(depth: int) -> None:
    assert best_plan(balanced(), depth=depth).depth == depth


def balanced() -> StepModel:
    """A step that keeps the cores and both directions of the link about equally busy."""
    seconds = {"0F": 0.010, "1F": 0.110, "2T": 0.020, "1B": 0.172, "0B": 0.018}
    sizes = {"0F": 219_540, "1F": 141_620, "2T": 141_620, "1B": 219_540}
    messages = {kind: Message(size_bytes=size) for kind, size in sizes.items()}
    cost = ChunkCost(seconds=seconds, messages=messages)
    return StepModel.even(cost, 8, Link(up_bit_s=9.36e6, down_bit_s=9.36e6))


def test_a_lead_helps_where_link_and_cores_are_equally_busy() -> None:
    plan = best_plan(balanced())
    assert plan.lead > 0
    assert seconds(balanced(), plan) < 0.95 * seconds(balanced(), Plan(plan.depth, 0))


def test_more_chunks_than_tell_anything_new_take_no_longer_to_plan() -> None:
    model = balanced()
    many = StepModel.even(model.chunks[0], 1000, model.link)
    assert best_plan(many) == best_plan(StepModel.even(model.chunks[0], 24, model.link))

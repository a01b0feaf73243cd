"""What the edge may choose without changing any result, chosen by simulating it."""

from __future__ import annotations

from dataclasses import replace
from statistics import fmean
from typing import Final, NamedTuple

from common.cost import StepModel
from common.simulator import simulate

__all__ = ["Plan", "best_plan"]

_LEADS: Final = (0, 1, 2)
_RATES_OFF: Final = (0.95, 1.0, 1.05)
_MOST_DEPTH: Final = 16  # deeper hardly ever helps
_MOST_CHUNKS: Final = 24  # simulated: more of the same tell nothing new


class Plan(NamedTuple):
    """How the edge orders a step.

    Attributes:
        depth: the most chunks in flight.
        lead: by how many chunks activations may be ahead of gradients on the link up, see `wire.outbox`.
    """

    depth: int
    lead: int = 0


def best_plan(model: StepModel, *, depth: int | None = None, tolerance: float = 0.005) -> Plan:
    """Return the plan of the smallest depth whose simulated step takes at most 1 + tolerance times the best plan's.

    Smaller is better beyond that: each chunk in flight holds its activations on both sides. Where link and cores
    are about equally busy, a plan's time jumps with small changes of either; so the mean counts, over links a
    little slower and faster than was measured.

    Args:
        model: what a step costs.
        depth: the depth, where only the lead is to be chosen.
        tolerance: how much slower a smaller depth may be.
    """
    model = replace(model, chunks=model.chunks[:_MOST_CHUNKS])
    models = [model.with_link(model.link.scaled(off)) for off in _RATES_OFF]
    depths = range(1, min(len(model.chunks), _MOST_DEPTH) + 1) if depth is None else (depth,)
    seconds = {
        plan: fmean(simulate(model, plan.depth, lead=plan.lead).makespan_s for model in models)
        for plan in (Plan(depth, lead) for depth in depths for lead in _LEADS)
    }
    enough_s = min(seconds.values()) * (1 + tolerance)
    chosen = next(plan.depth for plan, step_s in seconds.items() if step_s <= enough_s)
    return min((Plan(chosen, lead) for lead in _LEADS), key=seconds.__getitem__)

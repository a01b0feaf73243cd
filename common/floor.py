"""The floor of a step: a time that no schedule can beat, whatever its order or depth.

DESIGN section 6 states it as the largest of edge compute, cloud compute, bytes up / rate and bytes down /
rate, plus the unavoidable fill and drain. Precisely: take a resource (one side's cores, both sides' where
they share them, the link up, the link down) and any set S of the work that must pass through it. None of S
can start before

    fill(S)   the shortest way to any of S: from the step's start through the pieces of work and the delays
              that must come first, each at full speed;

S itself takes, at full speed, with the resource never idle,

    work(S)   the sum of its seconds;

and after the last of S, wherever in the order it is, comes at least

    drain(S)  the shortest way from any of S to the end of the step.

So the step takes at least fill(S) + work(S) + drain(S), and the floor is the largest such sum over all
resources and sets. Taking all of a resource's work as S gives the sentence in DESIGN; smaller sets only
raise the bound: the down link carries few bytes until the first gradient is ready, so S is often "the
gradients". The set that gives the largest sum falls out of scheduling the resource alone with preemption,
the longest drain first (J. R. Jackson 1955; J. Carlier, "The one-machine sequencing problem", EJOR 11,
1982).

"What must come first" is the chunk's own chain and, since each kind of action and message keeps chunk order,
the same kind for the chunks before.
"""

from __future__ import annotations

import heapq
import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from common.cost import StepModel, Work

__all__ = ["Floor", "floor"]


@dataclass(frozen=True, kw_only=True)
class Floor:
    """The floor of one step and what makes it.

    Attributes:
        bound_by: the resource that gives the bound: `edge`, `cloud`, `cores`, `up` or `down`.
        fill_s: seconds before that resource's part can begin.
        work_s: seconds of that part.
        drain_s: seconds after it, the update included.
        loads_s: each resource's whole work in seconds, also outside that part.
    """

    bound_by: str
    fill_s: float
    work_s: float
    drain_s: float
    loads_s: Mapping[str, float]

    @property
    def total_s(self) -> float:
        """The floor itself."""
        return self.fill_s + self.work_s + self.drain_s


def floor(model: StepModel, *, evaluate: bool = False) -> Floor:
    """Compute the floor of one step.

    Args:
        model: what everything costs.
        evaluate: forward only.
    """
    jobs = _jobs(model.work(evaluate=evaluate))
    by_resource: dict[str, list[_Job]] = defaultdict(list)
    for lane, job in jobs:
        by_resource[model.resource(lane)].append(job)
    bounds = {resource: _one_machine(jobs) for resource, jobs in by_resource.items()}
    bound_by = next(iter(bounds))
    for resource, bound in bounds.items():
        if _says_more(bound, bounds[bound_by]):
            bound_by = resource
    fill_s, work_s, drain_s = bounds[bound_by]
    return Floor(
        bound_by=bound_by,
        fill_s=fill_s,
        work_s=work_s,
        drain_s=drain_s + model.update_s,
        loads_s={resource: sum(job.seconds for job in jobs) for resource, jobs in by_resource.items()},
    )


class _Job(NamedTuple):
    """A piece of work with the shortest ways from the step's start to it and from it to the step's end."""

    head_s: float
    seconds: float
    tail_s: float


def _jobs(work: list[list[Work]]) -> list[tuple[str, _Job]]:
    places = range(len(work[0]))
    heads = [[0.0 for _ in places] for _ in work]
    tails = [[0.0 for _ in places] for _ in work]
    for chunk, chain in enumerate(work):
        for place in places:
            if place:
                before = chain[place - 1]
                heads[chunk][place] = heads[chunk][place - 1] + before.seconds + before.delay_s
            if chunk:
                same_kind_s = heads[chunk - 1][place] + work[chunk - 1][place].seconds
                heads[chunk][place] = max(heads[chunk][place], same_kind_s)
    for chunk in reversed(range(len(work))):
        chain = work[chunk]
        for place in reversed(places):
            if place + 1 < len(chain):
                tails[chunk][place] = (
                    chain[place].delay_s + chain[place + 1].seconds + tails[chunk][place + 1]
                )
            if chunk + 1 < len(work):
                same_kind_s = work[chunk + 1][place].seconds + tails[chunk + 1][place]
                tails[chunk][place] = max(tails[chunk][place], same_kind_s)
    return [
        (piece.lane, _Job(heads[chunk][place], piece.seconds, tails[chunk][place]))
        for chunk, chain in enumerate(work)
        for place, piece in enumerate(chain)
    ]


def _one_machine(jobs: list[_Job]) -> tuple[float, float, float]:
    """The largest head + work + tail over all sets of jobs on one machine, as its three terms.

    Jackson's preemptive schedule: always the job with the longest tail among those whose head has passed. The
    job whose end plus tail is largest closes the set that bounds; the set is what ran without a pause, and
    with no shorter tail, up to there.
    """
    waiting = sorted(jobs)
    ready: list[tuple[float, float]] = []  # (-tail, seconds left)
    now_s, best = 0.0, (0.0, 0.0, 0.0)
    ran: list[tuple[float, float, float]] = []  # (start, end, tail) of each stretch
    place = 0
    while place < len(waiting) or ready:
        if not ready:
            now_s = max(now_s, waiting[place].head_s)
        while place < len(waiting) and waiting[place].head_s <= now_s:
            heapq.heappush(ready, (-waiting[place].tail_s, waiting[place].seconds))
            place += 1
        minus_tail_s, left_s = heapq.heappop(ready)
        until_s = waiting[place].head_s if place < len(waiting) else now_s + left_s
        end_s = min(now_s + left_s, until_s)
        ran.append((now_s, end_s, -minus_tail_s))
        if end_s < now_s + left_s:
            heapq.heappush(ready, (minus_tail_s, left_s - (end_s - now_s)))
        else:
            fill_s = _start_of_set(ran)
            bound = (fill_s, end_s - fill_s, -minus_tail_s)
            best = bound if _says_more(bound, best) else best
        now_s = end_s
    return best


def _says_more(bound: tuple[float, float, float], than: tuple[float, float, float]) -> bool:
    """Whether a bound is larger, or as large with more of it the resource's own work."""
    if math.isclose(sum(bound), sum(than)):
        return bound[1] > than[1]
    return sum(bound) > sum(than)


def _start_of_set(ran: list[tuple[float, float, float]]) -> float:
    start_s, _, tail_s = ran[-1]
    for earlier_start_s, end_s, earlier_tail_s in reversed(ran[:-1]):
        if end_s < start_s or earlier_tail_s < tail_s:
            break
        start_s = earlier_start_s
    return start_s

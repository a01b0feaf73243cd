"""What a lost connection costs: the time from the cut to the next finished step.

It should be at most one round trip, one step and the back-off. The proxy keeps the times: a step begins when the client
sends ``begin`` and is finished when ``committed`` reaches it; the back-off lasts from the cut to the next connection.
Connecting takes a round trip through the proxy, as on a real line.
"""

from __future__ import annotations

import statistics
from bisect import bisect
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.fault_plans import CutFrames, FrameCut
from benchmarks.fault_runs import Job, train_to_end
from benchmarks.faulty_proxy import FaultyProxy

ALLOWED = 1.1
"""So much of the allowed time, for what a busy machine adds."""
WHERE = (("backward", 0), ("commit", 0), ("commit", 1 << 30), ("committed", 0))
"""A step is cut in its middle, before and after its commit, and before the answer."""


@dataclass(frozen=True)
class Cost:
    """Medians over the cuts at one round-trip time, in seconds.

    Attributes:
        rtt_s: the round-trip time.
        step_s: of an undisturbed step, from its beginning to its end.
        back_off_s: from the cut to the next connection.
        finished_s: from the cut to the next finished step.
    """

    rtt_s: float
    step_s: float
    back_off_s: float
    finished_s: float

    @property
    def allowed_s(self) -> float:
        """One round trip, one step and the back-off."""
        return self.rtt_s + self.step_s + self.back_off_s

    @property
    def met(self) -> bool:
        """Whether a fault costs no more than that."""
        return self.finished_s <= ALLOWED * self.allowed_s

    def __str__(self) -> str:
        ms = [f"{1e3 * one:6.0f}" for one in (self.rtt_s, self.step_s, self.back_off_s, self.finished_s)]
        rest = (self.finished_s - self.back_off_s - self.step_s) / self.rtt_s if self.rtt_s else 0.0
        trips = f"{rest:5.1f}" if self.rtt_s else "    -"
        ratio = self.finished_s / self.allowed_s
        return f"{'  '.join(ms)}  {1e3 * self.allowed_s:8.0f}  {ratio:5.2f}  {trips}  {'PASS' if self.met else 'FAIL'}"


HEAD = "rtt ms  step ms  back-off  finished   allowed  ratio  round trips beyond step and back-off"


def costs(address: str, job: Job, rtts_s: Sequence[float], *, cuts: int) -> list[Cost]:
    """Cut a training at each of some round-trip times.

    Args:
        address: the server's.
        job: what to train.
        rtts_s: added round-trip times in seconds.
        cuts: in each training; steps between two cuts are undisturbed.
    """
    return [_cost(address, job, rtt_s, cuts) for rtt_s in rtts_s]


def _cost(address: str, job: Job, rtt_s: float, cuts: int) -> Cost:
    planned = [FrameCut(*WHERE[number % len(WHERE)], skip=4) for number in range(cuts)]
    plan = CutFrames(planned, keep={"begin", "committed"})
    with FaultyProxy(address, plan, delay_s=rtt_s / 2) as proxy:
        ended = train_to_end(proxy.address, job, 5 * cuts + 10, 0)
    assert ended.status == 0, ended.err
    cut_at = [event.at_s for event in proxy.events if event.kind == "cut"]
    connected_at = [event.at_s for event in proxy.events if event.kind == "connected"]
    assert len(cut_at) == cuts, f"{len(cut_at)} of {cuts} cuts were made"
    begun, finished = plan.times("begin"), plan.times("committed")
    finished_at = sorted(finished.values())
    # A step that a cut fell into is not counted: it has its beginning before the cut and its end after it.
    whole = [
        finished[step] - begun[step] + rtt_s / 2
        for step in finished
        if step in begun and bisect(cut_at, begun[step]) == bisect(cut_at, finished[step])
    ]
    after = [(_next(connected_at, cut) - cut, _next(finished_at, cut) - cut) for cut in cut_at]
    back_offs, until_finished = zip(*after, strict=True)
    return Cost(*map(statistics.median, ([rtt_s], whole, back_offs, until_finished)))


def _next(times: Sequence[float], at: float) -> float:
    return times[bisect(times, at)]

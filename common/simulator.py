"""Dry-runs the schedule against a cost model: how long a step takes, who waits, whether it ends at all.

It drives the very generators that training runs on (`common.schedule`). Messages wait before the encoder,
the link and the decoder, gradients before activations. On the link they go, and make room on their way, as
`wire.outbox` says: down, activations first; up, in the order of their chunks with a lead for activations.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter
from typing import Final, NamedTuple

from common.cost import LANES, StepModel, Work
from common.schedule import Action, Schedule, Wait, cloud_schedule, edge_schedule
from common.timeline import Span, Timeline

__all__ = ["DeadlockError", "simulate"]


class DeadlockError(RuntimeError):
    """A schedule waits for what will never arrive."""


def simulate(
    model: StepModel,
    depth: int,
    *,
    lead: int = 0,
    evaluate: bool = False,
    edge: Schedule | None = None,
    cloud: Schedule | None = None,
) -> Timeline:
    """Run one step in simulated time.

    Args:
        model: what everything costs.
        depth: the most chunks in flight.
        lead: by how many chunks activations may be ahead of gradients on the link up.
        evaluate: forward only.
        edge: a schedule to try in place of `edge_schedule`.
        cloud: a schedule to try in place of `cloud_schedule`.

    Raises:
        DeadlockError: if both sides wait and nothing is on its way.
    """
    chunks = len(model.chunks)
    edge = edge or edge_schedule(chunks, depth, evaluate=evaluate)
    cloud = cloud or cloud_schedule(chunks, evaluate=evaluate)
    return _Step(model, model.work(evaluate=evaluate), edge, cloud, lead).run()


class _Side:
    """One side's schedule and what has arrived for it."""

    def __init__(self, schedule: Schedule) -> None:
        self._schedule = schedule
        self._started = False
        self._waiting = False
        self.arrivals: list[Action] = []
        self.finished = False

    def next_action(self) -> Action | None:
        """Ask, now that the last action is done, for the next; None while there is none."""
        while not (self.finished or (self._waiting and not self.arrivals)):
            try:
                todo = self._schedule.send(self._take_arrivals())
            except StopIteration:
                self.finished = True
                return None
            self._waiting = isinstance(todo, Wait)
            if not isinstance(todo, Wait):
                return todo
        return None

    def _take_arrivals(self) -> list[Action] | None:
        if not self._started:
            self._started = True
            return None  # a generator takes nothing before its first action
        arrivals, self.arrivals = self.arrivals, []
        return arrivals


class _Running(NamedTuple):
    """Work under way on a lane."""

    piece: Work
    start_s: float
    left_s: float  # seconds left at full speed


class _Step:
    """One simulation: what is under way on each lane, what waits for it, what is on its way."""

    def __init__(
        self, model: StepModel, work: list[list[Work]], edge: Schedule, cloud: Schedule, lead: int
    ) -> None:
        self._model = model
        self._lead = lead
        self._work = work
        self._resource = {lane: model.resource(lane) for lane in LANES}
        self._compute = {piece.action: piece for chain in work for piece in chain if piece.lane in _COMPUTE}
        self._sides = dict(zip(_COMPUTE, (_Side(edge), _Side(cloud)), strict=True))
        self._queues: dict[str, list[tuple[int, bool, int, int, Work, float]]] = {
            lane: [] for lane in LANES if lane not in _COMPUTE
        }
        self._travelling: list[tuple[float, int, int, Work]] = []
        self._running: dict[str, _Running] = {}
        self._done = [0] * len(work)  # pieces of each chunk's chain
        self._now_s = 0.0
        self._spans: list[Span] = []
        self._in_flight = 0
        self._max_in_flight = 0

    def run(self) -> Timeline:
        self._start_computing()
        while self._running or self._travelling:
            self._advance()
            self._start_waiting()
            if not self._more_happens_now():
                self._start_computing()
        if not all(side.finished for side in self._sides.values()):
            stuck = [
                str(c[done].action) for done, c in zip(self._done, self._work, strict=True) if done < len(c)
            ]
            raise DeadlockError(f"both sides wait and nothing is on its way; not done: {', '.join(stuck)}")
        return Timeline(
            spans=tuple(sorted(self._spans, key=lambda span: span.start_s)),
            makespan_s=self._now_s + self._model.update_s,
            max_in_flight=self._max_in_flight,
        )

    def _start_computing(self) -> None:
        for lane, side in self._sides.items():
            if lane not in self._running and (action := side.next_action()) is not None:
                piece = self._compute[action]
                self._start(piece, piece.seconds)

    def _start_waiting(self) -> None:
        for lane, queue in self._queues.items():
            if lane in _LINKS and queue:
                self._interrupt(lane, queue)
            if lane not in self._running and queue:
                *_, piece, left_s = heapq.heappop(queue)
                self._start(piece, left_s)

    def _interrupt(self, lane: str, queue: list[tuple[int, bool, int, int, Work, float]]) -> None:
        """Put a message back that is on its way while a more urgent one waits."""
        run = self._running.get(lane)
        if run is not None and run.left_s > 0 and queue[0][0] < self._rank(run.piece):
            del self._running[lane]
            if self._now_s > run.start_s:
                self._spans.append(Span(lane, run.piece.action, run.start_s, self._now_s))
            self._queue(run.piece, run.left_s, begun=True)

    def _more_happens_now(self) -> bool:
        # What costs nothing is done before a side decides what to compute next, or it would decide too early.
        ending = any(run.left_s <= 0 and lane in self._queues for lane, run in self._running.items())
        return ending or (bool(self._travelling) and self._travelling[0][0] <= self._now_s)

    def _start(self, piece: Work, left_s: float) -> None:
        if piece.place != self._done[piece.action.chunk]:
            raise DeadlockError(f"{piece.action} was to run, but its input has not arrived")
        self._running[piece.lane] = _Running(piece, self._now_s, left_s)
        if piece.place == 0:
            self._in_flight += 1
            self._max_in_flight = max(self._max_in_flight, self._in_flight)

    def _advance(self) -> None:
        """Go to the next moment at which something ends or arrives."""
        sharing = Counter(self._resource[lane] for lane in self._running)
        lasts_s = {lane: run.left_s * sharing[self._resource[lane]] for lane, run in self._running.items()}
        passed_s = min(lasts_s.values(), default=math.inf)
        if self._travelling:
            passed_s = min(passed_s, max(0.0, self._travelling[0][0] - self._now_s))
        self._now_s += passed_s
        for lane, run in list(self._running.items()):
            if lasts_s[lane] <= passed_s:
                del self._running[lane]
                self._spans.append(Span(lane, run.piece.action, run.start_s, self._now_s))
                self._finish(run.piece)
            else:
                left_s = run.left_s - passed_s / sharing[self._resource[lane]]
                self._running[lane] = run._replace(left_s=left_s)
        while self._travelling and self._travelling[0][0] <= self._now_s:
            self._enqueue(heapq.heappop(self._travelling)[-1])

    def _finish(self, piece: Work) -> None:
        chunk = piece.action.chunk
        self._done[chunk] += 1
        if self._done[chunk] == len(self._work[chunk]):
            self._in_flight -= 1
            return
        following = self._work[chunk][self._done[chunk]]
        if piece.delay_s:
            arrives_s = self._now_s + piece.delay_s
            heapq.heappush(self._travelling, (arrives_s, piece.place, chunk, following))
        else:
            self._enqueue(following)

    def _enqueue(self, piece: Work) -> None:
        if piece.lane in self._sides:
            self._sides[piece.lane].arrivals.append(piece.action)
        else:
            self._queue(piece, piece.seconds)

    def _queue(self, piece: Work, left_s: float, *, begun: bool = False) -> None:
        chunk, is_forward = piece.action.chunk, not piece.action.backward
        entry = (self._rank(piece), not begun, int(is_forward), chunk, piece, left_s)
        heapq.heappush(self._queues[piece.lane], entry)

    def _rank(self, piece: Work) -> int:
        """What has a lower rank goes first, and on a link interrupts what is on its way."""
        if piece.lane == "up":
            return piece.action.chunk - (0 if piece.action.backward else self._lead)
        return int(piece.action.backward is (piece.lane == "down"))


_LINKS: Final = ("up", "down")
_COMPUTE: Final = ("edge compute", "cloud compute")

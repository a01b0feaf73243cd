"""Who computes next, on a simulated clock: nobody starves, and nobody gets less than half a share."""

import heapq
import itertools
import random
from bisect import bisect_left

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloud.fair_queue import FairQueue

WINDOW_S = 10.0


class Simulation:
    """Sessions on one device: each computes, pauses, and computes again.

    Args:
        sessions: for each the generator of its (pause before, length of the action).
        at_once: slots.
        leaving: times at which sessions leave, by their number.
    """

    def __init__(self, sessions, *, at_once=1, leaving=(), patience_s=0.005):
        self.queue = FairQueue(at_once, patience_s)
        self.accounts = [self.queue.join() for _ in sessions]
        self.sessions = sessions
        self.spans = [[] for _ in sessions]
        self.asked = {}
        self.longest_wait_s = 0.0
        self.left = set()
        self._events = []
        self._order = itertools.count()
        for number in range(len(sessions)):
            self._next_action(number, 0.0)
        for number, at in leaving:
            self._at(at, "leave", number)

    def _at(self, time_s, what, number):
        heapq.heappush(self._events, (time_s, next(self._order), what, number))

    def _next_action(self, number, now_s):
        pause_s, self.length_s = next(self.sessions[number])
        self.asked[number] = (None, self.length_s)
        self._at(now_s + pause_s, "ask", number)

    def run(self, until_s):
        while self._events and self._events[0][0] < until_s:
            now_s, _, what, number = heapq.heappop(self._events)
            account = self.accounts[number]
            if what == "leave":
                self.left.add(number)
                self.queue.leave(account)
            elif what == "ask" and number not in self.left:
                self.queue.ask(account, now_s)
                self.asked[number] = (now_s, self.asked[number][1])
            elif what == "end":
                self.queue.end(account, now_s)
                if number not in self.left:
                    self._next_action(number, now_s)
            self._start(now_s)
        return self

    def _start(self, now_s):
        while (first := self.queue.first()) is not None:
            wait_s = self.queue.may_start_in(first, now_s)
            if wait_s:
                self._at(now_s + wait_s, "look", 0)
            if wait_s is None or wait_s > 0:
                return
            number = self.accounts.index(first)
            asked_s, length_s = self.asked[number]
            self.longest_wait_s = max(self.longest_wait_s, now_s - asked_s)
            self.queue.start(first, now_s)
            self.spans[number].append((now_s, now_s + length_s))
            self._at(now_s + length_s, "end", number)

    def used_s(self, number, start_s, end_s):
        spans = self.spans[number]
        first = max(0, bisect_left(spans, (start_s,)) - 1)
        return sum(
            max(0.0, min(end, end_s) - max(start, start_s))
            for start, end in itertools.takewhile(lambda span: span[0] < end_s, spans[first:])
        )


def steady(length_s, pause_s=0.0001):
    return itertools.repeat((pause_s, length_s))


def drawn(rng, longest_s, *, busy):
    """Actions of one kind, up to twenty times shorter than the longest, or of all kinds."""
    own_s = longest_s / rng.uniform(1, 20)
    mixed = rng.random() < 0.3
    while True:
        length_s = longest_s / rng.uniform(1, 20) if mixed else own_s
        pause_s = rng.uniform(0, 0.0003) if busy or rng.random() < 0.7 else rng.expovariate(1.0)
        yield pause_s, length_s


def test_one_session_alone_never_waits():
    simulation = Simulation([steady(0.1)]).run(10)
    assert simulation.longest_wait_s == 0
    assert len(simulation.spans[0]) == 100


def test_two_that_are_alike_take_turns():
    simulation = Simulation([steady(1.0, 0.0), steady(1.0, 0.0)]).run(6.5)
    assert [start for start, _ in simulation.spans[0]] == [0, 2, 4, 6]
    assert [start for start, _ in simulation.spans[1]] == [1, 3, 5]


def test_actions_that_come_one_at_a_time_are_waited_for():
    """A story: a session of 10 ms actions beside one of 200 ms got one of them for each, 5 % of the device."""
    simulation = Simulation([steady(0.01), steady(0.2)]).run(20)
    assert simulation.used_s(0, 5, 15) == pytest.approx(5, abs=0.3)
    impatient = Simulation([steady(0.01), steady(0.2)], patience_s=0.0).run(20)
    assert impatient.used_s(0, 5, 15) < 1


def test_nobody_waits_for_one_that_pauses_for_long():
    simulation = Simulation([steady(0.01, pause_s=0.02), steady(0.02)]).run(20)
    busy_s = sum(simulation.used_s(number, 5, 15) for number in (0, 1))
    assert busy_s > 9.8


def test_idling_saves_nothing_up():
    def late():
        yield 20.0, 0.1
        yield from steady(0.1)

    simulation = Simulation([steady(0.1), late()]).run(40)
    assert simulation.used_s(0, 20, 30) == pytest.approx(5, abs=0.3)
    assert simulation.used_s(1, 20, 30) == pytest.approx(5, abs=0.3)


def test_one_that_joins_late_owes_nothing():
    simulation = Simulation([steady(0.1)]).run(20)
    simulation.sessions.append(steady(0.1))
    simulation.accounts.append(simulation.queue.join())
    simulation.spans.append([])
    simulation._next_action(1, 20.0)
    simulation.run(40)
    assert simulation.used_s(1, 20, 30) == pytest.approx(5, abs=0.3)


def test_two_slots_are_shared_among_three():
    simulation = Simulation([steady(0.1), steady(0.3), steady(0.2)], at_once=2).run(40)
    for number in range(3):
        assert simulation.used_s(number, 10, 20) == pytest.approx(20 / 3, rel=0.1)


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**32),
    busy=st.integers(1, 10),
    others=st.integers(0, 4),
    at_once=st.integers(1, 2),
)
def test_whoever_is_busy_gets_half_a_share_of_any_ten_seconds(seed, busy, others, at_once):
    """As long as an action is no longer than a sixth of a share, and so of what may go wrong, of the ten seconds."""
    rng = random.Random(seed)
    count = busy + others
    share_s = WINDOW_S * min(1.0, at_once / count)
    sessions = [drawn(rng, share_s / 6, busy=number < busy) for number in range(count)]
    simulation = Simulation(sessions, at_once=at_once).run(60)
    for number in range(busy):
        for start_s in (rng.uniform(0, 49) for _ in range(20)):
            assert simulation.used_s(number, start_s, start_s + WINDOW_S) >= share_s / 2


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 2**32), count=st.integers(2, 12), at_once=st.integers(1, 3))
def test_no_leaving_stops_the_others(seed, count, at_once):
    rng = random.Random(seed)
    sessions = [drawn(rng, 0.5, busy=rng.random() < 0.7) for _ in range(count)]
    leaving = [(number, rng.uniform(0, 20)) for number in range(1, count)]
    simulation = Simulation(sessions, at_once=at_once, leaving=leaving).run(60)
    assert len(simulation.queue._running) <= at_once
    assert not simulation.queue._waiting.keys() - {simulation.accounts[0]}
    assert simulation.spans[0][-1][1] > 50
    for number, at in leaving:
        assert all(start <= at for start, _ in simulation.spans[number])
    # Those who wait get the device in turn: nobody waits longer than one action of each, and two of the longest.
    assert simulation.longest_wait_s <= 0.5 * (count + 2)


@pytest.mark.parametrize("at_once", [0, -1])
def test_somebody_must_be_allowed_to_compute(at_once):
    with pytest.raises(ValueError, match="at least 1"):
        FairQueue(at_once)

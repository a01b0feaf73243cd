"""Invariant 2: cut, stalled, truncated and replayed at random bytes, training comes to the weights of a quiet run.

`python -m benchmarks.faults cuts` does the same at length.
"""

from collections.abc import Iterator

import pytest

from benchmarks.fault_plans import CutFrames, FrameCut
from benchmarks.fault_runs import (
    IMPORTS,
    JOBS,
    WHOLE,
    differing,
    faulty_run,
    quiet_run,
    server_for_faults,
    train_to_end,
)
from benchmarks.faulty_proxy import FaultyProxy
from tests.system.processes import Command, serving

STEPS, FAULTS = 25, 20


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[Command, str]]:
    with server_for_faults() as started:
        yield started
        assert "Traceback" not in started[0].err


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("chain", JOBS)
def test_training_under_random_faults_comes_to_the_weights_of_a_quiet_run(
    server: tuple[Command, str], chain: str, seed: int
) -> None:
    quiet = quiet_run(server[1], JOBS[chain], STEPS, seed)
    trial = faulty_run(server[1], JOBS[chain], quiet, steps=STEPS, seed=seed, faults=FAULTS)
    assert not trial.problems, trial


def test_weights_of_another_seed_or_of_a_step_more_are_seen_to_differ(server: tuple[Command, str]) -> None:
    """What all of these tests stand on."""
    states = [
        quiet_run(server[1], JOBS["none"], steps, seed).state
        for steps, seed in [(5, 1), (5, 1), (5, 2), (6, 1)]
    ]
    assert [bool(differing(states[0], state)) for state in states] == [False, False, True, True]


def test_client_comes_back_in_one_flight_with_its_next_step(server: tuple[Command, str]) -> None:
    plan = CutFrames(
        [FrameCut("commit", WHOLE, skip=1)] * 3, keep=("hello", "resume", "rejoin", "ready", "begin")
    )
    with FaultyProxy(server[1], plan) as proxy:
        ended = train_to_end(proxy.address, JOBS["none"], 9, 0)
    assert ended.status == 0, ended.err
    assert not plan.cuts
    kinds = [seen.kind for seen in plan.seen if seen.kind != "ready"]
    assert kinds == ["hello", *["begin"] * 2, *["rejoin", *["begin"] * 2] * 2, "rejoin", *["begin"] * 3]


def test_client_whose_ticket_is_lost_asks_as_if_it_had_none(server: tuple[Command, str]) -> None:
    cuts = [FrameCut("commit", WHOLE, skip=1), FrameCut("ready", 10)]
    plan = CutFrames(cuts, keep=("hello", "resume", "rejoin"))
    with FaultyProxy(server[1], plan) as proxy:
        ended = train_to_end(proxy.address, JOBS["none"], 6, 0)
    assert ended.status == 0, ended.err
    assert not plan.cuts
    kinds = [seen.kind for seen in plan.seen]
    assert kinds[:2] == ["hello", "rejoin"]
    assert kinds[-2:] == ["hello", "resume"]


def test_run_is_done_only_once_the_server_has_its_last_step() -> None:
    plan = CutFrames([FrameCut("commit", WHOLE, skip=3)], keep=("ready", "bye"))
    with serving(*IMPORTS, "--max-sessions", 1) as (server, address):
        with FaultyProxy(address, plan, delay_s=0.05) as proxy:
            assert train_to_end(proxy.address, JOBS["none"], 4, 0).status == 0  # no weights are fetched
        assert not plan.cuts
        assert [seen.kind for seen in plan.seen][:3] == ["ready", "ready", "bye"]
        # And the session is gone with it, or this one would find no room.
        ended = train_to_end(address, JOBS["none"], 2, 0)
        assert (ended.status, ended.err) == (0, "")
        assert "busy" not in ended.out
        assert "no session with" not in server.err

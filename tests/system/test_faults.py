"""Invariant 2: cut, stalled, truncated and replayed at random bytes, training comes to the weights of a quiet run.

`python -m benchmarks.faults cuts` does the same at length.
"""

from collections.abc import Iterator

import pytest

from benchmarks.fault_runs import JOBS, differing, faulty_run, quiet_run, server_for_faults
from tests.system.processes import Command

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

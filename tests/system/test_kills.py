"""Invariant 3: killed at any time and started again, both sides come to the weights of a quiet run.

`python -m benchmarks.faults kills` does the same at length.
"""

import pytest

from benchmarks.fault_kills import killed_run
from benchmarks.fault_runs import JOBS, quiet_run, server_for_faults

STEPS, KILLS = 30, 6


@pytest.mark.parametrize(("chain", "seed"), [("lowrank:8+int4", 1), ("decay", 2)])
def test_training_whose_processes_are_killed_comes_to_the_weights_of_a_quiet_run(
    chain: str, seed: int
) -> None:
    with server_for_faults() as (_, address):
        quiet = quiet_run(address, JOBS[chain], STEPS, seed)
    trial = killed_run(JOBS[chain], quiet, steps=STEPS, seed=seed, kills=KILLS)
    assert not trial.problems, trial

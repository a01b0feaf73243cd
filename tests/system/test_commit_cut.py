"""Invariant 2's edge: the connection is cut before, inside and after the frames that conclude a step.

A sample of the bytes; `python -m benchmarks.faults commit` cuts at every one.
"""

from collections.abc import Iterator

import pytest

from benchmarks.fault_plans import FrameCut
from benchmarks.fault_runs import (
    EXCHANGES,
    JOBS,
    Exchange,
    cut_exchange,
    cut_once,
    head_sizes,
    quiet_run,
    server_for_faults,
)
from tests.system.processes import Command
from wire.prelude import PRELUDE_SIZE


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[Command, str]]:
    with server_for_faults() as started:
        yield started
        assert "Traceback" not in started[0].err


@pytest.fixture(scope="module")
def sizes(server: tuple[Command, str]) -> dict[str, int]:
    return head_sizes(server[1], JOBS["conv+int8"])


@pytest.mark.parametrize("exchange", EXCHANGES, ids=lambda exchange: exchange.kind)
@pytest.mark.parametrize("chain", ["conv+int8", "delta+int4"])
def test_step_is_applied_on_both_sides_or_on_neither_wherever_its_conclusion_is_cut(
    server: tuple[Command, str], sizes: dict[str, int], exchange: Exchange, chain: str
) -> None:
    size = sizes[exchange.kind]
    offsets = [0, 1, PRELUDE_SIZE - 1, PRELUDE_SIZE, PRELUDE_SIZE + 1, size // 2, size - 1, size, size + 1]
    trial = cut_exchange(server[1], JOBS[chain], exchange, offsets, seed=3)
    assert not trial.problems, trial


# Of conv+int8 the server asks for the weights, and --save fetches them.
BEGINNINGS_AND_ENDS = ("hello", "welcome", "open", "ready", "weights", "begin", "fetch")


@pytest.mark.parametrize("after", [0, 30, 1 << 30])
@pytest.mark.parametrize("kind", BEGINNINGS_AND_ENDS)
def test_session_is_taken_up_wherever_its_beginning_or_its_end_is_cut(
    server: tuple[Command, str], kind: str, after: int
) -> None:
    job, steps, seed = JOBS["conv+int8"], 3, 4
    quiet = quiet_run(server[1], job, steps, seed)
    trial = cut_once(server[1], job, quiet, FrameCut(kind, after), steps=steps, seed=seed)
    assert not trial.problems, trial

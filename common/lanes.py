"""Lanes: one thread each for compute, encoding and decoding, so that the event loop stays free (invariant 7).

A lane runs its work in the order in which it was given, which is what codecs with state and a stage's chunk
order need; different lanes overlap.
"""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from statistics import fmean
from typing import TypeVar

from common.cores import OwnCores
from common.runtime import set_threads
from common.schedule import ACTIONS
from common.trace import Tracer

T = TypeVar("T")

COMPUTE, ENCODE, DECODE = "compute", "encode", "decode"


class Lanes:
    """Named single-thread executors that know how long they were busy.

    Args:
        tracer: is told of every piece of work.
        threads: torch's threads on the compute lane; the others use one each.

    Attributes:
        busy_s: seconds of work by lane.
        turn: entered in the compute lane's thread around each piece of its work, where several sessions share a
            device; None to compute at once. What entering waits counts as no work.
    """

    def __init__(self, tracer: Tracer, threads: int) -> None:
        self._tracer = tracer
        self._executors = {
            lane: ThreadPoolExecutor(1, thread_name_prefix=lane, initializer=set_threads, initargs=(1,))
            for lane in (ENCODE, DECODE)
        }
        self._executors[COMPUTE] = ThreadPoolExecutor(
            1, thread_name_prefix=COMPUTE, initializer=self._start_to_compute, initargs=(threads,)
        )
        self._own_cores: AbstractContextManager[object, None] = nullcontext()
        self.busy_s: dict[str, float] = dict.fromkeys(self._executors, 0.0)
        self.turn: AbstractContextManager[object, None] | None = None
        self._taken: dict[str, dict[str, list[float]]] = {lane: {} for lane in self._executors}

    def run(self, lane: str, name: str, work: Callable[..., T], *args: object) -> asyncio.Future[T]:
        """Queue work on a lane, now and in this order; await the result. `name` is what the trace shows."""

        def timed() -> T:
            start_ns = time.monotonic_ns()
            try:
                with self._own_cores if lane == COMPUTE and name[:2] in ACTIONS else nullcontext():
                    return work(*args)
            finally:
                end_ns = time.monotonic_ns()
                seconds = (end_ns - start_ns) / 1e9
                self.busy_s[lane] += seconds
                self._taken[lane].setdefault(name[:2], []).append(seconds)
                self._tracer.record(lane, name, start_ns, end_ns)

        def in_turn() -> T:
            if lane != COMPUTE or self.turn is None:
                return timed()
            with self.turn:
                return timed()

        return asyncio.get_running_loop().run_in_executor(self._executors[lane], in_turn)

    def _start_to_compute(self, threads: int) -> None:
        set_threads(threads)
        self._own_cores = OwnCores(threads)

    def take_means(self) -> dict[str, dict[str, float]]:
        """Return the mean seconds by lane and kind of action (``0F``) since the last call."""
        taken, self._taken = self._taken, {lane: {} for lane in self._taken}
        return {
            lane: {kind: fmean(times) for kind, times in list(kinds.items())} for lane, kinds in taken.items()
        }

    def close(self) -> None:
        """Finish what is queued and end the threads. A running torch call cannot be cancelled, so this waits."""
        for executor in self._executors.values():
            executor.shutdown(wait=True, cancel_futures=True)

"""Keeps the two threads of an operation of torch on two cores.

Where a thread waits for work between operations, the system wakes it on a core of its choice, at times that of the
thread that gives it work. Then both take turns there, for tens of milliseconds, while the other core is idle: seen on
Linux 6.18 in most stages of a link-bound step, when nothing else computes.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import TracebackType

__all__ = ["OwnCores"]

_SHARED = 1 << 17  # elements that torch does not leave to one thread


class OwnCores:
    """Entered around work of torch, in the thread that made this: while inside, its two threads have a core each.

    Only for two threads on two cores, and only on Linux: elsewhere it does nothing. On more cores the system has better
    places than one that was chosen before; of more threads GNU OpenMP ends and starts some as operations need
    them, and a thread that starts inside inherits the one core. For the same reason it does nothing where there is a
    GPU: torch starts threads for it at the first backward pass.

    Args:
        threads: how many torch uses in this thread.
    """

    def __init__(self, threads: int) -> None:
        self._other = _other_thread() if threads == 2 and sys.platform == "linux" else None
        self._allowed: set[int] | None = None  # the cores to go back to

    def __enter__(self) -> OwnCores:
        if sys.platform != "linux" or self._other is None:
            return self
        try:
            allowed, here = os.sched_getaffinity(0), _this_core()
            if len(allowed) == 2 and here in allowed:
                self._allowed = allowed
                os.sched_setaffinity(self._other, allowed - {here})
                os.sched_setaffinity(0, {here})
        except OSError:  # not allowed here, or that thread has ended
            self.__exit__(None, None, None)
            self._other = None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if sys.platform != "linux" or self._other is None or self._allowed is None:
            return
        allowed, self._allowed = self._allowed, None
        for thread in (self._other, 0):
            try:
                os.sched_setaffinity(thread, allowed)
            except OSError:
                self._other = None


def _this_core() -> int | None:
    """The core that this thread runs on; None where the C library does not tell."""
    ask = _sched_getcpu()
    return None if ask is None else int(ask())


@cache
def _sched_getcpu() -> Callable[[], int] | None:
    return getattr(ctypes.CDLL(None), "sched_getcpu", None)


def _other_thread() -> int | None:
    """The thread that helps this one with torch's operations, found by giving it its first work.

    None where there is a GPU, where something else started a thread meanwhile, and it cannot be told from that, and
    where none was started or the system does not list them.
    """
    import torch  # here, so that the rest can run before torch is loaded

    if torch.accelerator.is_available():
        return None
    try:
        before = _threads()
        torch.zeros(_SHARED).add_(1)
        new = _threads() - before
    except OSError:
        return None
    return new.pop() if len(new) == 1 else None


def _threads() -> set[int]:
    return {int(path.name) for path in Path("/proc/self/task").iterdir()}

"""Sessions take turns at the device: at most so many compute at once, and each gets its share.

A turn is taken in the thread that computes, around the work itself, so it ends when the work has really ended, and
not when somebody stopped waiting for it: a running torch call cannot be cancelled. From one session to the next it
goes from thread to thread, without the event loop. Who is next, `cloud.fair_queue` says.
"""

import threading
import time
from collections.abc import Callable
from types import TracebackType

from cloud.fair_queue import PATIENCE_S, FairQueue


class ShareLeft(RuntimeError):
    """A turn was asked for, or waited for, by a session that has left. Its work was not begun."""

    def __init__(self) -> None:
        super().__init__("the session has ended")


class Turns:
    """Shares a device among sessions.

    Args:
        at_once: sessions that compute at the same time.
        patience_s: see `FairQueue`.
        clock: tells seconds.
    """

    def __init__(
        self,
        at_once: int = 1,
        *,
        patience_s: float = PATIENCE_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._queue = FairQueue(at_once, patience_s)
        self._clock = clock
        self._lock = threading.Lock()
        self._shares: dict[object, Share] = {}

    def join(self, settle: Callable[[], object] | None = None) -> "Share":
        """Give a session its share.

        Args:
            settle: waits until the device has done what a turn gave it to do; for a GPU, where work returns before
                its kernels end. Called at the end of a turn while others wait, in the thread of the turn.
        """
        with self._lock:
            share = Share(self, self._queue, self._lock, self._clock, settle)
            self._shares[share.account] = share
            return share

    def _wake_first(self) -> None:
        first = self._queue.first()
        if first is not None:
            self._shares[first].wake()

    def _forget(self, share: "Share") -> None:
        self._shares.pop(share.account, None)


class Share:
    """One session's share: a context manager, for one thread at a time. Each ``with share:`` is a turn.

    Entering waits for the turn; that costs about three microseconds where nobody else computes.

    Raises:
        ShareLeft: on entering, where the session has left or leaves meanwhile.
    """

    def __init__(
        self,
        turns: Turns,
        queue: FairQueue,
        lock: threading.Lock,
        clock: Callable[[], float],
        settle: Callable[[], object] | None,
    ) -> None:
        self._turns = turns
        self._queue = queue
        self._lock = lock
        self._clock = clock
        self._settle = settle
        self._changed = threading.Condition(lock)
        self._left = False
        self.account = queue.join()

    def __enter__(self) -> None:
        queue, account = self._queue, self.account
        with self._lock:
            if self._left:
                raise ShareLeft
            now_s = self._clock()
            was_expected = queue.ask(account, now_s)
            wait_s = queue.may_start_in(account, now_s)
            if was_expected and wait_s != 0.0:
                self._turns._wake_first()
            while wait_s != 0.0:
                self._changed.wait(wait_s)
                if self._left:
                    raise ShareLeft
                now_s = self._clock()
                wait_s = queue.may_start_in(account, now_s)
            queue.start(account, now_s)
            if queue.anyone_waits:
                self._turns._wake_first()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if self._settle is not None and self._queue.anyone_waits:
                self._settle()
        finally:
            with self._lock:
                self._queue.end(self.account, self._clock())
                if self._queue.anyone_waits:
                    self._turns._wake_first()

    def wake(self) -> None:
        """Let the thread that waits look again. Call with the lock held."""
        self._changed.notify()

    def leave(self) -> None:
        """Give the share up. A turn under way goes on to its end; one that is waited for is no more."""
        with self._lock:
            self._left = True
            self._queue.leave(self.account)
            self._turns._forget(self)
            self._changed.notify()
            self._turns._wake_first()

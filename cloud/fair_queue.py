"""Who computes next: start-time fair queueing, as a plain data structure without threads or clocks.

Every account has a virtual time: the seconds that it has used. Of those that wait, the one with the least goes
next. Whoever comes back after a pause starts at the least of those who were there meanwhile, so that nobody saves up
turns by being idle (Goyal, Vin and Cheng, "Start-time Fair Queuing", SIGCOMM 1996). Of two accounts that want to
compute all along, neither gets ahead of the other by more than an action of each, however their actions differ.

That alone fails with actions that come one at a time. A session's next action is asked for only after its last one
has ended, by way of the event loop, so in that moment its competitors are the only ones that wait: a session of
short actions would get one of them for each long one of another. So a slot that becomes free stays free for a moment
where its last user would be next and is known to come back at once ("anticipatory scheduling", Iyer and Druschel,
SOSP 2001).
"""

import itertools
from dataclasses import dataclass

PATIENCE_S = 0.005
"""How long a slot stays free for the one who would be next: the event loop's way from one action to the next."""

_RECENT = 0.25  # weight of the newest pause in their mean


@dataclass(eq=False)
class Account:
    """What one session has used.

    Attributes:
        used_s: its virtual time.
        pause_s: the mean time from the end of an action to the next request, of late.
    """

    used_s: float = 0.0
    pause_s: float = 0.0
    started_s: float = 0.0
    ended_s: float | None = None


class FairQueue:
    """Shares a number of slots among accounts.

    An account asks, starts, ends, and asks again; the caller says when, in seconds of any clock.

    Args:
        at_once: slots.
        patience_s: how long a slot may stay free for the account that would be next.
    """

    def __init__(self, at_once: int = 1, patience_s: float = PATIENCE_S) -> None:
        if at_once < 1:
            raise ValueError(f"at least 1 must compute at once, not {at_once}")
        self._at_once = at_once
        self._patience_s = patience_s
        self._virtual_s = 0.0  # the least of those who compute or want to; it never falls
        self._waiting: dict[Account, None] = {}  # in the order in which they asked
        self._running: set[Account] = set()
        self._expected: dict[Account, float] = {}  # who a slot stays free for, and until when

    @property
    def anyone_waits(self) -> bool:
        """Whether an account has asked and not started."""
        return bool(self._waiting)

    def join(self) -> Account:
        """Open an account that owes nothing and has nothing saved up."""
        return Account(used_s=self._virtual_s)

    def ask(self, account: Account, now_s: float) -> bool:
        """Take an account's request for a slot; return whether one was kept free for it, and is free for all now."""
        assert account not in self._waiting, "one request at a time"
        assert account not in self._running, "one action at a time"
        if account.ended_s is not None:
            # Longer pauses are all alike, and one of them alone, for a chunk on its way, tells nothing.
            pause_s = min(now_s - account.ended_s, 2 * self._patience_s)
            account.pause_s += _RECENT * (pause_s - account.pause_s)
        account.used_s = max(account.used_s, self._virtual_s)
        self._waiting[account] = None
        return self._expected.pop(account, None) is not None

    def first(self) -> Account | None:
        """Return the account that is next among those that wait."""
        return min(self._waiting, key=_used, default=None)

    def may_start_in(self, account: Account, now_s: float) -> float | None:
        """Tell when an account that waits may start if nothing else happens: 0 for now.

        Returns:
            Seconds; None where something else has to happen first.
        """
        if len(self._running) == self._at_once or account is not self.first():
            return None
        if not self._expected:
            return 0.0
        ahead = sorted(until for other, until in self._expected.items() if other.used_s < account.used_s)
        free = self._at_once - len(self._running)
        return max(0.0, ahead[-free] - now_s) if len(ahead) >= free else 0.0

    def start(self, account: Account, now_s: float) -> None:
        """Give a slot to an account that may start now."""
        del self._waiting[account]
        self._running.add(account)
        self._expected = {other: until for other, until in self._expected.items() if until > now_s}
        active = itertools.chain(self._running, self._waiting, self._expected)
        self._virtual_s = max(self._virtual_s, min(map(_used, active)))
        account.started_s = now_s

    def end(self, account: Account, now_s: float) -> None:
        """Take a slot back and charge what it was used for."""
        self._running.discard(account)
        account.used_s += now_s - account.started_s
        account.ended_s = now_s
        rival = self.first()
        if rival is not None and account.used_s < rival.used_s and account.pause_s < self._patience_s:
            self._expected[account] = now_s + self._patience_s

    def leave(self, account: Account) -> None:
        """Forget an account, whatever it was about to do. One that computes keeps its slot until it ends."""
        self._waiting.pop(account, None)
        self._expected.pop(account, None)
        account.pause_s = float("inf")  # nobody waits for it when it ends


def _used(account: Account) -> float:
    return account.used_s

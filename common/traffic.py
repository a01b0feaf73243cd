"""What a side has sent: bytes and the time the link took to take them."""

import math
from statistics import fmean


class Sent:
    """Sums over the frames sent; they go one after another, so their times do not overlap.

    Attributes:
        busy_s: seconds in which a frame was on its way into the network.
    """

    def __init__(self) -> None:
        self.busy_s = 0.0
        self._bytes = 0
        self._sizes: dict[str, list[int]] = {}

    @property
    def rate_bit_s(self) -> float:
        """What the link has taken in a second while there was something to send."""
        return self._bytes * 8 / self.busy_s if self.busy_s > 0 else math.inf

    def add(self, name: str, size: int, seconds: float) -> None:
        """Take in a frame that followed an action, such as ``0F3``."""
        self.busy_s += seconds
        self._bytes += size
        self._sizes.setdefault(name[:2], []).append(size)

    def take_sizes(self) -> dict[str, float]:
        """Return the mean bytes of a frame by kind of action since the last call."""
        taken, self._sizes = self._sizes, {}
        return {kind: fmean(sizes) for kind, sizes in taken.items()}

"""What a side has sent: bytes and the time the link took to take them."""

import math
from statistics import fmean


class Sent:
    """Sums over the frames sent; they go one after another, so their times do not overlap.

    Attributes:
        busy_s: seconds in which the link carried them.
    """

    def __init__(self) -> None:
        self.busy_s = 0.0
        self._bytes = 0
        self._bytes_per_s: float | None = None
        self._sizes: dict[str, list[int]] = {}

    @property
    def rate_bit_s(self) -> float:
        """What the link carries in a second."""
        if self._bytes_per_s is not None:
            return self._bytes_per_s * 8
        return self._bytes * 8 / self.busy_s if self.busy_s > 0 else math.inf

    def add(self, name: str, size: int, seconds: float, bytes_per_s: float | None = None) -> None:
        """Take in a frame.

        Args:
            name: the action that it followed, such as ``0F3``.
            size: its bytes.
            seconds: how long the kernel took over it. It buffers some, and a frame that fits takes no time.
            bytes_per_s: the link's pace where that is known.
        """
        self._bytes_per_s = bytes_per_s
        self.busy_s += max(seconds, size / bytes_per_s if bytes_per_s else 0.0)
        self._bytes += size
        self._sizes.setdefault(name[:2], []).append(size)

    def take_sizes(self) -> dict[str, float]:
        """Return the mean bytes of a frame by kind of action since the last call."""
        taken, self._sizes = self._sizes, {}
        return {kind: fmean(sizes) for kind, sizes in taken.items()}

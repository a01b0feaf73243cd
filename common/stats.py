"""Sums, medians and rates over the steps of a run."""

import math
from array import array
from collections import deque
from statistics import median

from common.metrics import StepReport, SummaryReport, ratio


def busy_fraction(busy_s: float | None, wall_s: float) -> float | None:
    """Give the share of a time span that something was busy.

    Args:
        busy_s: seconds of work, or None where they were not counted.
        wall_s: length of the span.

    Returns:
        A number in [0, 1]; clocks that disagree a little do not lift it above.
    """
    share = None if busy_s is None else ratio(busy_s, wall_s)
    return None if share is None else min(max(share, 0.0), 1.0)


class RunStats:
    """Sums and medians over the training steps of a run."""

    def __init__(self) -> None:
        self._step_s = array("d")  # 8 bytes a step: a median needs them all
        self._counts = {name: array("q") for name in ("up_bytes", "down_bytes", "dense_bytes", "samples")}

    @property
    def steps(self) -> int:
        """Steps added."""
        return len(self._step_s)

    @property
    def wall_s(self) -> float:
        """Seconds of all steps added."""
        return math.fsum(self._step_s)

    @property
    def up_bytes(self) -> int:
        """Bytes to the cloud."""
        return sum(self._counts["up_bytes"])

    @property
    def down_bytes(self) -> int:
        """Bytes back."""
        return sum(self._counts["down_bytes"])

    @property
    def dense_bytes(self) -> int:
        """What would have crossed without compression."""
        return sum(self._counts["dense_bytes"])

    @property
    def samples(self) -> int:
        """Samples trained on."""
        return sum(self._counts["samples"])

    def add(self, report: StepReport) -> None:
        """Take a step in."""
        self._step_s.append(report.step_s)
        for name, counts in self._counts.items():
            counts.append(getattr(report, name))

    def take_back(self, steps: int) -> None:
        """Forget the last steps, which are made again."""
        left = max(len(self._step_s) - steps, 0)
        del self._step_s[left:]
        for counts in self._counts.values():
            del counts[left:]

    def summary(
        self,
        *,
        reconnects: int = 0,
        link_busy_s: float | None = None,
        edge_busy_s: float | None = None,
        cloud_busy_s: float | None = None,
        up_bytes: int | None = None,
        down_bytes: int | None = None,
    ) -> SummaryReport:
        """Sum the run up.

        Args:
            reconnects: how often the connection was made anew.
            link_busy_s: seconds within the steps that the busier direction of the link was sending.
            edge_busy_s: seconds within the steps that the edge computed.
            cloud_busy_s: the same of the cloud.
            up_bytes: all that the socket carried to the cloud; the steps' alone when not given.
            down_bytes: all that it carried back.
        """
        return SummaryReport(
            steps=self.steps,
            median_step_s=median(self._step_s) if self._step_s else None,
            up_bytes=self.up_bytes if up_bytes is None else up_bytes,
            down_bytes=self.down_bytes if down_bytes is None else down_bytes,
            compress_rate=ratio(self.up_bytes + self.down_bytes, self.dense_bytes),
            reconnects=reconnects,
            link_busy=busy_fraction(link_busy_s, self.wall_s),
            edge_busy=busy_fraction(edge_busy_s, self.wall_s),
            cloud_busy=busy_fraction(cloud_busy_s, self.wall_s),
        )


class RecentStats:
    """Rates and means over the last few steps, for people to watch.

    Args:
        window: how many steps.
    """

    def __init__(self, window: int = 20) -> None:
        self._steps: deque[StepReport] = deque(maxlen=window)

    def add(self, report: StepReport) -> None:
        """Take a step in; the oldest may go."""
        self._steps.append(report)

    @property
    def loss(self) -> float | None:
        """Mean loss of a sample."""
        return ratio(sum(s.loss * s.samples for s in self._steps), sum(s.samples for s in self._steps))

    @property
    def accuracy(self) -> float | None:
        """Share that was classified right, over the steps that counted it."""
        counted = [(s.accuracy, s.samples) for s in self._steps if s.accuracy is not None]
        return ratio(sum(a * n for a, n in counted), sum(n for _, n in counted))

    @property
    def samples_per_s(self) -> float | None:
        """Samples trained in a second."""
        return ratio(sum(s.samples for s in self._steps), self._wall_s)

    @property
    def up_bytes_per_s(self) -> float | None:
        """Bytes that go to the cloud in a second."""
        return ratio(sum(s.up_bytes for s in self._steps), self._wall_s)

    @property
    def down_bytes_per_s(self) -> float | None:
        """Bytes that come back in a second."""
        return ratio(sum(s.down_bytes for s in self._steps), self._wall_s)

    @property
    def compress_rate(self) -> float | None:
        """Bytes on the socket, both ways, over the dense bytes."""
        carried = sum(s.up_bytes + s.down_bytes for s in self._steps)
        return ratio(carried, sum(s.dense_bytes for s in self._steps))

    @property
    def _wall_s(self) -> float:
        return sum(s.step_s for s in self._steps)

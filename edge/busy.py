"""How long each part of the system worked within the training steps."""

from collections.abc import Mapping
from typing import Any

from common.lanes import COMPUTE, Lanes
from edge.link import Link

_MOST = 1e18  # of whatever is counted: seconds, bytes, bits a second


class BusyTimes:
    """Sums over the steps.

    Attributes:
        edge_s: seconds that the edge computed.
        up_s: seconds that it was sending.
        cloud_s: seconds that the cloud computed.
        down_s: seconds that it was sending.
        cloud_detail: what the cloud said of its last step.
    """

    def __init__(self) -> None:
        self.edge_s = self.up_s = self.cloud_s = self.down_s = 0.0
        self.cloud_detail: Mapping[str, Any] = {}
        self._edge_before_s = self._up_before_s = 0.0

    def begin(self, lanes: Lanes, link: Link) -> None:
        """A step begins on the edge."""
        self._edge_before_s, self._up_before_s = lanes.busy_s[COMPUTE], link.sent.busy_s

    def end(self, lanes: Lanes, link: Link) -> None:
        """The step has ended on the edge."""
        self.edge_s += lanes.busy_s[COMPUTE] - self._edge_before_s
        self.up_s += link.sent.busy_s - self._up_before_s

    def committed(self, detail: Mapping[str, Any]) -> None:
        """Take in what the cloud says of the step that it has applied."""
        self.cloud_detail = detail
        busy_s = detail.get("busy_s")
        if isinstance(busy_s, Mapping):
            self.cloud_s += number(busy_s.get(COMPUTE))
            self.down_s += number(busy_s.get("send"))


def number(value: object) -> float:
    """Return a peer's number, or 0 for anything that is no finite number from 0 on."""
    fits = isinstance(value, int | float) and 0 <= value < _MOST
    return float(value) if fits else 0.0  # type: ignore[arg-type]

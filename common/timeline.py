"""What a simulated step looks like: who did what when, who waited, and a picture of it in text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from common.cost import LANES
from common.schedule import Action

__all__ = ["Span", "Timeline"]


class Span(NamedTuple):
    """One piece of work, in seconds from the start of the step."""

    lane: str
    action: Action
    start_s: float
    end_s: float


@dataclass(frozen=True, kw_only=True)
class Timeline:
    """A simulated step.

    Attributes:
        spans: every piece of work, in order of start.
        makespan_s: seconds from the step's start until the next can begin.
        max_in_flight: the most chunks between the start of their first action and the end of their last.
    """

    spans: tuple[Span, ...]
    makespan_s: float
    max_in_flight: int

    def lane(self, lane: str) -> list[Span]:
        """The spans of one lane, in order."""
        return [span for span in self.spans if span.lane == lane]

    def busy_s(self, lane: str) -> float:
        """Seconds in which a lane had work under way."""
        return sum(span.end_s - span.start_s for span in self.lane(lane))

    def idle_s(self, lane: str) -> float:
        """Seconds of the step in which a lane had none."""
        return self.makespan_s - self.busy_s(lane)

    def bubbles_s(self, lane: str) -> float:
        """Idle seconds between a lane's first and last work: what a better schedule might fill."""
        spans = self.lane(lane)
        return spans[-1].end_s - spans[0].start_s - self.busy_s(lane) if spans else 0.0

    def render(self, width: int = 100) -> str:
        """Draw a row for each lane that works; one column is `makespan_s` / width seconds.

        A span shows its action where it is wide enough.
        """
        rows = []
        for lane in LANES:
            spans = [span for span in self.lane(lane) if span.end_s > span.start_s]
            if not spans:
                continue
            cells = [" "] * width
            for span in spans:
                start = min(int(span.start_s / self.makespan_s * width), width - 1)
                end = max(start + 1, min(round(span.end_s / self.makespan_s * width), width))
                text = str(span.action)
                drawn = f"[{text}".ljust(end - start, "=") if end - start > len(text) else "=" * (end - start)
                cells[start:end] = drawn
            rows.append(f"{lane:13} {''.join(cells).rstrip()}")
        return "\n".join([*rows, f"{'':13} 0 to {self.makespan_s:.3g} s"])

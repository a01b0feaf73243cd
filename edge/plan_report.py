"""What a plan says: a row for each way of compressing and cutting, and which of them to take."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from common.cost import Link
from edge.flops import columns

__all__ = ["PlanReport", "Row", "mildest"]

ENOUGH = 1.1
"""How much longer than the fastest a step may take to be as good: what compresses less loses less."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One way of compressing and cutting; its fields are keys of ``--json``.

    Attributes:
        compress: the values of ``--compress``.
        cuts: the two cut points.
        step_s: seconds that a step takes, simulated.
        samples_per_s: likewise.
        depth: chunks in flight.
        bound_by: what a step takes at least its time for: `edge`, `cloud`, `cores`, `up` or `down`.
        up_bytes: of a step, on the socket.
        down_bytes: likewise.
        compress_rate: of both, over what would cross as dense fp32.
        edge_s: seconds that the edge computes in a step.
        cloud_s: the same of the cloud.
    """

    compress: tuple[str, ...]
    cuts: tuple[str, str]
    step_s: float
    samples_per_s: float
    depth: int
    bound_by: str
    up_bytes: int
    down_bytes: int
    compress_rate: float
    edge_s: float
    cloud_s: float


def mildest(rows: Sequence[Row]) -> Row:
    """Choose the first row that is hardly slower than the fastest.

    Args:
        rows: those that lose least first.
    """
    enough_s = ENOUGH * min(row.step_s for row in rows)
    return next(row for row in rows if row.step_s <= enough_s)


@dataclass(frozen=True, kw_only=True)
class PlanReport:
    """A plan; its fields are the keys of ``--json``.

    Attributes:
        title: what is planned, in a line.
        link: the rates in bit/s and the one-way delay in seconds.
        measured: whether the link is what was measured, and not what was assumed.
        cloud_speed: how many times as fast as this machine the cloud computes.
        alone_s: seconds a step of training on this machine alone takes.
        cuts: the cut points that were given, or the model's preset.
        rows: with these cut points, those that lose least first.
        moved: with other cut points, where a step takes less with them.
        best: the one to take.
    """

    title: str
    link: Link
    measured: bool
    cloud_speed: float
    alone_s: float
    cuts: tuple[str, str]
    rows: tuple[Row, ...]
    moved: tuple[Row, ...]
    best: Row

    def to_json(self) -> str:
        """Return the report as one JSON object."""
        return json.dumps(asdict(self), indent=2)

    def to_text(self) -> str:
        """Return the report as tables to read."""
        link, speed = self.link, self.cloud_speed
        around = (
            f"link{' as measured' * self.measured}: {_rate(link.up_bit_s)} up, {_rate(link.down_bit_s)} down, "
            f"{figure(link.delay_s * 1e3)} ms each way; the cloud computes {figure(speed)} times as fast as this "
            "machine"
        )
        blocks = [self.title, around, f"cut after {self.cuts[0]} and {self.cuts[1]}:", self._table(self.rows)]
        if self.moved:
            blocks += ["faster with other cuts:", self._table(self.moved, with_cuts=True)]
        blocks.append(f"take: {self.options(self.best)}")
        if self.alone_s <= self.best.step_s:
            blocks.append(
                f"this machine alone would take {figure(self.alone_s)} s a step: splitting the model gains nothing here"
            )
        else:
            blocks.append(f"this machine alone would take {figure(self.alone_s)} s a step")
        return "\n\n".join(blocks)

    def options(self, row: Row) -> str:
        """Return the options of ``edge-client`` that a row stands for."""
        words = [f"--compress {spec}" for spec in row.compress]
        if row.cuts != self.cuts:
            words += [f"--cut {cut}" for cut in row.cuts]
        return " ".join(words)

    def _table(self, rows: Sequence[Row], *, with_cuts: bool = False) -> str:
        head = (
            "compress",
            "s a step",
            "samples/s",
            "bound by",
            "MB up",
            "MB down",
            "rate",
            "edge s",
            "cloud s",
        )
        table = [head + (("cut 1", "cut 2") if with_cuts else ())]
        for row in rows:
            figures = (
                " ".join(row.compress),
                figure(row.step_s),
                figure(row.samples_per_s),
                row.bound_by,
                figure(row.up_bytes / 1e6),
                figure(row.down_bytes / 1e6),
                f"{row.compress_rate:.3f}",
                figure(row.edge_s),
                figure(row.cloud_s),
            )
            table.append(figures + (row.cuts if with_cuts else ()))
        return columns(table)


def figure(value: float) -> str:
    """Write a number with the three digits that count."""
    return f"{value:.0f}" if value >= 999.5 else f"{value:.3g}"


def _rate(bit_s: float) -> str:
    if bit_s >= 1e10:
        return "over 10 Gbit/s"
    return f"{figure(bit_s / 1e9)} Gbit/s" if bit_s >= 1e9 else f"{figure(bit_s / 1e6)} Mbit/s"

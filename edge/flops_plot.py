"""A picture of a model from its first operation to its last: where it computes, and what a cut would carry."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.flops import Operation

_MEGABYTE = 1e6
_CUT_COLOURS = ("tab:red", "tab:purple")


def plot_along(
    path: Path, title: str, operations: Sequence[Operation], cuts: Sequence[int], crossing: Sequence[int]
) -> None:
    """Draw the MACs up to each operation and the bytes that would cross right after it.

    Args:
        path: of the picture; its suffix chooses the format.
        title: to put above it.
        operations: of the model, in order.
        cuts: the operation that each cut comes after.
        crossing: the bytes that cross each cut, with a bottleneck if there is one.

    Raises:
        UserError: matplotlib is not installed, or does not know the format.
    """
    figure = _figure()
    macs, carried = figure.subplots(2, 1, sharex=True)
    steps = range(len(operations))
    total = sum(operation.macs for operation in operations) or 1
    macs.plot(steps, [done / total for done in itertools.accumulate(op.macs for op in operations)])
    macs.set_ylabel(f"share of {total:.2e} MACs so far")
    macs.set_title(title, fontsize="small", wrap=True)
    # After the last operation there is nothing left to cut.
    carried.step(steps[:-1], [op.crossing_bytes / _MEGABYTE for op in operations[:-1]], where="mid")
    carried.set_yscale("log")
    carried.set_ylabel("MB that cross a cut here")
    carried.set_xlabel("operation")
    for number, (cut, size, colour) in enumerate(zip(cuts, crossing, _CUT_COLOURS, strict=True), start=1):
        for axes in (macs, carried):
            axes.axvline(cut, color=colour, linestyle="--", linewidth=1)
        label = f"cut {number}, after {operations[cut].name}: {size / _MEGABYTE:.3g} MB"
        carried.plot([cut], [size / _MEGABYTE], "o", color=colour, label=label)
    carried.legend(fontsize="small")
    for axes in (macs, carried):
        axes.grid(alpha=0.3)
    try:
        figure.savefig(path)
    except ValueError as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"--plot {path}: {reason}") from error


def _figure() -> Any:
    """Make a figure that needs no display."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("--plot needs matplotlib: pip install 'isthmus[plot]'") from error
    return Figure(figsize=(9, 7), layout="constrained", dpi=120)

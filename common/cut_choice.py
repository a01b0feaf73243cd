"""Where a model is worth cutting, from what its operations compute and what a cut behind each would carry.

A later first cut leaves the edge more to compute, so it has to carry less; what is left are few. Both start from
cut points that there are already, and move towards the output: data never cross rawer than they did, and the layers
that the edge keeps behind cut 2, the classifier, stay there.
"""

from collections.abc import Iterator, Sequence
from itertools import groupby

from common.flops import Operation

__all__ = ["first_cuts", "second_cuts"]

WORTHWHILE = 0.8
"""The most that a cut may carry of what the one before carries, to count as another."""


def first_cuts(operations: Sequence[Operation], cut1: int, cut2: int) -> list[str]:
    """Name deeper places for cut 1, where less and less crosses.

    Args:
        operations: of the model, in order.
        cut1: which of them comes before the first cut now.
        cut2: the same of the second.

    Returns:
        Names of cut points, in order.
    """
    # Where as much crosses after several, the one that ends a module has a name that says where that is.
    return [
        min((_name(operations, place) for place in run), key=lambda name: name.count("."))
        for run in _lighter(operations, cut1, cut2)
    ]


def second_cuts(operations: Sequence[Operation], cut2: int) -> list[str]:
    """Name later places for cut 2, before the next layer with weights, where less and less crosses.

    The cloud gets no layer of the edge's, only what is between two: pooling, or the choice of one token of many.

    Args:
        operations: of the model, in order.
        cut2: which of them comes before the second cut now.

    Returns:
        Names of cut points, in order.
    """
    next_layer = next(
        (place for place, one in enumerate(operations) if place > cut2 and one.macs), len(operations) - 1
    )
    return [operations[run[0]].name for run in _lighter(operations, cut2, next_layer)]


def _lighter(operations: Sequence[Operation], start: int, end: int) -> Iterator[list[int]]:
    """Yield runs of places between the two, after which as much crosses: each less than after the one before."""
    least = operations[start].crossing_bytes
    for crossing, run in groupby(range(start + 1, end), key=lambda place: operations[place].crossing_bytes):
        if 0 < crossing <= WORTHWHILE * least:
            least = crossing
            yield list(run)


def _name(operations: Sequence[Operation], place: int) -> str:
    """Return the shortest name of the cut after an operation: that of the outermost module which ends with it."""
    atoms = operations[place].name.split(".")
    following = operations[place + 1].name if place + 1 < len(operations) else ""
    for depth in range(1, len(atoms)):
        module = ".".join(atoms[:depth])
        if not following.startswith(f"{module}.") and following != module:
            return module
    return operations[place].name

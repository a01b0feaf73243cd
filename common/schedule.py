"""The pipeline's schedule: who computes what next, decided by what has arrived.

A step has five actions a chunk. Read down for the way of one chunk:

    0F  edge   front forward
    1F  cloud  middle forward
    2T  edge   the turn: back forward, loss, back backward
    1B  cloud  middle backward
    0B  edge   front backward

Four chunks at depth 4, when every action takes one tick and the link none (`..` is an idle tick):

    edge   0F0 0F1 2T0 2T1 0F2 0F3 2T2 2T3 0B0 0B1 0B2 0B3
    cloud  ..  1F0 1F1 1B0 1B1 1F2 1F3 1B2 1B3

With a link that takes a tick each way, depth 2 leaves the edge waiting, depth 4 does not:

    edge   0F0 0F1 ..  ..  2T0 2T1 ..  ..  0B0 0F2 0B1 0F3 ..  2T2 ..  2T3 ..  0B2 ..  0B3
    cloud  ..  ..  1F0 1F1 ..  ..  1B0 1B1 ..  ..  ..  1F2 ..  1F3 ..  1B2 ..  1B3

    edge   0F0 0F1 0F2 0F3 2T0 2T1 2T2 2T3 0B0 0B1 0B2 0B3
    cloud  ..  ..  1F0 1F1 1F2 1F3 1B0 1B1 1B2 1B3

Two rules:

1. Of what is ready, that goes first which others wait for: on the cloud 1F, then 1B; on the edge 2T, without which
   neither side gets to a backward, then 0F, and last 0B, which only the step's end waits for. Memory is bounded by the
   depth, which this order makes use of. The usual rule, that a ready backward goes before a forward (one forward, one
   backward: PipeDream, https://arxiv.org/abs/1806.03377), keeps fewer chunks in flight at times, and on average is
   slower at the same depth, most where the edge is what everything waits for: `benchmarks/schedule_order.py`.
2. Each kind of action runs strictly in chunk order, whatever order messages come in. So BatchNorm statistics
   and gradient sums meet their terms in the order of a plain loop over the chunks, and equal it bitwise.

A schedule is a pure generator, one for each side, without torch, clocks or threads. `next(schedule)` gives
the first action; `schedule.send(arrivals)` says "the last action is done, and these have arrived since" and
gives the next `Action`, or `WAIT` when nothing can be done before something arrives. It returns when the
side's part of the step is done. An arrival is named by the action it makes possible: the cloud's answer to
`0F3` arrives at the edge as `2T3`.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Final, NamedTuple, TypeAlias

__all__ = [
    "CLOUD",
    "EDGE",
    "WAIT",
    "Action",
    "Schedule",
    "Side",
    "Wait",
    "cloud_schedule",
    "edge_schedule",
    "schedule_of",
]

ACTIONS: Final = ("0F", "1F", "2T", "1B", "0B", "2F")
"""Every kind of action, in the order a chunk meets them; `2F`, back forward, is evaluation's `2T`."""


class Action(NamedTuple):
    """One piece of compute: what `stage` does (`what`) to `chunk`. Prints as `0F3`.

    Stages are 0 (front), 1 (middle) and 2 (back); `what` is F (forward), B (backward) or T (the turn).
    """

    stage: int
    what: str
    chunk: int

    @property
    def kind(self) -> str:
        """Stage and verb without the chunk, such as `0F`."""
        return f"{self.stage}{self.what}"

    @property
    def backward(self) -> bool:
        """Whether what this action sends is a gradient; `wire.outbox` orders them and activations on the link."""
        return self.what != "F"

    def __str__(self) -> str:
        return f"{self.kind}{self.chunk}"

    def __repr__(self) -> str:
        return str(self)

    @classmethod
    def parse(cls, text: str) -> Action:
        """Read what `str` prints.

        Raises:
            ValueError: if the text is no action.
        """
        kind, chunk = text[:2], text[2:]
        if kind not in ACTIONS or not (chunk.isascii() and chunk.isdigit()):
            raise ValueError(f"{text!r} is no action: write {', '.join(ACTIONS)} and a chunk, such as 0F3")
        return cls(int(kind[0]), kind[1], int(chunk))


class Wait(Enum):
    """The type of `WAIT`."""

    WAIT = "wait"


WAIT: Final = Wait.WAIT
"""Nothing can be done before something arrives."""

Schedule: TypeAlias = Generator[Action | Wait, Iterable[Action] | None, None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Side:
    """One side's part of a step.

    Attributes:
        kinds: its kinds of action, the most urgent first.
        first: the kind that begins a chunk here.
        last: the kind that ends it.
        after: for each kind that needs a message, this side's own kind that the message answers, or None
            where it answers nothing this side did.
    """

    kinds: tuple[str, ...]
    first: str
    last: str
    after: Mapping[str, str | None]


EDGE: Final = Side(kinds=("2T", "0F", "0B"), first="0F", last="0B", after={"2T": "0F", "0B": "2T"})
_EDGE_EVALUATION: Final = Side(kinds=("2F", "0F"), first="0F", last="2F", after={"2F": "0F"})
CLOUD: Final = Side(kinds=("1F", "1B"), first="1F", last="1B", after={"1F": None, "1B": "1F"})
_CLOUD_EVALUATION: Final = Side(kinds=("1F",), first="1F", last="1F", after={"1F": None})


def edge_schedule(chunks: int, depth: int, *, evaluate: bool = False) -> Schedule:
    """Order the edge's part of one step: front and back.

    Args:
        chunks: how many chunks the batch is cut into, at least 1.
        depth: the most chunks in flight, from the start of a chunk's `0F` to the end of its `0B` (in
            evaluation of its `2F`), at least 1; more than `chunks` is the same as `chunks`.
        evaluate: forward only: `0F` and `2F`.

    Returns:
        A generator as the module describes. It raises ValueError for an arrival that no action of this step
        awaits: out of range, a second time, or before what it answers was done.

    Raises:
        ValueError: if chunks or depth is less than 1.
    """
    if depth < 1:
        raise ValueError(f"depth must be at least 1, not {depth}")
    return schedule_of(_EDGE_EVALUATION if evaluate else EDGE, chunks, depth)


def cloud_schedule(chunks: int, *, evaluate: bool = False) -> Schedule:
    """Order the cloud's part of one step: the middle.

    How many chunks are in flight is the edge's choice: the cloud computes what arrives.

    Args:
        chunks: how many chunks the batch is cut into, at least 1.
        evaluate: forward only: `1F`.

    Returns:
        A generator as `edge_schedule` returns.

    Raises:
        ValueError: if chunks is less than 1.
    """
    return schedule_of(_CLOUD_EVALUATION if evaluate else CLOUD, chunks, chunks)


def schedule_of(side: Side, chunks: int, depth: int) -> Schedule:
    """Order a side's part of one step: for `edge_schedule`, `cloud_schedule`, and other orders to compare with them."""
    # Not itself a generator, so that bad arguments are refused here and not at the first `next`.
    if chunks < 1:
        raise ValueError(f"a step needs at least 1 chunk, not {chunks}")
    return _run(side, chunks, depth)


def _run(side: Side, chunks: int, depth: int) -> Schedule:
    done = dict.fromkeys(side.kinds, 0)  # kinds run in chunk order, so a count says which chunks
    arrived: dict[str, set[int]] = {kind: set() for kind in side.after}

    def ready(kind: str) -> bool:
        chunk = done[kind]
        if chunk == chunks:
            return False
        if kind in arrived:
            return chunk in arrived[kind]
        return done[side.first] - done[side.last] < depth

    while done[side.last] < chunks:
        kind = next(filter(ready, side.kinds), None)
        action = None if kind is None else Action(int(kind[0]), kind[1], done[kind])
        for arrival in (yield WAIT if action is None else action) or ():
            _check(arrival, side, chunks, done, arrived, running=action)
            arrived[arrival.kind].add(arrival.chunk)
        if kind is not None:
            done[kind] += 1


def _check(
    arrival: Action,
    side: Side,
    chunks: int,
    done: Mapping[str, int],
    arrived: Mapping[str, set[int]],
    *,
    running: Action | None,
) -> None:
    """Raise ValueError for an arrival that this side does not await now."""
    if arrival.kind not in side.after:
        raise ValueError(f"{arrival} arrived, but only {', '.join(side.after)} can arrive here")
    if not 0 <= arrival.chunk < chunks:
        raise ValueError(f"{arrival} arrived, but the step has chunks 0 to {chunks - 1}")
    if arrival.chunk in arrived[arrival.kind]:
        raise ValueError(f"{arrival} arrived twice")
    cause = side.after[arrival.kind]
    # `running` ended in this very turn: its answer may be here already.
    if cause is not None and arrival.chunk >= done[cause] + (running is not None and running.kind == cause):
        raise ValueError(f"{arrival} arrived before {cause}{arrival.chunk} was done")

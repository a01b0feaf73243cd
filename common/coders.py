"""The ends of training's streams on one side: what they learn in a step is kept, undone, copied and put back."""

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from common.lanes import DECODE, ENCODE, Lanes
from common.snapshot import copy_of


class Coder(Protocol):
    """One end of one stream; those of `wire.streams` are such."""

    def commit(self) -> None: ...  # noqa: D102
    def rollback(self) -> None: ...  # noqa: D102
    def state_dict(self) -> dict[str, Any]: ...  # noqa: D102
    def load_state_dict(self, state: Mapping[str, Any], /) -> None: ...  # noqa: D102
    def close(self) -> None: ...  # noqa: D102


class Coders:
    """All ends on one side, each on its lane: what is asked of one comes after what is queued there.

    Args:
        lanes: that they work on.
        encoders: in an order that stays.
        decoders: the same.
    """

    def __init__(self, lanes: Lanes, encoders: Iterable[Coder], decoders: Iterable[Coder]) -> None:
        self._lanes = lanes
        self._ends = [*((ENCODE, one) for one in encoders), *((DECODE, one) for one in decoders)]

    def settle(self, *, applied: bool) -> list[asyncio.Future[None]]:
        """End a step: they keep what they have learnt, or forget it."""
        what = "commit" if applied else "rollback"
        return [
            self._lanes.run(lane, what, end.commit if applied else end.rollback) for lane, end in self._ends
        ]

    def copies(self) -> list[asyncio.Future[Any]]:
        """Copy the state of each."""
        return [self._lanes.run(lane, "snapshot", copy_of, end.state_dict) for lane, end in self._ends]

    async def restore(self, states: Sequence[Any]) -> None:
        """Take over what `copies` gave."""
        await asyncio.gather(
            *(
                self._lanes.run(lane, "restore", end.load_state_dict, state)
                for (lane, end), state in zip(self._ends, states, strict=True)
            )
        )

    def close(self) -> None:
        """Give up what codecs keep on disk, once the lanes have ended."""
        for _, end in self._ends:
            end.close()

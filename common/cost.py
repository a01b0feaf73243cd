"""What a step costs: seconds of compute and codecs, bytes of messages, and the link that carries them.

The simulator and the floor read the same model. A chunk's way through a step is a chain of pieces of work,
each on one lane:

    0F  encode  up  ~delay~  decode  1F  encode  down  ~delay~  decode  2T  encode  up  ~delay~ ...  0B

Every lane does one piece at a time. The lanes of one side's cores (or one GPU) share them: when k of them
work at once, each runs at 1/k of its speed. Where both sides share cores, so do all six.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from types import MappingProxyType
from typing import Final, NamedTuple

from common.schedule import Action

__all__ = [
    "ANSWERS",
    "CLOUD",
    "DOWN",
    "EDGE",
    "LANES",
    "UP",
    "ChunkCost",
    "Link",
    "Message",
    "StepModel",
    "Work",
]

EDGE: Final = ("0F", "2T", "0B")
"""The kinds of actions that the edge computes in training; `CLOUD` has the cloud's."""

CLOUD: Final = ("1F", "1B")

UP: Final = ("0F", "2T")
"""The kinds of actions in training whose results go up; of `DOWN`, down."""

DOWN: Final = ("1F", "1B")

LANES: Final = (
    "edge compute",
    "edge encode",
    "up",
    "cloud decode",
    "cloud compute",
    "cloud encode",
    "down",
    "edge decode",
)


@dataclass(frozen=True, kw_only=True)
class Message:
    """What one message of one chunk costs.

    Attributes:
        size_bytes: on the socket, header included.
        encode_s: seconds to encode it, with the sender's cores to itself.
        decode_s: seconds to decode it, with the receiver's cores to itself.
    """

    size_bytes: int = 0
    encode_s: float = 0.0
    decode_s: float = 0.0

    def __post_init__(self) -> None:
        """Refuse costs that no clock shows: a simulation of them would never end."""
        _check_costs(self, self.size_bytes, self.encode_s, self.decode_s)


@dataclass(frozen=True, kw_only=True)
class ChunkCost:
    """What one chunk costs.

    Attributes:
        seconds: of each kind of action (`0F`, `1F`, `2T`, `1B`, `0B`; `2F` in evaluation), with the side's
            cores to itself. A kind that is missing costs nothing.
        messages: what is sent after `0F`, `1F`, `2T` and `1B`, by that kind.
    """

    seconds: Mapping[str, float]
    messages: Mapping[str, Message]

    def __post_init__(self) -> None:
        """Refuse costs that no clock shows: a simulation of them would never end."""
        _check_costs(self, *self.seconds.values())

    def compute_s(self, kinds: Iterable[str]) -> float:
        """Sum the seconds of some kinds of actions."""
        return sum(self.seconds.get(kind, 0.0) for kind in kinds)

    def size_bytes(self, kinds: Iterable[str]) -> int:
        """Sum the bytes of what is sent after some kinds of actions."""
        return sum(self.messages[kind].size_bytes for kind in kinds)

    def scaled(self, share: float) -> ChunkCost:
        """Return the cost of a chunk with this share of the samples, as of an uneven last chunk."""
        return ChunkCost(
            seconds={kind: seconds * share for kind, seconds in self.seconds.items()},
            messages={
                kind: Message(
                    size_bytes=round(message.size_bytes * share),
                    encode_s=message.encode_s * share,
                    decode_s=message.decode_s * share,
                )
                for kind, message in self.messages.items()
            },
        )


@dataclass(frozen=True, kw_only=True)
class Link:
    """The network path, the same or not in its two directions.

    Attributes:
        up_bit_s: rate from edge to cloud.
        down_bit_s: rate from cloud to edge.
        delay_s: one-way delay.
    """

    up_bit_s: float
    down_bit_s: float
    delay_s: float = 0.0

    def __post_init__(self) -> None:
        """Refuse rates that carry nothing and delays into the past."""
        if not (self.up_bit_s > 0 and self.down_bit_s > 0 and 0 <= self.delay_s < math.inf):
            raise ValueError(f"a link has rates above 0 and a delay of 0 or more: {self}")

    def scaled(self, share: float) -> Link:
        """Return a link of the same delay with this share of the rates."""
        return replace(self, up_bit_s=self.up_bit_s * share, down_bit_s=self.down_bit_s * share)


@dataclass(frozen=True, kw_only=True)
class StepModel:
    """What one step costs.

    Attributes:
        chunks: the cost of each chunk, in order; at least one.
        link: what carries the messages.
        shared_cores: whether both sides compute on the same cores.
        update_s: seconds from the last backward until the next step can begin: the optimizer.
    """

    chunks: tuple[ChunkCost, ...]
    link: Link
    shared_cores: bool = False
    update_s: float = 0.0

    def __post_init__(self) -> None:
        """Refuse a step of nothing."""
        if not self.chunks or not 0 <= self.update_s < math.inf:
            raise ValueError("a step has at least 1 chunk and an update of 0 seconds or more")

    @classmethod
    def even(cls, cost: ChunkCost, chunks: int, link: Link, *, shared_cores: bool = False) -> StepModel:
        """Return a step of chunks that all cost the same."""
        return cls(chunks=(cost,) * chunks, link=link, shared_cores=shared_cores)

    def with_link(self, link: Link) -> StepModel:
        """Return the same step over another link."""
        return replace(self, link=link)

    def resource(self, lane: str) -> str:
        """Name what a lane shares with others: `up`, `down`, `edge`, `cloud`, or `cores` for both sides."""
        if lane in ("up", "down"):
            return lane
        return "cores" if self.shared_cores else lane.split()[0]

    def work(self, *, evaluate: bool = False) -> list[list[Work]]:
        """Lay out each chunk's chain of work."""
        kinds = _EVALUATION if evaluate else _TRAINING
        return [
            [piece._replace(place=place) for place, piece in enumerate(self._chain(chunk, cost, kinds))]
            for chunk, cost in enumerate(self.chunks)
        ]

    def _chain(self, chunk: int, cost: ChunkCost, kinds: tuple[str, ...]) -> Iterator[Work]:
        for kind in kinds:
            action = Action(int(kind[0]), kind[1], chunk)
            side, peer, direction = _WAYS[kind]
            yield Work(f"{side} compute", action, cost.seconds.get(kind, 0.0))
            if kind == kinds[-1]:
                return
            message = cost.messages.get(kind, Message())
            rate_bit_s = self.link.up_bit_s if direction == "up" else self.link.down_bit_s
            yield Work(f"{side} encode", action, message.encode_s)
            yield Work(direction, action, message.size_bytes * 8 / rate_bit_s, self.link.delay_s)
            yield Work(f"{peer} decode", action, message.decode_s)


class Work(NamedTuple):
    """One piece of work of one chunk.

    Attributes:
        lane: where it is done, one of `LANES`.
        action: what is computed, or whose result is encoded, sent or decoded.
        seconds: how long it takes with its resource to itself.
        delay_s: seconds from its end until the next piece of the chunk can begin.
        place: which piece of the chunk's chain this is, from 0.
    """

    lane: str
    action: Action
    seconds: float
    delay_s: float = 0.0
    place: int = 0


def _check_costs(owner: object, *costs: float) -> None:
    if not all(0 <= cost < math.inf for cost in costs):
        raise ValueError(f"costs are finite and not negative: {owner}")


_TRAINING: Final = ("0F", "1F", "2T", "1B", "0B")

ANSWERS: Final[Mapping[str, str]] = MappingProxyType(dict(pairwise(_TRAINING)))
"""Of each kind of message in training: the kind of action that decoding it makes possible."""

_EVALUATION: Final = ("0F", "1F", "2F")
# Of each kind: who computes it, who gets the result, and which way that goes.
_WAYS: Final[Mapping[str, tuple[str, str, str]]] = MappingProxyType(
    {
        kind: ("cloud", "edge", "down") if kind in CLOUD else ("edge", "cloud", "up")
        for kind in (*_TRAINING, "2F")
    }
)

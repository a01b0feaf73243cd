"""What a codec is.

A codec takes one tensor apart into parts that are smaller together, and puts them together again. A
chain of codecs is thus a tree: a part marked `follow` goes through the rest of the chain, any other is
sent as it is. int8, for one, makes a quantized tensor, which `lz4` may compress further, and its scales,
which are sent raw.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch

from wire.codecs.layout import TensorType, padded
from wire.errors import CorruptPayload

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor


class Role(Enum):
    """What a tensor is to training; lossy codecs round gradients differently from activations."""

    ACTIVATION = "activation"
    GRADIENT = "gradient"


@dataclass(frozen=True, eq=False)
class Facts:
    """What both ends know of a chunk while they encode and decode its tensors.

    Attributes:
        ids: of its samples, in their order; None where they are not known.
        kept: bool `[B, S]` in host memory: which positions hold tokens; None where there is no such mask.
    """

    ids: tuple[int, ...] | None = None
    kept: Tensor | None = None

    @cached_property
    def tokens(self) -> Tensor:
        """Where the tokens stand among all positions of a chunk with a mask: int64, ascending."""
        assert self.kept is not None
        return self.kept.reshape(-1).nonzero().view(-1)

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """How many tokens each sample of a chunk with a mask has."""
        assert self.kept is not None
        return tuple(self.kept.sum(1).tolist())


NOTHING_KNOWN = Facts()


class NonFiniteTensor(ValueError):
    """A tensor holds NaN or infinity, which a quantizer would turn into something finite.

    Args:
        codec: the codec that refused it.
    """

    def __init__(self, codec: str) -> None:
        self.codec = codec
        super().__init__(
            f"a tensor with NaN or infinity in it cannot go through {codec}: training has diverged;"
            " lower the learning rate"
        )


@dataclass(frozen=True, slots=True)
class Call:
    """What one encoding depends on besides the tensor and the codec's state.

    Attributes:
        seed: of all random choices, and nothing else is, so that a repeated step rounds alike.
        facts: what the decoder knows, too.
    """

    seed: int
    facts: Facts = NOTHING_KNOWN

    def child(self, part: int) -> Call:
        """The call for the chain's next stage on the given part: the same facts, other random numbers."""
        return Call(mixed(self.seed * 1024 + part + 1), self.facts)


def mixed(seed: int) -> int:
    """64 bits that look random, a function of `seed` only.

    Source: SplitMix64's finalizer, Steele, Lea and Flood 2014, doi:10.1145/2660193.2660195.
    """
    z = (seed * 0x9E3779B97F4A7C15 + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return z ^ (z >> 31)


@dataclass(frozen=True, slots=True)
class Part:
    """One of the tensors that a codec makes of its input.

    Attributes:
        tensor: dense, in either memory order.
        follow: the rest of the chain applies to it.
    """

    tensor: Tensor
    follow: bool


@dataclass(frozen=True, slots=True)
class PartType:
    """What the decoder expects in the place of one part."""

    type: TensorType
    follow: bool


@dataclass(frozen=True, slots=True)
class Packed:
    """What a codec made of a tensor.

    Attributes:
        parts: in the order in which `Codec.decode` takes them.
        meta: plain values that decoding needs, as few as can be.
    """

    parts: tuple[Part, ...]
    meta: dict[str, Any] = field(default_factory=dict)


class Codec(ABC):
    """One stage of a chain, for one stream of tensors in one direction.

    An instance may keep workspaces and state between calls; one thread at a time uses it.

    Args:
        args: what followed the codec's name and a colon in the spec; empty where nothing did.
        role: what the stream carries.

    Raises:
        ValueError: `args` are not for this codec; the message says what would be.

    Attributes:
        name: how specs and descriptions call the codec.
        kind: "lossless" gives the same bits back, "lossy" keeps within `error_bound`.
        on_host: works in host memory, wherever the tensors are.
        always: stands in front of every chain by itself, and in none that is written down.
        exact: decodes to the same bits on every device.
        mirrored: decoding changes its state. The encoder then decodes, too, what it has sent, so that both
            ends keep the same state.
        everywhere: one instance serves all places of a stream's tree.
        examples: arguments that are right, for the tests, which find codecs by the registry.
        uses_ids: works better where the samples' ids are known.
        disk_bytes: the most that an instance may keep on disk.
    """

    name: ClassVar[str]
    kind: ClassVar[Literal["lossless", "lossy"]]
    on_host: ClassVar[bool] = False
    always: ClassVar[bool] = False
    exact: ClassVar[bool] = True
    mirrored: ClassVar[bool] = False
    everywhere: ClassVar[bool] = False
    examples: ClassVar[tuple[str, ...]] = ("",)
    uses_ids = False
    disk_bytes = 0

    def __init__(self, args: str, role: Role) -> None:
        if args:
            raise ValueError(f"{self.name} takes no arguments")
        self.role = role
        self._committed: dict[str, Any] = {}

    @classmethod
    def misplaced(cls, before: Sequence[type[Codec]], after: Sequence[type[Codec]]) -> str | None:
        """Why the codec cannot stand between these others in a chain; None where it can."""
        return None

    @abstractmethod
    def encode(self, x: Tensor, call: Call) -> Packed | None:
        """Takes `x` apart.

        Args:
            x: dense; not changed. The parts may share its memory.
            call: where random choices come from, and what the decoder knows.

        Returns:
            The parts, or None, with state as it was, where the codec does not take the dtype or would not
            make `x` smaller: `x` then goes to the next stage as it is.

        Raises:
            NonFiniteTensor: the codec cannot carry NaN and infinity, and `x` holds some.
        """

    @abstractmethod
    def part_types(self, whole: TensorType, meta: Mapping[str, Any], facts: Facts) -> tuple[PartType, ...]:
        """Declares what the parts of a tensor of type `whole` are, so that nothing else is ever decoded.

        Raises:
            CorruptPayload: this codec never makes such `meta`, or never takes such a tensor of such a chunk.
        """

    @abstractmethod
    def decode(
        self, parts: Sequence[Tensor], whole: TensorType, meta: Mapping[str, Any], facts: Facts
    ) -> Tensor:
        """Puts parts, which are of the types that `part_types` declared, together again.

        Returns:
            A tensor of type `whole`, on the parts' device.

        Raises:
            CorruptPayload: the values of the parts fit no tensor.
        """

    def error_bound(self, x: Tensor) -> Tensor:
        """The most by which an element of `x` can change on its way, broadcastable to `x`'s shape."""
        return torch.zeros((), dtype=torch.float64)

    def misfit(self, whole: TensorType) -> str | None:
        """Why nothing would come of the codec's arguments for tensors of a type; None where something can.

        For whoever knows the tensors before any are sent; the codec itself lets such tensors pass as they are.
        """
        return None

    def state_dict(self) -> dict[str, Any]:
        """What this stream has learnt from earlier calls; later calls do not change it."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes back to a state that `state_dict` returned; an empty one is that of a new stream.

        Raises:
            ValueError: the state is not this codec's.
        """
        if state:
            raise ValueError(f"{self.name} keeps no state, and some was given")

    def commit(self) -> None:
        """The state that `rollback` goes back to is the present one from here on."""
        self._committed = self.state_dict()

    def rollback(self) -> None:
        """Goes back to the state of the last `commit`, or where there was none, to that of a new stream."""
        self.load_state_dict(self._committed)

    def close(self) -> None:
        """Gives up what the codec holds on to; it is not used again."""
        self._committed = {}

    def shrinks(self, whole: TensorType, meta: Mapping[str, Any], facts: Facts = NOTHING_KNOWN) -> bool:
        """Whether the declared parts, padded, are smaller than the tensor."""
        parts = self.part_types(whole, meta, facts)
        return sum(padded(part.type.nbytes) for part in parts) < padded(whole.nbytes)


def no_meta(codec: str, meta: Mapping[str, Any]) -> None:
    """Checks that a description has no meta values.

    Raises:
        CorruptPayload: it has.
    """
    if meta:
        raise CorruptPayload(f"{codec} was described with meta values that it does not have")

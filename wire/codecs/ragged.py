"""ragged: the tokens of a batch of texts, without the padding between them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch

from wire.codecs.base import Call, Codec, Facts, Packed, Part, PartType, no_meta
from wire.codecs.layout import TensorType, padded
from wire.codecs.registry import register
from wire.errors import CorruptPayload

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor


@register
class Ragged(Codec):
    """Packs `[B, S, ...]` to the N tokens that the chunk's mask keeps, `[1, N, ...]`; the rest comes as zeros.

    What it drops is the model's own padding, which the mask has no part in the loss, so that training loses
    nothing. The mask does not cross again: both ends have it, see `Facts.kept`.
    """

    name = "ragged"
    kind: ClassVar[Literal["lossless", "lossy"]] = "lossless"

    @classmethod
    def misplaced(cls, before: Sequence[type[Codec]], after: Sequence[type[Codec]]) -> str | None:
        """It goes by the tensor's own first two dimensions, which other codecs do away with."""
        return "it comes first, as in ragged+int8" if before else None

    def encode(self, x: Tensor, call: Call) -> Packed | None:
        """One part, the tokens; None without a mask that fits the tensor, and where it keeps everything."""
        whole = TensorType.of(x)
        packed = self._packed(whole, call.facts)
        if packed is None or padded(packed.nbytes) >= padded(whole.nbytes):
            return None
        tokens = x.reshape(-1, *whole.shape[2:]).index_select(0, call.facts.tokens.to(x.device))
        return Packed((Part(tokens[None], follow=True),))

    def part_types(self, whole: TensorType, meta: Mapping[str, Any], facts: Facts) -> tuple[PartType, ...]:
        """The same dtype, `[1, N, ...]`."""
        no_meta(self.name, meta)
        packed = self._packed(whole, facts)
        if packed is None:
            raise CorruptPayload(
                f"{self.name} never takes a tensor of {whole.dtype}, {list(whole.shape)}, of this chunk: its mask "
                + ("is not known" if facts.kept is None else f"is {list(facts.kept.shape)}")
            )
        return (PartType(packed, follow=True),)

    def decode(
        self, parts: Sequence[Tensor], whole: TensorType, meta: Mapping[str, Any], facts: Facts
    ) -> Tensor:
        """The tokens in their places, zeros in all others."""
        (tokens,) = parts
        x = torch.zeros(whole.shape, dtype=whole.dtype, device=tokens.device)
        x.view(-1, *whole.shape[2:]).index_copy_(0, facts.tokens.to(tokens.device), tokens[0])
        return x

    @staticmethod
    def _packed(whole: TensorType, facts: Facts) -> TensorType | None:
        """What tokens of a tensor of this type are; None where it is not one of the mask's positions."""
        kept, shape = facts.kept, whole.shape
        if kept is None or not whole.dtype.is_floating_point or whole.order != "C":
            return None
        if shape[:2] != tuple(kept.shape):
            return None
        return TensorType(whole.dtype, (1, sum(facts.lengths), *shape[2:]))

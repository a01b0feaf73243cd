"""Tensors as one matrix a sample, which `wire.codecs.lowrank` factorizes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from wire.codecs.base import NOTHING_KNOWN, Facts
from wire.codecs.layout import TensorType, flat

if TYPE_CHECKING:
    from torch import Tensor


_MEANS_SHARE = 100
"""Means go apart where the factors are this many times their size."""


@dataclass(frozen=True, slots=True)
class Matrices:
    """A tensor's memory as one matrix a sample.

    Attributes:
        count: how many matrices.
        rows: of each.
        columns: of each.
        features: which of the two sides the features are on, "rows" or "columns".
        of_map: whether they are maps, whose positions all count.
        lengths: how many rows of each are in memory, one matrix after the other; None where all are.
        kept: bool ``[count, rows]``: which rows count, the others being zeros; None where all do.
    """

    count: int
    rows: int
    columns: int
    features: Literal["rows", "columns"]
    of_map: bool = False
    lengths: tuple[int, ...] | None = None
    kept: Tensor | None = None

    @classmethod
    def of(cls, whole: TensorType, facts: Facts = NOTHING_KNOWN) -> Matrices | None:
        """The matrices of a tensor of this type; None where it has none."""
        if len(whole.shape) == 3:
            count, rows, columns = whole.shape
            kept, lengths = facts.kept, None
            if kept is not None and tuple(kept.shape) != (count, rows):
                kept = None
                if (count, rows) == (1, sum(facts.lengths)):
                    lengths = facts.lengths
                    count, rows = len(lengths), max(lengths, default=0)
            return cls(count, rows, columns, "columns", lengths=lengths, kept=kept)
        if len(whole.shape) == 4:
            count, channels, height, width = whole.shape
            if whole.order == "NHWC":
                return cls(count, height * width, channels, "columns", of_map=True)
            return cls(count, channels, height * width, "rows", of_map=True)
        return None

    @property
    def tall(self) -> bool:
        """Whether the rows are the longer side."""
        return self.rows >= self.columns

    @property
    def features_are_long(self) -> bool:
        """Whether the features are on the longer side."""
        return self.tall == (self.features == "rows")

    @property
    def feature_count(self) -> int:
        """How many features there are: channels, or the hidden size."""
        return self.rows if self.features == "rows" else self.columns

    @property
    def smaller_side(self) -> int:
        """Of each matrix."""
        return min(self.rows, self.columns)

    def means_apart(self, rank: int) -> bool:
        """Whether the features' means cross besides factors of this rank: of maps, where they hardly add to them."""
        return self.of_map and rank * (self.rows + self.columns) >= _MEANS_SHARE * self.feature_count

    def view(self, x: Tensor) -> Tensor:
        """A dense tensor as `[count, rows, columns]`."""
        if self.lengths is not None:
            m = x.new_zeros(self.count * self.rows, self.columns)
            m.index_copy_(0, self._places(x.device), flat(x).view(-1, self.columns))
            return m.view(self.count, self.rows, self.columns)
        m = flat(x).view(self.count, self.rows, self.columns)
        return m if self.kept is None else m.masked_fill(~self.kept.to(x.device)[..., None], 0)

    def memory(self, m: Tensor) -> Tensor:
        """What of `[count, rows, columns]` is in the tensor's memory, in its order."""
        m = m.reshape(-1, self.columns)
        return (m if self.lengths is None else m.index_select(0, self._places(m.device))).reshape(-1)

    def _places(self, device: torch.device) -> Tensor:
        """Where the rows that are in memory stand among all."""
        present = torch.arange(self.rows) < torch.tensor(self.lengths)[:, None]
        return present.view(-1).nonzero().view(-1).to(device)


@dataclass(frozen=True, slots=True)
class Centred:
    """Matrices `[count, long, short]` less their features' means, which are subtracted from products only.

    Attributes:
        values: the matrices with their means.
        means: `[count, long]` or `[count, short]`, of the features; None for nothing to subtract.
        features_are_long: which of the two.
    """

    values: Tensor
    means: Tensor | None
    features_are_long: bool

    def on_long(self, v: Tensor) -> Tensor:
        """The product of `[count, R, long]` with them, `[count, R, short]`."""
        return self._centre(torch.bmm(v, self.values), v, features=self.features_are_long)

    def on_short(self, u: Tensor) -> Tensor:
        """The product of `[count, R, short]` with their transposes, `[count, R, long]`."""
        return self._centre(torch.bmm(u, self.values.transpose(1, 2)), u, features=not self.features_are_long)

    def gram(self) -> Tensor:
        """The product of their transposes with them, `[count, short, short]`."""
        product = torch.bmm(self.values.transpose(1, 2), self.values)
        if self.means is None:
            return product
        if self.features_are_long:
            product -= product.mean(1, keepdim=True)
            return product.sub_(product.mean(2, keepdim=True))
        # Not the means as they will arrive: what is rounded off them, times the means, may outweigh what is left.
        means = self.values.mean(1)
        return product.sub_(self.values.shape[1] * means[:, :, None] * means[:, None])

    def _centre(self, product: Tensor, factor: Tensor, *, features: bool) -> Tensor:
        if self.means is None:
            return product
        if features:
            return product.sub_(torch.bmm(factor, self.means[..., None]))
        return product.sub_(factor.sum(-1, keepdim=True) * self.means[:, None])

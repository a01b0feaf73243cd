"""lowrank:R: each sample as a product of two thin matrices, found by power iteration.

A sample is a matrix, ``[C, H*W]`` of a map and ``[S, H]`` of a sequence. Two steps of power iteration from
the factor of the tensor before it give nearly what a singular value decomposition would, at the cost of four
or five thin products, as long as a stream's tensors resemble each other:

    V = start            what is remembered, or random          [R, long]
    U = orth(V M)        orthonormal, so nothing blows up       [R, short]
    V = U Mᵀ             the best partner that U can have       [R, long]
    M ≈ Vᵀ U             what the decoder multiplies            [long, short]

What is remembered lies on the side of the features (channels, or the hidden size), as they mean the same in
every sample; where it is U, the first line is ``V = U Mᵀ``. Where the smaller side is but a few times R, the products
``U (Mᵀ M)`` take the place of two each: ``Mᵀ M`` is made once, and only it and the last line go through all of M.

Of large maps each channel's mean goes apart, where that is at most a hundredth of the factors, and the factors are
those of what is left. The best of those leave no larger error than the best of the whole, and often a far smaller one:
most maps are not centred on zero, and a rank would go to their means. Nothing centred is laid out, for
``V (M - 1 meanᵀ) = V M - (V 1) meanᵀ``.

Where a mask tells the tokens of a text from its padding, padding counts as zeros, for no rank is to be spent on what
means nothing; and the tokens that ``ragged`` packs become matrices of their samples again.

Source: PowerSGD, Vogels, Karimireddy and Jaggi 2019, https://arxiv.org/abs/1905.13727, which does so for
gradients of weights.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch

from wire.codecs.base import (
    NOTHING_KNOWN,
    Call,
    Codec,
    Facts,
    NonFiniteTensor,
    Packed,
    Part,
    PartType,
    Role,
    no_meta,
)
from wire.codecs.layout import TensorType, padded
from wire.codecs.matrices import Centred, Matrices
from wire.codecs.registry import register
from wire.errors import CorruptPayload

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

_TAKES = (torch.float32, torch.float16, torch.bfloat16)

_TINY = 1e-37
"""Rows below it are taken for zero when they are brought to one size."""

_HUGE = 1e35
"""Tensors with larger factors are left alone: their product might overflow."""

_STIR = 1e-6
"""Share of random directions in each step. A direction that was empty, and would stay so, finds another."""

_STEPS, _COLD_STEPS = 2, 3
"""Steps from what is remembered, and from a random start. Samples change from one training step to the next: of
MobileNetV2's first map on CIFAR-10, at ranks 2 and 3, one step leaves 14 % above the least error, two leave 4 %."""

_GRAM_SHARE = 4
"""The product of a matrix with itself is made for a smaller side of at most so many ranks, where it costs less."""

_SQUARES = 1e-25, 1e35
"""Between these lie its largest elements, or it is not used: squares leave fp32's range sooner than what is squared."""

_MOST_STARTS = 16
"""Shapes that a stream remembers, the latest ones."""


@register
class LowRank(Codec):
    """Two factors of rank R a sample, ``[count, R, rows]`` and ``[count, R, columns]``, and of large maps their means.

    Component by component in memory, so that a quantizer that follows gives each a range of its own.
    """

    name = "lowrank"
    kind: ClassVar[Literal["lossless", "lossy"]] = "lossy"
    exact = False
    examples: ClassVar[tuple[str, ...]] = ("4", "1", "16")

    def __init__(self, args: str, role: Role) -> None:
        super().__init__("", role)
        if not (args.isascii() and args.isdigit() and 1 <= int(args[:9]) < 1 << 20):
            raise ValueError("give the rank, a whole number from 1, as in lowrank:16")
        self.rank = int(args)
        # By the start's shape; the one used last stands last.
        self._starts: dict[tuple[int, ...], Tensor] = {}

    def encode(self, x: Tensor, call: Call) -> Packed | None:
        """The factors of the rows and of the columns, and of large maps the channels' means, in the tensor's dtype."""
        whole = TensorType.of(x)
        matrices = self._fitting(whole, call.facts)
        if matrices is None:
            return None
        m = matrices.view(x).float()
        m = m if matrices.tall else m.transpose(1, 2)
        means = None
        if matrices.means_apart(self.rank):
            # As they will arrive, so that the factors make up for their rounding.
            means = m.mean(2 if matrices.features_are_long else 1).to(x.dtype)
        centred = Centred(m, None if means is None else means.float(), matrices.features_are_long)
        factors = self._factors(centred, matrices, most=min(_HUGE, torch.finfo(x.dtype).max))
        if factors is None:
            if not m.isfinite().all():
                raise NonFiniteTensor(self.name)
            return None
        long, short = factors
        self._remember(long if matrices.features_are_long else short)
        parts = [long, short] if matrices.tall else [short, long]
        if means is not None:
            parts.append(means[:, None])
        return Packed(tuple(Part(part.to(x.dtype), follow=True) for part in parts))

    def part_types(self, whole: TensorType, meta: Mapping[str, Any], facts: Facts) -> tuple[PartType, ...]:
        """``[count, R, rows]``, ``[count, R, columns]`` and perhaps ``[count, 1, channels]``, of the same dtype."""
        no_meta(self.name, meta)
        matrices = self._fitting(whole, facts)
        if matrices is None:
            raise CorruptPayload(
                f"{self.name}:{self.rank} never takes a tensor of {whole.dtype}, {list(whole.shape)}"
            )
        return tuple(PartType(part, follow=True) for part in self._parts(matrices, whole.dtype))

    def decode(
        self, parts: Sequence[Tensor], whole: TensorType, meta: Mapping[str, Any], facts: Facts
    ) -> Tensor:
        """The product of the factors with the means, in the original dtype."""
        rows, columns, *means = (part.float() for part in parts)
        matrices = Matrices.of(whole, facts)
        assert matrices is not None
        if means:
            mean = means[0] if matrices.features == "columns" else means[0].transpose(1, 2)
            x = torch.baddbmm(mean, rows.transpose(1, 2), columns)
        else:
            x = torch.bmm(rows.transpose(1, 2), columns)
        if whole.dtype == torch.float16:
            top = torch.finfo(whole.dtype).max
            x = x.clamp_(-top, top)
        return whole.shaped(matrices.memory(x.to(whole.dtype)))

    def error_bound(self, x: Tensor) -> Tensor:
        """What is cut off is orthogonal to what remains, so no larger than the row or column that it is in."""
        whole = TensorType.of(x)
        matrices = self._fitting(whole)
        if matrices is None:
            return torch.zeros((), dtype=torch.float64)
        values = centred = matrices.view(x).double()
        if matrices.means_apart(self.rank):
            means = centred.mean(2 if matrices.features == "rows" else 1, keepdim=True)
            centred = centred - means.to(x.dtype)

        def sizes(m: Tensor) -> Tensor:
            along = torch.linalg.vector_norm(m, dim=2 if matrices.tall else 1, keepdim=True)
            # Perhaps the tokens of several texts, each of whose matrices may be wide where that of all is not.
            across = torch.linalg.vector_norm(m, dim=1, keepdim=True) if matrices.count == 1 else along
            return torch.maximum(along, across)

        info = torch.finfo(x.dtype)
        left = sizes(centred)
        # Factors, means and the product are rounded; below a dtype's normal range by fixed amounts.
        rounding = (4 * info.eps + 1e-4) * torch.maximum(sizes(values), left)
        rounding += 4 * self.rank * info.tiny * info.eps
        return whole.shaped((left + rounding).expand_as(values).reshape(-1))

    def misfit(self, whole: TensorType) -> str | None:
        """A rank above the smaller side, which no compression is."""
        matrices = Matrices.of(whole)
        if matrices is None:
            return f"it takes [B,C,H,W] and [B,S,H], not {len(whole.shape)} dimensions"
        if self.rank <= matrices.smaller_side:
            return None
        size, one = matrices.rows * matrices.columns, matrices.rows + matrices.columns
        most = size // one
        if matrices.means_apart(most):
            most = (size - matrices.feature_count) // one
        side = f"a sample is a matrix {matrices.rows}x{matrices.columns}"
        return (
            f"{side}; ranks up to {most} make it smaller" if most else f"{side}, which no rank makes smaller"
        )

    def state_dict(self) -> dict[str, Any]:
        """The factors to start from, the one used last standing last."""
        return {"starts": list(self._starts.values())} if self._starts else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes the factors back."""
        starts = state.get("starts", [])
        fits = isinstance(starts, list | tuple) and all(
            isinstance(start, torch.Tensor)
            and (start.dtype, start.dim()) == (torch.float32, 3)
            and start.shape[1] == self.rank
            for start in starts
        )
        if state.keys() - {"starts"} or not fits or len(starts) > _MOST_STARTS:
            raise ValueError(f"the state is not one of {self.name}:{self.rank}")
        self._starts = {tuple(start.shape): start for start in starts}

    def _fitting(self, whole: TensorType, facts: Facts = NOTHING_KNOWN) -> Matrices | None:
        """The matrices of a tensor that this codec makes smaller; None for any other."""
        matrices = Matrices.of(whole, facts)
        if matrices is None or whole.dtype not in _TAKES or self.rank > matrices.smaller_side:
            return None
        size = sum(padded(part.nbytes) for part in self._parts(matrices, whole.dtype))
        return matrices if size < padded(whole.nbytes) else None

    def _parts(self, matrices: Matrices, dtype: torch.dtype) -> tuple[TensorType, ...]:
        shapes = [(self.rank, matrices.rows), (self.rank, matrices.columns)]
        if matrices.means_apart(self.rank):
            shapes.append((1, matrices.feature_count))
        return tuple(TensorType(dtype, (matrices.count, *shape)) for shape in shapes)

    def _factors(self, m: Centred, matrices: Matrices, most: float) -> tuple[Tensor, Tensor] | None:
        """V and U, `[count, R, long]` and `[count, R, short]`, of matrices `[count, long, short]`.

        None where `m` holds NaN, infinity, or values so large that squares overflow or V has one above `most`.
        """
        count, long, short = m.values.shape
        device = m.values.device
        start = self._starts.get((count, self.rank, matrices.feature_count))
        start = None if start is None else start.to(device)
        steps = _COLD_STEPS if start is None else _STEPS
        gram = m.gram() if short <= _GRAM_SHARE * self.rank else None
        if gram is not None and in_range(gram):
            if start is None:
                u = directions(self.rank, short, device).expand(count, -1, -1)
            else:
                u = m.on_long(start) if matrices.features_are_long else start
            for _ in range(steps):
                u = orthonormal(torch.bmm(u, gram))
            v = m.on_short(u)
            return (v, u) if peak(v) <= most else None
        if start is None:
            v = directions(self.rank, long, device).expand(count, -1, -1)
        else:
            v = start if matrices.features_are_long else m.on_short(start)
        for _ in range(steps):
            w = m.on_long(v)
            # Each element of m is in a sum of w, which is NaN or infinite if the element is.
            if not peak(w) < float("inf"):
                return None
            u = orthonormal(w)
            v = m.on_short(u)
        return (v, u) if peak(v) <= most else None

    def _remember(self, start: Tensor) -> None:
        key = tuple(start.shape)
        self._starts.pop(key, None)
        self._starts[key] = start
        if len(self._starts) > _MOST_STARTS:
            del self._starts[next(iter(self._starts))]


def peak(x: Tensor) -> float:
    """The largest magnitude, NaN where there is NaN."""
    return torch.stack(torch.aminmax(x)).abs().amax().item()


def in_range(gram: Tensor) -> bool:
    """Whether each matrix's product with itself, of `[count, n, n]`, is finite and not too small to say anything."""
    least, most = _SQUARES
    largest = gram.diagonal(dim1=1, dim2=2).amax(1)
    return bool((largest > least).all()) and peak(gram) < most


def orthonormal(w: Tensor) -> Tensor:
    """An orthonormal basis of the rows of `[count, R, n]`, R <= n; made up where they have less than rank R.

    By Householder's reflections, which are stable whatever the rows are.
    """
    evened = w / w.abs().amax(-1, keepdim=True).clamp_(min=_TINY)
    stirred = evened.add_(directions(w.shape[1], w.shape[2], w.device), alpha=_STIR)
    basis: Tensor = torch.linalg.qr(stirred.transpose(1, 2)).Q
    return basis.transpose(1, 2).contiguous()


@lru_cache(maxsize=64)
def directions(count: int, size: int, device: torch.device) -> Tensor:
    """Random directions `[count, size]`, the same in every process; not to be changed."""
    return torch.randn(count, size, generator=torch.Generator().manual_seed(0)).to(device)

"""topk: the largest values of each sample and where they are; zeros come in the place of all others.

Source of the feedback: Stich, Cordonnier and Jaggi, Sparsified SGD with Memory, https://arxiv.org/abs/1809.07599.
"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch

from wire.codecs import compiled, positions
from wire.codecs.base import Call, Codec, Facts, NonFiniteTensor, Packed, Part, PartType, Role
from wire.codecs.layout import TensorType, flat, padded
from wire.codecs.options import ArgumentError, split_options
from wire.codecs.registry import register
from wire.errors import CorruptPayload

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

_TAKES = (torch.float32, torch.float16, torch.bfloat16)
_FRACTION = re.compile(r"([0-9]{0,3}\.?[0-9]{1,12})(e-[0-9]{1,2})?")


@register
class TopK(Codec):
    """A fraction of each sample's elements, those of largest magnitude, as they are; of equal ones, the first.

    With feedback, what is left out is added to the stream's next tensor before its largest are chosen, sample
    by sample: in the long run nothing is lost. That memory starts over when the samples' shape changes.

    Args:
        args: the fraction, above 0 and below 1; then perhaps ``,feedback``.
        role: what the stream carries.
    """

    name = "topk"
    kind: ClassVar[Literal["lossless", "lossy"]] = "lossy"
    examples: ClassVar[tuple[str, ...]] = ("0.05", "0.3,feedback", "0.001")

    def __init__(self, args: str, role: Role) -> None:
        super().__init__("", role)
        options = list(split_options(args))
        first = options[0][0] if options else ""
        if not _FRACTION.fullmatch(first) or not 0 < float(first) < 1:
            raise ArgumentError(f"{self.name} takes the fraction to keep, such as {self.name}:0.1", 0)
        for option, position in options[1:]:
            if option != "feedback":
                raise ArgumentError(f"{option!r} is no argument of {self.name}; feedback is one", position)
        self._fraction = float(first)
        self._feedback = len(options) > 1
        self._left: Tensor | None = None
        self._sample: tuple[tuple[int, ...], str] = ((), "C")

    def encode(self, x: Tensor, call: Call) -> Packed | None:
        """Two parts, the values `[samples, kept]` and their positions; meta says how those are written."""
        whole = TensorType.of(x)
        if x.dtype not in _TAKES or x.numel() == 0:
            return None
        samples, keep = self._counts(whole)
        line = self._with_left(x, whole).view(-1) if self._feedback else flat(x)
        found = _largest(line.float(), samples, samples * keep)
        if found is None:
            if self._feedback and bool(x.isfinite().all()):
                return None
            raise NonFiniteTensor(self.name)
        layout, index = positions.write(found, x.numel())
        if padded(layout.size) + padded(found.numel() * x.dtype.itemsize) >= padded(whole.nbytes):
            return None
        values = line[found]
        if self._feedback:
            top = torch.finfo(x.dtype).max
            kept = values.clamp(-top, top).to(x.dtype)
            line[found] = values - kept.float()
            self._keep_left(line.view(samples, -1), whole)
            values = kept
        parts = Part(values.view(samples, keep), follow=True), Part(index, follow=True)
        return Packed(parts, layout.meta())

    def part_types(self, whole: TensorType, meta: Mapping[str, Any], facts: Facts) -> tuple[PartType, ...]:
        """The values, `[samples, kept]`, and uint8, of the size that the meta values come to."""
        if whole.dtype not in _TAKES or whole.numel == 0:
            raise CorruptPayload(f"{self.name} never takes a tensor of {whole.dtype}, {list(whole.shape)}")
        samples, keep = self._counts(whole)
        layout = positions.Layout.parse(meta, whole.numel, samples * keep)
        return (
            PartType(TensorType(whole.dtype, (samples, keep)), follow=True),
            PartType(TensorType(torch.uint8, (layout.size,)), follow=True),
        )

    def decode(
        self, parts: Sequence[Tensor], whole: TensorType, meta: Mapping[str, Any], facts: Facts
    ) -> Tensor:
        """The values in their places, zeros in all others."""
        values, index = parts
        samples, keep = values.shape
        layout = positions.Layout.parse(meta, whole.numel, values.numel())
        found = positions.read(index, layout, values.numel())
        ends = found.view(samples, keep)[:, (0, -1)].div(whole.numel // samples, rounding_mode="floor")
        if not torch.equal(ends, torch.arange(samples, device=found.device)[:, None].expand_as(ends)):
            raise CorruptPayload(
                f"a tensor encoded with {self.name} does not have {keep} values in each sample"
            )
        x = torch.zeros(whole.numel, dtype=whole.dtype, device=values.device)
        x[found] = values.reshape(-1)
        return whole.shaped(x)

    def error_bound(self, x: Tensor) -> Tensor:
        """The least magnitude that is kept in the sample; with feedback, what is added to the element besides."""
        if x.numel() == 0:
            return torch.zeros((), dtype=torch.float64)
        whole = TensorType.of(x)
        samples, keep = self._counts(whole)
        own = flat(x).float().view(samples, -1)
        line = self._with_left(x, whole) if self._feedback else own
        bound = line.abs().topk(keep, 1).values[:, -1:].double() + (line - own).abs()
        if self._feedback:
            bound += line.abs() * torch.finfo(x.dtype).eps
        return whole.shaped(bound.expand_as(line).reshape(-1))

    def state_dict(self) -> dict[str, Any]:
        """What was left out so far, float32 `[samples, size]`, and the shape and order of a sample."""
        if self._left is None:
            return {}
        shape, order = self._sample
        return {"left": self._left, "shape": list(shape), "order": order}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes back to a state that `state_dict` returned."""
        if not state:
            self._left, self._sample = None, ((), "C")
            return
        if not self._feedback:
            super().load_state_dict(state)
        if state.keys() != {"left", "shape", "order"}:
            raise ValueError(f"{self.name} keeps what was left out, and {sorted(state)} was given")
        left, shape, order = state["left"], tuple(state["shape"]), state["order"]
        if left.dtype != torch.float32 or left.dim() != 2 or left.shape[1] != math.prod(shape):
            raise ValueError(f"{self.name} cannot have left {list(left.shape)} of samples of {list(shape)}")
        self._left, self._sample = left, (shape, order)

    def _counts(self, whole: TensorType) -> tuple[int, int]:
        """How many samples a tensor has, and how many elements of each are kept."""
        samples = whole.shape[0] if len(whole.shape) > 1 else 1
        return samples, max(1, math.ceil(whole.numel // samples * self._fraction))

    def _with_left(self, x: Tensor, whole: TensorType) -> Tensor:
        """The tensor, `[samples, size]`, in memory of its own, with what its samples had left out before."""
        samples, _ = self._counts(whole)
        line = flat(x).to(torch.float32, copy=True).view(samples, -1)
        if self._left is not None and self._sample == _sample_of(whole):
            both = min(samples, self._left.shape[0])
            line[:both] += self._left[:both].to(x.device)
        return line

    def _keep_left(self, left: Tensor, whole: TensorType) -> None:
        before = self._left
        if before is not None and self._sample == _sample_of(whole) and len(before) > len(left):
            left = torch.cat((left, before[len(left) :].to(left.device)))
        self._left, self._sample = left, _sample_of(whole)


def _sample_of(whole: TensorType) -> tuple[tuple[int, ...], str]:
    return (whole.shape[1:] if len(whole.shape) > 1 else whole.shape), whole.order


def _largest(line: Tensor, samples: int, count: int) -> Tensor | None:
    """Where in a float32 line of samples the largest magnitudes are, ascending; None with NaN or infinity."""
    kernels = compiled.kernels("_topk_kernels", line.device)
    if kernels is not None:
        found = torch.empty(count + 1, dtype=torch.int64)
        finite = kernels.select(line.numpy().view(np.int32), samples, found.numpy())
        return found[:count] if finite else None
    if not bool(line.isfinite().all()):
        return None
    sizes = line.view(samples, -1).abs()
    keep = count // samples
    least = sizes.topk(keep, 1, sorted=False).values.amin(1, keepdim=True)
    larger, equal = sizes > least, sizes == least
    chosen = larger | (equal & (equal.cumsum(1) <= keep - larger.sum(1, keepdim=True)))
    return chosen.view(-1).nonzero().view(-1)

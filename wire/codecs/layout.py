"""Tensors as bytes: which dtypes cross, in which memory order, and how leaves are aligned.

A dense tensor crosses in its own memory order. A 4-D tensor that is channels-last in memory has the
order ``NHWC``: its shape is still the logical ``[N, C, H, W]``, its bytes run channels last. All others
are ``C``, row-major.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from wire.errors import CorruptPayload

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

ALIGNMENT = 64
"""Every leaf starts at a multiple of this many bytes."""

MAX_DIMS = 8

DTYPES: dict[str, torch.dtype] = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.bool,
    )
}
"""The dtypes that can cross, by the name they have on the wire."""

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def padded(size: int) -> int:
    """`size` bytes rounded up to the next multiple of `ALIGNMENT`."""
    return -(-size // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True, slots=True)
class TensorType:
    """What a tensor is, without its values.

    Attributes:
        dtype: one of `DTYPES`.
        shape: the logical shape; a channels-last tensor's is ``[N, C, H, W]``.
        order: "C" or "NHWC".
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    order: str = "C"

    @classmethod
    def of(cls, x: Tensor) -> TensorType:
        """The type of a tensor that `dense` returned.

        Raises:
            ValueError: `x` has a dtype that does not cross, or more than `MAX_DIMS` dimensions.
        """
        if x.dtype not in _NAMES:
            raise ValueError(f"a tensor of {x.dtype} cannot cross; those that can: {', '.join(DTYPES)}")
        if x.dim() > MAX_DIMS:
            raise ValueError(f"a tensor of {x.dim()} dimensions cannot cross; {MAX_DIMS} can")
        return cls(x.dtype, tuple(x.shape), memory_order(x))

    @classmethod
    def parse(cls, fields: Mapping[str, Any], max_bytes: int) -> TensorType:
        """The type that a description from the peer declares.

        Args:
            fields: holds "dtype", "shape" and "order"; anything may be in them.
            max_bytes: the largest tensor accepted.

        Raises:
            CorruptPayload: a field is no dtype, shape or order, or the tensor is larger than `max_bytes`.
        """
        name, shape, order = fields["dtype"], fields["shape"], fields["order"]
        if not isinstance(name, str) or name not in DTYPES:
            raise CorruptPayload(f"a tensor of dtype {name!r:.40} was described; known: {', '.join(DTYPES)}")
        if not isinstance(shape, list | tuple) or len(shape) > MAX_DIMS:
            raise CorruptPayload(f"a tensor's shape must be a list of at most {MAX_DIMS} sizes")
        if not all(type(size) is int and 0 <= size <= max(max_bytes, 1) for size in shape):
            raise CorruptPayload(f"a tensor's shape {shape!r:.80} is not one of sizes up to {max_bytes}")
        if order != "C" and not (order == "NHWC" and len(shape) == 4):
            raise CorruptPayload(f"a {len(shape)}-dimensional tensor in order {order!r:.20} was described")
        described = cls(DTYPES[name], tuple(shape), order)
        # The other sizes of an empty tensor must not be absurd either: products of them become strides.
        if math.prod(max(size, 1) for size in shape) * described.dtype.itemsize > max(max_bytes, 8):
            raise CorruptPayload(
                f"a tensor of shape {list(shape)} is larger than the limit, {max_bytes} bytes"
            )
        return described

    @property
    def numel(self) -> int:
        """How many elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """How many bytes of memory, without padding."""
        return self.numel * self.dtype.itemsize

    def fields(self) -> dict[str, Any]:
        """The part of a description that `parse` reads."""
        return {"dtype": _NAMES[self.dtype], "shape": list(self.shape), "order": self.order}

    def empty(self, device: torch.device) -> Tensor:
        """A new uninitialised tensor of this type."""
        return self.shaped(torch.empty(self.numel, dtype=self.dtype, device=device))

    def shaped(self, flat: Tensor) -> Tensor:
        """A view of a flat tensor in memory order, `[numel]`, as a tensor of this type."""
        if self.order == "NHWC":
            n, c, h, w = self.shape
            return flat.view(n, h, w, c).permute(0, 3, 1, 2)
        return flat.view(self.shape)


def memory_order(x: Tensor) -> str:
    """The order of a dense tensor's memory: "C" or "NHWC".

    Where one size is 1, both can hold; then the strides decide, as they do for torch's convolutions, so that
    the tensor is treated alike on the other side.
    """
    if x.dim() != 4:
        return "C"
    _, c, h, w = x.shape
    stride = x.stride()
    if stride == (c * h * w, h * w, w, 1):
        return "C"
    if stride == (c * h * w, 1, w * c, c):
        return "NHWC"
    if x.is_contiguous() or not x.is_contiguous(memory_format=torch.channels_last):
        return "C"
    return "NHWC"


def dense(x: Tensor) -> Tensor:
    """`x` detached, and copied only if its memory has gaps or an order that does not cross."""
    x = x.detach()
    return x if memory_order(x) == "NHWC" else x.contiguous()


def flat(x: Tensor) -> Tensor:
    """A view `[numel]` of a dense tensor, in memory order."""
    if memory_order(x) == "NHWC":
        return x.permute(0, 2, 3, 1).reshape(-1)
    return x.reshape(-1)


def raw_bytes(x: Tensor) -> Tensor:
    """A view of a dense tensor's memory as uint8, `[nbytes]`."""
    return flat(x).view(torch.uint8)

"""Leaves as memory to be sent, and received memory as leaves: without a copy wherever that can be."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from wire.codecs.layout import ALIGNMENT, TensorType, padded, raw_bytes
from wire.errors import CorruptPayload

if TYPE_CHECKING:
    from torch import Tensor

_ZEROS = memoryview(bytes(ALIGNMENT))


def leaf_buffers(leaves: list[Tensor]) -> list[memoryview]:
    """The leaves' memory and padding; tensors on a GPU are copied to pinned memory, all at once."""
    hosted = []
    for leaf in map(raw_bytes, leaves):
        if leaf.is_cuda:
            pinned = torch.empty(leaf.shape, dtype=leaf.dtype, pin_memory=True)
            hosted.append(pinned.copy_(leaf, non_blocking=True))
        else:
            hosted.append(leaf)
    for leaf in leaves:
        if leaf.is_cuda:
            torch.cuda.current_stream(leaf.device).synchronize()
            break
    buffers = []
    for leaf in hosted:
        size = leaf.numel()
        if size:
            buffers.append(leaf.numpy().data)
        if padded(size) > size:
            buffers.append(_ZEROS[: padded(size) - size])
    return buffers


def load_leaf(leaf: TensorType, view: memoryview) -> Tensor:
    """A tensor whose memory is `view`, if that can be."""
    if leaf.numel == 0:
        return leaf.empty(torch.device("cpu"))
    if view.readonly:
        view = memoryview(bytearray(view))
    if leaf.dtype == torch.bool and int(torch.frombuffer(view, dtype=torch.uint8).max()) > 1:
        raise CorruptPayload("a tensor of bool holds bytes other than 0 and 1")
    return leaf.shaped(torch.frombuffer(view, dtype=leaf.dtype))

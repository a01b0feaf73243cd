"""Where a chunk enters a stage, and where its gradient comes out."""

from typing import Any

import torch
from torch import Tensor


class Entry:
    """An input of a chunk, and the gradient that comes back to it.

    A leaf's ``.grad`` would not do: torch lays it out like the leaf, and the stage before has to meet the
    gradient in the order in which the unsplit model would give it, or its operators round otherwise.

    Args:
        tensor: the input, detached.
        needs_grad: whether a gradient of it is wanted.
    """

    def __init__(self, tensor: Tensor, needs_grad: bool) -> None:
        self._tensor = tensor.requires_grad_(needs_grad)
        self._gradient: Tensor | None = None

    def enter(self) -> Tensor:
        """Return the tensor as the partition takes it; call once, with gradients enabled."""
        if not self._tensor.requires_grad:
            return self._tensor
        entered: Tensor = _Enter.apply(self._tensor, self)  # type: ignore[no-untyped-call]
        return entered

    def gradient(self) -> Tensor | None:
        """Return the gradient, None for an input that needs none; zeros where its path to the loss is cut."""
        if not self._tensor.requires_grad:
            return None
        return torch.zeros_like(self._tensor) if self._gradient is None else self._gradient

    def keep(self, gradient: Tensor) -> None:
        """Take the gradient; called by the backward pass."""
        self._gradient = gradient


class _Enter(torch.autograd.Function):
    """The identity; its backward gives the gradient to the entry instead of to the leaf."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, entry: Entry) -> Tensor:
        ctx.entry = entry
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None]:
        ctx.entry.keep(gradients[0])
        return None, None

"""Linear layers whose narrow side loses rows or columns while they train, and their optimizer's memory with them.

    committed steps   0 ......... steps ......... 2·steps ......... iterations·steps ........
    width             full        int(full·rate)  int(int(full·rate)·rate)  the last one

The width is a pure function of the number of committed steps, so both sides of a cut agree without a message,
and a layer's state holds that number: whatever loads it goes on in the right width.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

LAST = (1 << 63) - 1
"""A number of steps after which nothing narrows any more."""


@dataclass(frozen=True, kw_only=True)
class Decay:
    """When and how far a width falls.

    Attributes:
        rate: of each width to the one before.
        steps: committed steps from one narrowing to the next.
        iterations: how many narrowings there are.
    """

    rate: float
    steps: int
    iterations: int

    def width(self, full: int, committed: int) -> int:
        """Return the width after so many committed steps, of a side that was `full` wide."""
        return self._narrowed(full, min(committed // self.steps, self.iterations))

    def next_width(self, full: int, committed: int) -> int:
        """Return the width after the next narrowing; the present one where none is left."""
        return self._narrowed(full, min(committed // self.steps + 1, self.iterations))

    def _narrowed(self, width: int, times: int) -> int:
        for _ in range(min(times, width)):  # one at least goes each time, unless none ever does
            width = int(width * self.rate)
        return width


class Narrowing(nn.Module):
    """A square linear layer, at first the identity, that one side of narrows: ``y = W x + b`` along one axis.

    Args:
        full: width of the axis.
        decay: how it falls.
        l1: weight of the penalty on what goes next.
        encodes: whether the outputs narrow (an encoder) or the inputs (a decoder).
        along_sequence: whether the axis is S of ``[B, S, H]``, else it is H.
    """

    def __init__(self, full: int, decay: Decay, l1: float, *, encodes: bool, along_sequence: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(full))
        self.bias = nn.Parameter(torch.zeros(full))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self._full, self._decay, self._l1 = full, decay, l1
        self._narrows = 0 if encodes else 1
        self.along_sequence = along_sequence
        # Beside the buffer, so that nobody waits for a GPU to know it.
        self._committed = 0

    @property
    def committed(self) -> int:
        """Committed steps that the layer has seen."""
        return self._committed

    @property
    def width(self) -> int:
        """Of the narrow side."""
        return self.weight.shape[self._narrows]

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer along its axis; the result is contiguous, as it is when it has crossed a cut."""
        return self._apply_weight(x, self.weight, self.bias)

    def forward_as_after(self, x: Tensor, committed: int) -> Tensor:
        """Apply the layer as it will be in width, its weights as they are."""
        width = self._decay.width(self._full, committed)
        bias = self.bias if self._narrows else self.bias[:width]
        return self._apply_weight(x, self.weight.narrow(self._narrows, 0, width), bias)

    def _apply_weight(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        if not self.along_sequence:
            return functional.linear(x, weight, bias)
        return torch.bmm(weight.expand(len(x), -1, -1), x) + bias[:, None]

    def penalize(self) -> None:
        """Add the gradient of the L1 norm of what goes at the next narrowing: l1 times the sign of each weight."""
        grad = self.weight.grad
        kept = self._decay.next_width(self._full, self._committed)
        going = self.width - kept
        if self._l1 and going and grad is not None:
            signs = self.weight.detach().narrow(self._narrows, kept, going).sign()
            grad.narrow(self._narrows, kept, going).add_(signs, alpha=self._l1)

    def set_committed(self, committed: int, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Take the width that belongs to a number of committed steps.

        The parameters stay the same objects, which an optimizer knows them by. Call with no graph alive.

        Args:
            committed: steps.
            optimizer: whose memory of the parameters narrows with them.
        """
        self._committed = committed
        self.get_buffer("steps").fill_(committed)
        width = self._decay.width(self._full, committed)
        if width == self.width:
            return
        self._resize(self.weight, self._narrows, width, optimizer)
        if self._narrows == 0:
            self._resize(self.bias, 0, width, optimizer)

    def _resize(
        self, parameter: nn.Parameter, dim: int, width: int, optimizer: torch.optim.Optimizer | None
    ) -> None:
        shape = parameter.shape
        parameter.grad = None
        parameter.data = _resized(parameter.data, dim, width)
        memory = {} if optimizer is None else optimizer.state.get(parameter, {})
        for key, value in memory.items():
            if isinstance(value, Tensor) and value.shape == shape:
                memory[key] = _resized(value, dim, width)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        given = state_dict.get(f"{prefix}steps")
        if isinstance(given, Tensor) and given.dim() == 0 and not given.is_meta:
            self.set_committed(int(given))
        super()._load_from_state_dict(state_dict, prefix, *rest)


def _resized(tensor: Tensor, dim: int, width: int) -> Tensor:
    # Cloned, for a view would keep the memory of the whole.
    if width <= tensor.shape[dim]:
        return tensor.narrow(dim, 0, width).clone()
    # Wider again only where another state is about to be loaded.
    shape = list(tensor.shape)
    shape[dim] = width
    return tensor.new_zeros(shape)


def narrowing_layers(*modules: nn.Module) -> Iterator[Narrowing]:
    """Yield the narrowing layers in some modules."""
    for module in modules:
        yield from (layer for layer in module.modules() if isinstance(layer, Narrowing))


def committed_steps(*modules: nn.Module) -> int:
    """Return how many committed steps some modules' narrowing layers have seen; 0 where there are none."""
    return max((layer.committed for layer in narrowing_layers(*modules)), default=0)


def narrow_to(committed: int, *modules: nn.Module) -> None:
    """Bring the narrowing layers in some modules to the width after so many committed steps."""
    for layer in narrowing_layers(*modules):
        layer.set_committed(committed)


def penalize(layers: Iterable[Narrowing]) -> None:
    """Add to the gradients of a step what the layers' penalties ask for."""
    for layer in layers:
        layer.penalize()


def count_step(layers: Iterable[Narrowing], optimizer: torch.optim.Optimizer) -> None:
    """Count a step that was just applied, and narrow where it was the last one at a width."""
    with torch.no_grad():
        for layer in layers:
            layer.set_committed(layer.committed + 1, optimizer)

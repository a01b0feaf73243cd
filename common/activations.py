"""Activations that need no copy of what they change in place.

torch keeps an activation's input for the backward pass. One that works in place (`nn.ReLU6(inplace=True)`) no longer
has it, so torch copies the whole map first: in MobileNetV2 4 % of a step's time and 30 % of what a chunk keeps. Two
ways around that give the same values to the bit:

- ReLU6 and Hardtanh let a gradient through where their *result* is between the bounds, and the result is kept anyway
  by the convolution that comes next.
- Others (SiLU, Hardswish, ...) work out of place: they keep the input itself in place of its copy.
"""

from typing import Any, Final

import torch
from torch import Tensor, fx, nn
from torch.autograd.function import once_differentiable

from common.dataflow import Flow, work_out_of_place

__all__ = ["Bounded", "spare_copies"]

# Those whose gradient needs the input; of the others (ReLU, LeakyReLU, ELU, ...) torch keeps the result.
_NEED_INPUT: Final = (nn.SiLU, nn.Hardswish, nn.Hardsigmoid, nn.Mish, nn.Threshold)


class Bounded(nn.Module):
    """`nn.Hardtanh`, and `nn.ReLU6`, that keeps its result for the backward pass and not its input.

    Args:
        low: least value of the result.
        high: largest value of the result.
        inplace: write the result over the input.
        own_gradient: write the input's gradient over the result's, which nobody else may be looking at then.
    """

    def __init__(self, low: float, high: float, *, inplace: bool, own_gradient: bool) -> None:
        super().__init__()
        self.low, self.high = low, high
        self.inplace, self.own_gradient = inplace, own_gradient

    def forward(self, tensor: Tensor) -> Tensor:
        """Return the input between the bounds."""
        if not (torch.is_grad_enabled() and tensor.requires_grad):
            return nn.functional.hardtanh(tensor, self.low, self.high, inplace=self.inplace)
        bounded: Tensor = _Bound.apply(tensor, self)  # type: ignore[no-untyped-call]
        return bounded

    def extra_repr(self) -> str:
        """Print the arguments."""
        return f"{self.low}, {self.high}, inplace={self.inplace}, own_gradient={self.own_gradient}"


class _Bound(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, module: Bounded) -> Tensor:
        ctx.module = module
        result = nn.functional.hardtanh(tensor, module.low, module.high, inplace=module.inplace)
        if module.inplace:
            ctx.mark_dirty(tensor)
        ctx.save_for_backward(result)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (result,) = ctx.saved_tensors
        low, high = ctx.module.low, ctx.module.high
        # It is 0 where the input was at or beyond a bound, and there the result is the bound.
        backward = torch.ops.aten.hardtanh_backward
        if ctx.module.own_gradient and _laid_out_alike(gradient, result):
            return backward.grad_input(gradient, result, low, high, grad_input=gradient), None
        return backward(gradient, result, low, high), None


def _laid_out_alike(gradient: Tensor, result: Tensor) -> bool:
    """Whether torch's own would lay out the input's gradient as the result's is; operators before go by that."""
    clear = gradient.is_contiguous() != gradient.is_contiguous(memory_format=torch.channels_last)
    return clear and gradient.stride() == result.stride()


def spare_copies(flow: Flow) -> None:
    """Make the activations of a traced model that would copy their input do without."""
    for node in flow.traced.graph.nodes:
        module = flow.module_of(node)
        if isinstance(module, nn.Hardtanh) and type(module) in (nn.Hardtanh, nn.ReLU6):
            own = _gradient_is_its_own(flow, node)
            # Named by what it is: calls of one module that need the same may share it, in either mode.
            node.target = f"{node.target}__keeps_result" + "_owns_gradient" * own
            flow.copies[node.target] = Bounded(
                module.min_val, module.max_val, inplace=module.inplace, own_gradient=own
            )
        elif isinstance(module, _NEED_INPUT) and module.inplace and _only_it_sees_its_input(flow, node):
            work_out_of_place(flow, node)


def _gradient_is_its_own(flow: Flow, node: fx.Node) -> bool:
    """Whether the gradient of a node's result comes from a convolution alone, which has just made it."""
    if len(node.users) != 1:
        return False
    (user,) = node.users
    module = flow.module_of(user)
    return (
        type(module) is nn.Conv2d
        and module.padding_mode == "zeros"
        and not isinstance(module.padding, str)
        and flow.part_of(user) == flow.part_of(node)
    )


def _only_it_sees_its_input(flow: Flow, node: fx.Node) -> bool:
    """Whether nothing else looks at the memory that a node changes in place, but for what looks at its result."""
    (source,) = node.all_input_nodes
    storages = flow.found.storages
    memory = storages[source.name]
    return list(source.users) == [node] and not any(
        storages.get(other.name, frozenset()) & memory
        for other in flow.traced.graph.nodes
        if other < node and other is not source
    )

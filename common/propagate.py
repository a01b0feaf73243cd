"""What a traced model computes, found without computing it: shapes, gradients, and who changes what in place.

The graph runs on the meta device, where tensors have shapes, dtypes, version counters and storages but no
data, twice, with another batch and another number of tokens. What differs between the two follows the one or
the other; what is equal does not.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from common.errors import UserError
from common.graph import Traced, mode

BATCHES = (2, 3)
TOKENS = (5, 7)


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """A tensor that goes into a model or crosses a cut.

    Attributes:
        name: of the operation that makes it, or of the model's input.
        shape: of one sample, without the batch dimension.
        dtype: element type.
        requires_grad: whether a gradient comes back for it.
        rows: entries along dimension 0 for each sample: 1 but for windowed attention, 0 for a tensor that has
            no batch dimension.
        token_dims: the dimensions of `shape` that follow the number of tokens; there it has the largest.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    requires_grad: bool = False
    rows: int = 1
    token_dims: tuple[int, ...] = ()

    def batched(self, batch: int, tokens: int | None = None) -> tuple[int, ...]:
        """Return the whole shape for a batch of that many samples, of so many tokens or the most."""
        shape = list(self.shape)
        if tokens is not None:
            for dim in self.token_dims:
                shape[dim] = tokens
        return (self.rows * batch, *shape) if self.rows else tuple(shape)

    def tokens(self, shape: Sequence[int]) -> int | None:
        """Return how many tokens a tensor of that whole shape has; None where their number is fixed."""
        if not self.token_dims or len(shape) != len(self.shape) + (self.rows > 0):
            return None
        return shape[self.token_dims[0] + (self.rows > 0)]

    def dense_bytes(self, batch: int) -> int:
        """Return the bytes of the tensor for that many samples."""
        return torch.Size(self.batched(batch)).numel() * self.dtype.itemsize


@dataclass
class Propagated:
    """What every node yields, by the node's name in the graph.

    Attributes:
        values: the value for each of `BATCHES` and `TOKENS`; tensors are on the meta device.
        most_tokens: of the inputs; None where their number is fixed.
        storages: identities of the storages that a node's tensors lie in; equal ones alias.
        changes: for a node that changes an argument in place, the names of the changed argument nodes.
    """

    values: dict[str, list[Any]] = field(default_factory=dict)
    storages: dict[str, frozenset[int]] = field(default_factory=dict)
    changes: dict[str, list[str]] = field(default_factory=dict)
    most_tokens: int | None = None

    def describe(self, node: str, name: str) -> TensorInfo | None:
        """Describe what a node yields.

        Args:
            node: its name in the graph.
            name: for the description.

        Returns:
            None for what is no tensor, or has its batch dimension elsewhere than first.
        """
        values = self.values.get(node, [None])
        if not all(isinstance(value, Tensor) for value in values):
            return None
        first, second = values
        if first.dim() != second.dim():
            return None
        sizes = list(zip(first.shape, second.shape, strict=True))
        rows = 0
        if sizes and sizes[0][0] != sizes[0][1] and sizes[0] != TOKENS:
            rows = sizes.pop(0)[0] // BATCHES[0]
        varying = [dim for dim, pair in enumerate(sizes) if pair[0] != pair[1]]
        follows_batch = not rows or (first.shape[0], second.shape[0]) == tuple(rows * b for b in BATCHES)
        if not follows_batch or any(sizes[dim] != TOKENS or self.most_tokens is None for dim in varying):
            return None
        shape = [(self.most_tokens or 0) if dim in varying else pair[0] for dim, pair in enumerate(sizes)]
        return TensorInfo(
            name=name,
            shape=tuple(shape),
            dtype=first.dtype,
            requires_grad=first.requires_grad,
            rows=rows,
            token_dims=tuple(varying),
        )


class _Recorder(fx.Interpreter):
    def __init__(self, model: nn.Module, graph: fx.Graph, found: Propagated) -> None:
        super().__init__(model, garbage_collect_values=False, graph=graph)
        self.found = found

    def run_node(self, n: fx.Node) -> Any:
        before = {arg: _versions(self.env[arg]) for arg in n.all_input_nodes}
        value = super().run_node(n)
        changed = [arg.name for arg, versions in before.items() if _versions(self.env[arg]) != versions]
        if changed and n.op != "output":
            self.found.changes[n.name] = changed
        self.found.values.setdefault(n.name, []).append(value)
        self.found.storages[n.name] = frozenset(t.untyped_storage()._cdata for t in tensors_in(value))
        return value

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        module = self.fetch_attr(target)
        if not isinstance(module, nn.modules.batchnorm._BatchNorm):
            return super().call_module(target, args, kwargs)
        # Torch describes a normalization by dozens of small operations, most of the time of a whole run. This
        # yields the same: a fresh tensor of the input's shape, with a gradient where input or weight has one.
        module._check_input_dim(args[0])
        return args[0].clone() if module.weight is None else args[0] + module.weight.sum()


def tensors_in(value: Any) -> list[Tensor]:
    """Return the tensors in a value: itself, or those in a tuple, list or dict."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [t for item in value for t in tensors_in(item)] if isinstance(value, tuple | list) else []


def _versions(value: Any) -> list[int]:
    return [t._version for t in tensors_in(value)]


def meta_copy(model: nn.Module) -> nn.Module:
    """Copy a model's structure, with parameters and buffers that have no data and take no memory."""
    memo: dict[int, Any] = {}
    # Tensors made of constants in the model's code are plain attributes.
    plain = (
        value for module in model.modules() for value in vars(module).values() if isinstance(value, Tensor)
    )
    for tensor in (*model.parameters(), *model.buffers(), *plain):
        meta = torch.empty_like(tensor, device="meta")
        memo[id(tensor)] = (
            nn.Parameter(meta, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else meta
        )
    return copy.deepcopy(model, memo)


def propagate(model: nn.Module, traced: Traced, inputs: Sequence[TensorInfo], training: bool) -> Propagated:
    """Run a traced model on the meta device.

    Args:
        model: the traced one; it stays as it is.
        traced: its graph.
        inputs: the model's inputs.
        training: the mode to run in.

    Raises:
        UserError: the model does not take these inputs.
    """
    found = Propagated(most_tokens=next((i.tokens(i.batched(1)) for i in inputs if i.token_dims), None))
    structure = meta_copy(model)
    try:
        with mode(structure, training), torch.enable_grad(), torch.device("meta"):
            for batch, tokens in zip(BATCHES, TOKENS, strict=True):
                samples = [torch.empty(info.batched(batch, tokens), dtype=info.dtype) for info in inputs]
                _Recorder(structure, traced.graph, found).run(*samples)
    except (RuntimeError, ValueError, AssertionError, TypeError, IndexError) as error:
        shapes = ", ".join(str(info.shape) for info in inputs)
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"{type(model).__name__} does not run on inputs of shape {shapes}: {reason}"
        ) from error
    return found

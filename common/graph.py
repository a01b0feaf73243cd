"""A model as a graph of named operations, traced by torch.fx as torchvision's feature extraction does.

A node's name is the path of its module (``features.0.1``), or that of the module whose forward it is part of
and the operation's own (``layer1.0.add``). Both name cut points.
"""

import difflib
import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from common.errors import UserError
from common.vision import feature_extraction, ops

# torchvision.ops whose forward cannot be traced (they draw random numbers or look at values). Containers and
# squeeze excitation can, and are, so that a cut may go between a convolution and its activation.
_LEAVES = tuple(
    member
    for member in vars(ops).values()
    if isinstance(member, type)
    and issubclass(member, nn.Module)
    and not issubclass(member, nn.Sequential | ops.SqueezeExcitation)
)


@dataclass(frozen=True)
class Traced:
    """A traced model.

    Attributes:
        graph: operations in the order in which they run.
        names: the full name of each node, by the node's name in the graph.
    """

    graph: fx.Graph
    names: dict[str, str]

    def operations(self) -> list[fx.Node]:
        """Return the nodes that compute something, in order."""
        return [node for node in self.graph.nodes if node.op.startswith("call_")]


TRACING = threading.Lock()
"""Held while a model is traced: torch then answers the calls of all modules of the process."""


class _Tracer(feature_extraction.NodePathTracer):  # type: ignore[misc,name-defined]
    """A tracer that leaves modules alone which other threads, other sessions perhaps, call meanwhile."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._thread = threading.get_ident()

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)


@contextmanager
def mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Hold a model in training or evaluation mode, then set every module back to what it was."""
    before = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, was in before:
            module.training = was


def trace(model: nn.Module, training: bool) -> Traced:
    """Trace a model in one mode; the model itself stays as it is.

    Raises:
        UserError: its forward depends on values, or changes a buffer, which tracing cannot follow.
    """
    before = _buffers(model)
    tracer = _Tracer(autowrap_modules=(math, ops), leaf_modules=_LEAVES)
    try:
        with TRACING, mode(model, training):
            graph = tracer.trace(model)
    except Exception as error:
        # Whatever the model's own code raises when it is given symbolic values.
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"{type(model).__name__} cannot be traced by torch.fx, and so not split: {reason}"
        ) from error
    for name, (buffer, version) in _buffers(model).items():
        if name not in before or before[name][0] is not buffer or before[name][1] != version:
            raise UserError(
                f"the forward of {type(model).__name__} changes its buffer {name}, which torch.fx does not see; "
                "leave that to a module of torch.nn, such as a normalization"
            )
    names = {node.name: name for node, name in tracer.node_to_qualname.items()}
    return Traced(graph, {node.name: names.get(node.name, node.name) for node in graph.nodes})


def _buffers(model: nn.Module) -> dict[str, tuple[Tensor, int]]:
    """Return each buffer with its count of changes; code that runs on a buffer alone runs while tracing."""
    return {name: (buffer, buffer._version) for name, buffer in model.named_buffers(remove_duplicate=False)}


def trace_modes(model: nn.Module) -> dict[bool, Traced]:
    """Trace a model for training (True) and evaluation (False): one object where they do not differ."""
    training, evaluation = trace(model, True), trace(model, False)
    if _signature(training.graph) == _signature(evaluation.graph):
        evaluation = training
    return {True: training, False: evaluation}


def _signature(graph: fx.Graph) -> list[tuple[str, str, str, str]]:
    return [(node.name, repr(node.target), repr(node.args), repr(node.kwargs)) for node in graph.nodes]


def find_cut(traced: Traced, cut: str) -> int:
    """Return the position, among the traced operations, of the last one before a cut.

    Args:
        traced: the model.
        cut: the name of an operation, or of a module: the cut is right after it.

    Raises:
        UserError: there is no such operation or module; names the nearest ones.
    """
    names = [traced.names[node.name] for node in traced.operations()]
    if cut in names:
        return names.index(cut)
    inside = [index for index, name in enumerate(names) if name.startswith(f"{cut}.")]
    if cut and inside:
        return inside[-1]
    close = (
        difflib.get_close_matches(cut, cut_names(traced), n=4, cutoff=0.4)
        or names[:: max(1, len(names) // 4)][:4]
    )
    raise UserError(f"unknown cut {cut!r}; the nearest of {len(cut_names(traced))} are {', '.join(close)}")


def cut_names(traced: Traced) -> list[str]:
    """Return every name that a cut may have, modules before what is in them."""
    found: dict[str, None] = {}
    for node in traced.operations():
        atoms = traced.names[node.name].split(".")
        found.update(dict.fromkeys(".".join(atoms[:depth]) for depth in range(1, len(atoms) + 1)))
    return list(found)

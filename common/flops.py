"""How much a model computes: multiply-accumulates (MACs) counted by torch itself, on tensors without data.

What counts is what costs: convolutions, linear layers, matrix products and attention, a MAC for each
multiplication with an addition, and 2 an element for a BatchNorm. Biases, activations, pooling and other
normalizations are not counted. fvcore counts the same way, but for the pooling.

A transposed convolution multiplies each value of its *input* by the whole kernel. Published figures of split
models count each value of its *output* instead, which is too much by the square of the stride; `Counting`
tells the two apart.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils.flop_counter import FlopCounterMode

from common.graph import Traced, mode
from common.partition import Split
from common.propagate import TensorInfo, meta_copy, tensors_in

__all__ = ["Counting", "Operation", "PartCost", "count_parts", "profile"]

_FLOPS_OF_A_MAC = 2
_BATCH_NORM_MACS = 2


class Counting(Enum):
    """How a transposed convolution counts: what it computes, or as in published figures."""

    TRUE = "true"
    PUBLISHED = "published"


@dataclass(frozen=True, kw_only=True)
class PartCost:
    """What one partition costs.

    Attributes:
        name: of the partition.
        macs: multiply-accumulates of one forward in evaluation mode.
        params: trainable values that it holds.
    """

    name: str
    macs: int
    params: int


@dataclass(frozen=True, kw_only=True)
class Operation:
    """One operation of a model, and what a cut right after it would mean.

    Attributes:
        name: as a cut point is named.
        macs: multiply-accumulates of the operation.
        crossing_bytes: of the tensors made up to here and used behind it.
    """

    name: str
    macs: int
    crossing_bytes: int


def count_parts(parts: Split, batch: int, counting: Counting = Counting.TRUE) -> list[PartCost]:
    """Count what the partitions of a model compute for one batch.

    Args:
        parts: with bottlenecks, if any, in place. Their memory is given up; names and shapes remain.
        batch: samples.
        counting: of transposed convolutions.

    Returns:
        The costs of front, middle and back.
    """
    for part in parts.partitions.values():
        part.free()
    macs: dict[str, int] = {}

    def run(name: str, *inputs: Tensor) -> tuple[Tensor, ...]:
        part = parts.partitions[name]
        with mode(part, training=False), _counter(counting) as counter:
            outputs = part(*inputs)
        macs[name] = _macs(counter)
        assert isinstance(outputs, tuple)
        return outputs

    with torch.no_grad(), torch.device("meta"):
        front = run("front", *_samples(parts.inputs, batch))
        middle = run("middle", *front[: len(parts.cut1)])
        run("back", *parts.back_inputs(middle, front))
    return [
        PartCost(name=name, macs=macs[name], params=sum(p.numel() for p in part.parameters()))
        for name, part in parts.partitions.items()
    ]


def profile(
    model: nn.Module,
    traced: Traced,
    inputs: Sequence[TensorInfo],
    batch: int,
    counting: Counting = Counting.TRUE,
) -> list[Operation]:
    """Count what every operation of a model computes for one batch, and what a cut behind it would carry.

    Args:
        model: the traced one; it stays as it is.
        traced: its graph in evaluation mode.
        inputs: the model's inputs.
        batch: samples.
        counting: of transposed convolutions.

    Returns:
        The operations in the order in which they run.
    """
    structure = meta_copy(model)
    with (
        torch.no_grad(),
        torch.device("meta"),
        mode(structure, training=False),
        _counter(counting) as counter,
    ):
        recorder = _Recorder(structure, traced.graph, counter)
        recorder.run(*_samples(inputs, batch))
    crossing = dict(_crossing_bytes(traced.graph, recorder.values))
    return [
        Operation(
            name=traced.names[node.name], macs=recorder.macs[node.name], crossing_bytes=crossing[node.name]
        )
        for node in traced.operations()
    ]


class _Recorder(fx.Interpreter):
    """Runs a graph and keeps, by node, the MACs and the tensors."""

    def __init__(self, model: nn.Module, graph: fx.Graph, counter: FlopCounterMode) -> None:
        super().__init__(model, garbage_collect_values=False, graph=graph)
        self.counter = counter
        self.macs: dict[str, int] = {}
        self.values: dict[str, list[Tensor]] = {}

    def run_node(self, n: fx.Node) -> Any:
        before = _macs(self.counter)
        value = super().run_node(n)
        self.macs[n.name] = _macs(self.counter) - before
        self.values[n.name] = tensors_in(value)
        return value


def _crossing_bytes(graph: fx.Graph, values: Mapping[str, list[Tensor]]) -> Iterator[tuple[str, int]]:
    """Yield for each node the bytes that are still needed after it and come from the model's inputs."""
    position = {node: index for index, node in enumerate(graph.nodes)}
    following: set[fx.Node] = set()
    live: list[fx.Node] = []
    for node in graph.nodes:
        if node.op == "placeholder" or following.intersection(node.all_input_nodes):
            following.add(node)
            live.append(node)
        live = [made for made in live if any(position[user] > position[node] for user in made.users)]
        # An element of a tuple, and what an operation changed in place, are the same tensor twice.
        needed = {id(tensor): tensor.nbytes for made in live for tensor in values[made.name]}
        yield node.name, sum(needed.values())


def _samples(infos: Sequence[TensorInfo], batch: int) -> list[Tensor]:
    return [torch.empty(info.batched(batch), dtype=info.dtype, device="meta") for info in infos]


def _counter(counting: Counting) -> FlopCounterMode:
    aten = torch.ops.aten
    mapping: dict[Any, Callable[..., int]] = dict.fromkeys(
        (
            aten.native_batch_norm,
            aten.cudnn_batch_norm,
            aten.miopen_batch_norm,
            aten._native_batch_norm_legit,
            aten._native_batch_norm_legit_no_training,
        ),
        _batch_norm_flop,
    )
    if counting is Counting.PUBLISHED:
        mapping[aten.convolution] = _published_conv_flop
    return FlopCounterMode(display=False, custom_mapping=mapping)


def _macs(counter: FlopCounterMode) -> int:
    return int(counter.get_total_flops()) // _FLOPS_OF_A_MAC


def _batch_norm_flop(x_shape: Sequence[int], *_: Any, **__: Any) -> int:
    return _FLOPS_OF_A_MAC * _BATCH_NORM_MACS * math.prod(x_shape)


def _published_conv_flop(
    x_shape: Sequence[int],
    w_shape: Sequence[int],
    bias: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    output_padding: Any,
    groups: int,
    *,
    out_shape: Sequence[int],
) -> int:
    """Each value of the output, times the kernel over the input channels that it comes from."""
    channels = w_shape[0] // groups if transposed else w_shape[1]
    return _FLOPS_OF_A_MAC * math.prod(out_shape) * channels * math.prod(w_shape[2:])

"""A model split in three by two cut points.

    front ──cut 1──▶ middle ──cut 2──▶ back
      └────────── kept ─────────────────┘      stays on the edge

`split` traces the model with torch.fx, or torch.export where the number of tokens varies, splits the graph
with torch's own pass and puts each part back over the original module tree: a partition's state dict has the
model's own names, the three together have all of them, and running the three in turn computes bitwise what
the model does.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from torch import Tensor, fx, nn

from common.crossing import Crossing, cut_in_three
from common.errors import UserError
from common.exported import export_modes
from common.fx_sources import forget_old_sources
from common.graph import trace_modes
from common.inputs import image_input, text_input
from common.presets import preset_cuts
from common.propagate import TensorInfo

__all__ = [
    "PARTS",
    "Partition",
    "ShapeAfter",
    "Split",
    "image_input",
    "preset_cuts",
    "split",
    "text_input",
]

PARTS = ("front", "middle", "back")

ShapeAfter: TypeAlias = Callable[[int], tuple[int, ...]]
"""A sample's shape where it crosses, from the number of committed steps."""


class Partition(nn.Module):
    """One third of a model, over the model's own parameters, buffers and submodules, under their own names.

    Args:
        root: the model; its parameters are shared, not copied.
        graphs: what to run in training (True) and in evaluation (False).
        input_names: of the tensors that `forward` takes.
        output_names: of the tensors that `forward` returns.
        copies: modules to use in place of the model's own.
    """

    def __init__(
        self,
        root: nn.Module,
        graphs: Mapping[bool, fx.Graph],
        input_names: Sequence[str],
        output_names: Sequence[str],
        copies: Mapping[str, nn.Module],
    ) -> None:
        super().__init__()
        self.input_names = tuple(input_names)
        self.output_names = tuple(output_names)
        self.graphs = dict(graphs)
        self.encoders: dict[int, str] = {}
        self.decoders: dict[int, str] = {}
        for graph in graphs.values():
            for node in graph.nodes:
                if node.op in ("call_module", "get_attr"):
                    _adopt(self, root, str(node.target), copies)
        # The class of a GraphModule holds the graph's code as a function of self, here the partition itself,
        # so that moving or loading the partition's tensors is seen in both modes.
        self._code: dict[bool, Callable[..., tuple[Tensor, ...]]] = {
            training: type(fx.GraphModule(self, graph)).forward for training, graph in self.graphs.items()
        }
        for graph in self.graphs.values():
            # The GraphModule would keep its own references to the tensors.
            graph.owning_module = None
        self.train(root.training)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Run the partition on the tensors named by `input_names`; returns those named by `output_names`."""
        if self.decoders:
            inputs = tuple(self._coded(self.decoders, index, tensor) for index, tensor in enumerate(inputs))
        outputs = self.run_bare(*inputs)
        if self.encoders:
            outputs = tuple(self._coded(self.encoders, index, tensor) for index, tensor in enumerate(outputs))
        return outputs

    def run_bare(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Run the partition without its encoders and decoders."""
        return self._code[self.training](self, *inputs)

    def _coded(self, coders: Mapping[int, str], index: int, tensor: Tensor) -> Tensor:
        if index not in coders:
            return tensor
        coded = self.get_submodule(coders[index])(tensor)
        assert isinstance(coded, Tensor)
        return coded

    def add_encoder(self, position: int, path: str, encoder: nn.Module) -> None:
        """Register a module under a path, and pass the output at a position through it."""
        self._place(path, encoder)
        self.encoders[position] = path

    def add_decoder(self, position: int, path: str, decoder: nn.Module) -> None:
        """Register a module under a path, and pass the input at a position through it."""
        self._place(path, decoder)
        self.decoders[position] = path

    def _place(self, path: str, module: nn.Module) -> None:
        *containers, leaf = path.split(".")
        _container(self, containers).add_module(leaf, module.train(self.training))

    def free(self) -> None:
        """Give up the memory of the partition's parameters and buffers; their names and shapes remain.

        The model that was split shares them: memory is released once it, too, is let go.
        """
        first = next(self.parameters(), None)
        if first is None or not first.is_meta:
            self.to("meta")


def _container(module: nn.Module, path: Sequence[str]) -> nn.Module:
    for atom in path:
        if atom not in module._modules:
            module.add_module(atom, nn.Module())
        module = module.get_submodule(atom)
    return module


def _adopt(partition: nn.Module, root: nn.Module, target: str, copies: Mapping[str, nn.Module]) -> None:
    """Register the module, parameter or buffer at a path of the root under the same path of the partition."""
    *path, leaf = target.split(".")
    here, there = _container(partition, path), root.get_submodule(".".join(path))
    if target in copies:
        here.add_module(leaf, copies[target])
    elif leaf in there._modules:
        here.add_module(leaf, there.get_submodule(leaf))
    elif leaf in there._parameters:
        here.register_parameter(leaf, there._parameters[leaf])
    elif leaf in there._buffers:
        here.register_buffer(leaf, there._buffers[leaf], leaf not in there._non_persistent_buffers_set)
    else:
        # A tensor made of constants in the model's code: no part of its state, but on its device.
        here.register_buffer(leaf, getattr(there, leaf), persistent=False)


@dataclass
class Split:
    """A model in three partitions.

    Attributes:
        front: takes the model's inputs; returns the tensors of cut 1, then those of `kept`.
        middle: takes the tensors of cut 1 and returns those of cut 2.
        back: takes the tensors of cut 2, then those of `kept`; returns the model's outputs.
        inputs: the model's inputs.
        cut1: the tensors that cross from front to middle, in the first step; they never grow.
        cut2: the tensors that cross from middle to back, likewise.
        kept: the tensors that go from front to back and stay on the edge.
        dense1: what would cross at cut 1 without a bottleneck.
        dense2: what would cross at cut 2 without a bottleneck.
        shapes: by cut and position, of the tensors that narrow as training goes on.
    """

    front: Partition
    middle: Partition
    back: Partition
    inputs: tuple[TensorInfo, ...]
    cut1: tuple[TensorInfo, ...]
    cut2: tuple[TensorInfo, ...]
    kept: tuple[TensorInfo, ...]
    dense1: tuple[TensorInfo, ...]
    dense2: tuple[TensorInfo, ...]
    shapes: Mapping[tuple[int, int], ShapeAfter] = field(default_factory=dict)

    @property
    def partitions(self) -> dict[str, Partition]:
        """The partitions by the names in `PARTS`."""
        return {"front": self.front, "middle": self.middle, "back": self.back}

    def dense_bytes(self, batch: int) -> int:
        """Return the bytes of one crossing of both cuts by a batch, without a bottleneck or a codec."""
        return sum(info.dense_bytes(batch) for info in (*self.dense1, *self.dense2))

    def crossing(self, cut: int, committed: int) -> tuple[TensorInfo, ...]:
        """Describe what crosses a cut once so many steps have been committed."""
        infos = self.cut1 if cut == 1 else self.cut2
        return tuple(
            replace(info, shape=self.shapes[cut, position](committed))
            if (cut, position) in self.shapes
            else info
            for position, info in enumerate(infos)
        )

    def unmasked(self, cut: int) -> frozenset[str]:
        """Name the tensors of a text model that cross a cut and are no ``[B, S, ...]``, whatever their sizes."""
        if not any(info.token_dims for info in self.inputs):
            return frozenset()
        infos = self.cut1 if cut == 1 else self.cut2
        return frozenset(info.name for info in infos if info.rows != 1 or info.token_dims[:1] != (0,))

    def back_inputs(self, cut2: Sequence[Tensor], front_outputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Join what crossed cut 2 with those of the front's outputs that are kept for the back."""
        return (*cut2, *front_outputs[len(self.cut1) :])

    def front_gradients(
        self, cut1: Sequence[Tensor | None], back: Sequence[Tensor | None]
    ) -> tuple[Tensor | None, ...]:
        """Return the gradient of each of the front's outputs.

        Args:
            cut1: gradients of the tensors of cut 1, from the middle.
            back: gradients of all the back's inputs.
        """
        return (*cut1, *back[len(self.cut2) :])

    def run(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Run the whole model here, partition after partition."""
        front = self.front(*inputs)
        results = self.back(*self.back_inputs(self.middle(*front[: len(self.cut1)]), front))
        assert isinstance(results, tuple)
        return results


def split(model: nn.Module, cuts: tuple[str, str], inputs: Sequence[TensorInfo]) -> Split:
    """Split a model by two cut points.

    Args:
        model: as built; its modules and tensors are shared with the partitions.
        cuts: names of operations or modules; each cut is right after the named one.
        inputs: the model's inputs, in order.

    Raises:
        UserError: a model that cannot be traced or does not take these inputs, an unknown cut, cuts in the
            wrong order, or a cut that something other than batched tensors would have to cross.
    """
    # torch.fx cannot follow sizes that vary beside the batch's.
    varies = any(info.token_dims for info in inputs)
    traces = export_modes(model, inputs) if varies else trace_modes(model)
    training = cut_in_three(model, traces[True], cuts, inputs, training=True)
    evaluation = training
    if traces[False] is not traces[True]:
        evaluation = cut_in_three(model, traces[False], cuts, inputs, training=False)
    flows = training.crossing
    if _names(flows) != _names(evaluation.crossing):
        raise UserError(
            f"other tensors cross {cuts[0]} and {cuts[1]} in evaluation than in training; choose others"
        )
    partitions = [
        Partition(
            model,
            {True: training.graphs[index], False: evaluation.graphs[index]},
            [info.name for info in flows.taken()[index]],
            [info.name for info in flows.returned()[index]],
            training.copies | evaluation.copies,
        )
        for index in range(len(PARTS))
    ]
    forget_old_sources()
    _check_disjoint(partitions, cuts)
    front, middle, back = partitions
    return Split(
        front=front,
        middle=middle,
        back=back,
        inputs=flows.inputs,
        cut1=flows.cut1,
        cut2=flows.cut2,
        kept=flows.kept,
        dense1=flows.cut1,
        dense2=flows.cut2,
    )


def _names(crossing: Crossing) -> list[list[tuple[str, tuple[int, ...]]]]:
    return [
        [(info.name, info.shape) for info in infos] for infos in (*crossing.taken(), *crossing.returned())
    ]


def _check_disjoint(partitions: Sequence[Partition], cuts: tuple[str, str]) -> None:
    owner: dict[int, str] = {}
    for part, partition in zip(PARTS, partitions, strict=True):
        for name, tensor in (*partition.named_parameters(), *_running_statistics(partition)):
            if owner.setdefault(id(tensor), part) != part:
                raise UserError(
                    f"{name} is used on both sides of a cut ({cuts[0]}, {cuts[1]}); choose cuts that leave "
                    "all its uses on one side"
                )


def _running_statistics(partition: Partition) -> Iterator[tuple[str, Tensor]]:
    """The buffers that a forward changes; others may be read on both sides."""
    for path, module in partition.named_modules():
        if isinstance(module, nn.modules.batchnorm._NormBase):
            yield from ((f"{path}.{name}", buffer) for name, buffer in module.named_buffers())

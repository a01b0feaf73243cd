"""A traced model cut in three graphs, and the tensors that flow between them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn
from torch.fx.passes.split_module import split_module

from common.activations import spare_copies
from common.dataflow import OUTPUT_PART, Flow, assign, make_changes_local
from common.errors import UserError
from common.graph import Traced, find_cut
from common.lookups import check_lookups
from common.propagate import TensorInfo, propagate
from common.rederive import make_masks_local, make_numbers_local

PIECES = ("submod_0", "submod_1", "submod_2")


@dataclass(frozen=True)
class Crossing:
    """The tensors that flow between the three graphs, each tuple in the order in which they are made.

    Attributes:
        inputs: of the model.
        cut1: from front to middle.
        cut2: from middle to back.
        kept: from front to back.
        results: of the model.
    """

    inputs: tuple[TensorInfo, ...]
    cut1: tuple[TensorInfo, ...]
    cut2: tuple[TensorInfo, ...]
    kept: tuple[TensorInfo, ...]
    results: tuple[TensorInfo, ...]

    def taken(self) -> list[tuple[TensorInfo, ...]]:
        """Return what front, middle and back take."""
        return [self.inputs, self.cut1, (*self.cut2, *self.kept)]

    def returned(self) -> list[tuple[TensorInfo, ...]]:
        """Return what front, middle and back return."""
        return [(*self.cut1, *self.kept), self.cut2, self.results]


@dataclass(frozen=True)
class Thirds:
    """A model's graph in three.

    Attributes:
        crossing: the tensors between them.
        graphs: of front, middle and back, over the model's own paths.
        copies: modules to use in place of the model's, by path.
    """

    crossing: Crossing
    graphs: list[fx.Graph]
    copies: dict[str, nn.Module]


def cut_in_three(
    model: nn.Module, traced: Traced, cuts: tuple[str, str], inputs: Sequence[TensorInfo], training: bool
) -> Thirds:
    """Cut a traced model in three.

    Args:
        model: the traced one.
        traced: its graph in one mode; used up.
        cuts: names of operations or modules.
        inputs: the model's.
        training: the mode that the graph was traced in.

    Raises:
        UserError: as `common.partition.split`.
    """
    places = (find_cut(traced, cuts[0]), find_cut(traced, cuts[1]))
    operations = traced.operations()
    if places[0] >= places[1]:
        raise UserError(
            f"cut 1 ({cuts[0]}) must come before cut 2 ({cuts[1]}); here it is operation {places[0] + 1} "
            f"of {len(operations)}, and cut 2 operation {places[1] + 1}"
        )
    if places[1] == len(operations) - 1:
        raise UserError(f"cut 2 ({cuts[1]}) is the model's last operation; leave the classifier behind it")
    found = propagate(model, traced, inputs, training)
    flow = Flow(model, traced, found, assign(traced, found, places))
    make_changes_local(flow)
    spare_copies(flow)
    make_masks_local(flow)
    make_numbers_local(flow)
    thirds = _split(flow, len(inputs))
    if not thirds.crossing.cut1 or not thirds.crossing.cut2:
        raise UserError(f"nothing crosses {cuts[0]} or {cuts[1]}; choose other cuts")
    return thirds


def _split(flow: Flow, input_count: int) -> Thirds:
    nodes = {node.name: node for node in flow.traced.graph.nodes}
    pieces = _pieces(flow)
    needed = [{str(n.target) for n in piece.find_nodes(op="placeholder")} for piece in pieces]
    (output,) = flow.traced.graph.find_nodes(op="output")
    results = [node.name for node in output.all_input_nodes]
    needed[2].update(name for name in results if flow.part_of(nodes[name]) < OUTPUT_PART)

    def pick(names: set[str], *parts: int) -> list[str]:
        wanted = (node for name, node in nodes.items() if name in names and node.op != "get_attr")
        return [node.name for node in wanted if flow.part_of(node) in parts]

    cut1, cut2, kept = pick(needed[1], -1, 0), pick(needed[2], 1), pick(needed[2], -1, 0)
    given = [node.name for node in flow.traced.graph.find_nodes(op="placeholder")][:input_count]
    taken = [given, cut1, [*cut2, *kept]]
    returned = [[*cut1, *kept], cut2, results]
    graphs = [_reroot(piece, nodes, *io) for piece, *io in zip(pieces, taken, returned, strict=True)]
    for piece in graphs:
        check_lookups(piece, flow.model)
    infos = [tuple(_info(flow, name) for name in names) for names in (given, cut1, cut2, kept, results)]
    return Thirds(Crossing(*infos), graphs, flow.copies)


def _pieces(flow: Flow) -> list[fx.Graph]:
    graph = flow.traced.graph
    targets = {str(node.target) for node in graph.nodes if node.op in ("call_module", "get_attr")}
    own = {t: flow.copies[t] if t in flow.copies else _attribute(flow.model, t) for t in targets}
    module = fx.GraphModule(own, graph)
    whole = split_module(
        module,
        module,
        lambda node: flow.part[node.name],
        keep_original_order=True,
        keep_original_node_name=True,
        tuple_return=True,
    )
    split = dict(whole.named_children())
    pieces = [piece.graph for piece in map(split.get, PIECES) if isinstance(piece, fx.GraphModule)]
    if len(pieces) < len(PIECES):
        raise UserError("the cuts leave a part of the model with nothing to compute; choose others")
    return pieces


def _attribute(model: nn.Module, path: str) -> Any:
    owner, _, leaf = path.rpartition(".")
    return getattr(model.get_submodule(owner), leaf)


def _info(flow: Flow, name: str) -> TensorInfo:
    full_name, values = flow.traced.names[name], flow.found.values[name]
    info = flow.found.describe(name, full_name)
    if info is None:
        shape = f" of shape {tuple(values[0].shape)}" if isinstance(values[0], Tensor) else ""
        raise UserError(
            f"{full_name} yields a {type(values[0]).__name__}{shape} for a batch of 2, which cannot cross a "
            "cut; choose another"
        )
    return info


def _reroot(
    piece: fx.Graph, nodes: dict[str, fx.Node], taken: Sequence[str], returned: Sequence[str]
) -> fx.Graph:
    """Give a piece the model's own paths, and its inputs and outputs in the wanted order.

    split_module flattens paths (``features.0.1`` to ``features_0_1``) and passes parameters in as inputs.
    """
    rerooted = fx.Graph()
    made = {name: rerooted.placeholder(name) for name in taken}
    for node in piece.nodes:
        if node.op == "placeholder" and nodes[str(node.target)].op == "get_attr":
            made[node.name] = rerooted.get_attr(str(nodes[str(node.target)].target))
        elif node.op == "placeholder":
            made[node.name] = made[str(node.target)]
        elif node.op != "output":
            made[node.name] = rerooted.node_copy(node, lambda n: made[n.name])
            made[node.name].target = nodes[node.name].target
    rerooted.output(tuple(made[name] for name in returned))
    return rerooted

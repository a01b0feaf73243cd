"""Makes what flows across a cut explicit and sendable, before a graph is split.

Things that are harmless in one process are not between two:

- An operation that changes its argument in place, when that argument comes from the partition before: it would
  fail on a leaf that needs a gradient, or corrupt a buffer that is being sent. It is made out of place, and only
  it.
- A tuple: its elements are taken out of it where it is made.
- Masks and numbers: `common.rederive` makes them anew where they are used.
"""

import copy
import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx, nn

from common.errors import UserError
from common.graph import Traced
from common.propagate import Propagated

OUTPUT_PART = 2

_IN_PLACE_OPERATORS: dict[Any, Callable[..., Any]] = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
}


@dataclass
class Flow:
    """A traced model whose operations have been given to partitions.

    Attributes:
        model: the traced module.
        traced: its graph; changed by the functions of this module.
        found: what its nodes yield.
        part: 0, 1 or 2 by the node's name; the model's inputs are in -1.
        copies: modules to use in place of the model's own, by the path that the graph calls them by.
    """

    model: nn.Module
    traced: Traced
    found: Propagated
    part: dict[str, int]
    copies: dict[str, nn.Module] = field(default_factory=dict)

    def part_of(self, node: fx.Node) -> int:
        """Return the partition that a node's value is used or made in."""
        return OUTPUT_PART if node.op == "output" else self.part.get(node.name, -1)

    def crossing_users(self, node: fx.Node) -> list[fx.Node]:
        """Return the users of a node that are in later partitions."""
        return [user for user in node.users if self.part_of(user) > max(self.part_of(node), 0)]

    def module_of(self, node: fx.Node) -> nn.Module | None:
        """Return the module that a node calls, None for a node that calls none."""
        if node.op != "call_module":
            return None
        path = str(node.target)
        return self.copies[path] if path in self.copies else self.model.get_submodule(path)

    def insert_like(self, node: fx.Node, like: fx.Node, part: int) -> None:
        """Enter a new node that yields what another one does."""
        self.part[node.name] = part
        self.found.values[node.name] = self.found.values[like.name]
        self.traced.names[node.name] = self.traced.names[like.name]


def assign(traced: Traced, found: Propagated, cuts: tuple[int, int]) -> dict[str, int]:
    """Give each operation to a partition by its position, and the elements of a tuple to the tuple's."""
    part: dict[str, int] = {}
    for index, node in enumerate(traced.operations()):
        part[node.name] = sum(index > cut for cut in cuts)
        source = node.args[0] if node.target is operator.getitem else None
        if isinstance(source, fx.Node) and not isinstance(found.values[source.name][0], Tensor):
            part[node.name] = part.get(source.name, part[node.name])
    return part


def make_changes_local(flow: Flow) -> None:
    """Make the operations that change a tensor of an earlier partition in place do so out of place.

    Raises:
        UserError: the change is seen through another view of the same memory, which cannot be kept across a
            cut.
    """
    order = {node.name: index for index, node in enumerate(flow.traced.graph.nodes)}
    storages = dict(flow.found.storages)
    made_in: dict[int, int] = {}
    for node in flow.traced.graph.nodes:
        for storage in storages[node.name]:
            made_in.setdefault(storage, flow.part_of(node) if node.op != "get_attr" else OUTPUT_PART)
    for node in list(flow.traced.operations()):
        for changed in [
            arg for arg in node.all_input_nodes if arg.name in flow.found.changes.get(node.name, ())
        ]:
            shared = storages[changed.name]
            if all(made_in[storage] >= flow.part_of(node) for storage in shared):
                continue
            _make_out_of_place(flow, node, changed)
            later = [n for n in flow.traced.graph.nodes if order.get(n.name, -1) > order[node.name]]
            for other in later:
                if any(
                    storages.get(arg.name, frozenset()) & shared and order[arg.name] < order[node.name]
                    for arg in other.all_input_nodes
                    if arg.name in order
                ):
                    names = flow.traced.names
                    raise UserError(
                        f"{names[node.name]} changes in place what {names[other.name]} sees through another "
                        "view, across a cut; choose another cut"
                    )
            # From here on the new tensor stands for the old one's memory.
            fresh = -1 - order[node.name]
            made_in[fresh] = flow.part_of(node)
            for name in [node.name, *(n.name for n in later)]:
                if storages[name] & shared:
                    storages[name] = storages[name] - shared | {fresh}


def _make_out_of_place(flow: Flow, node: fx.Node, changed: fx.Node) -> None:
    graph, uses = flow.traced.graph, list(changed.users)
    position = {n: index for index, n in enumerate(graph.nodes)}
    later = {user for user in uses if position[user] > position[node]}
    if work_out_of_place(flow, node):
        changed.replace_all_uses_with(node, delete_user_cb=later.__contains__)
        return
    with graph.inserting_before(node):
        own = graph.call_method("clone", (changed,))
    flow.insert_like(own, changed, flow.part_of(node))
    changed.replace_all_uses_with(own, delete_user_cb=(later | {node}).__contains__)


def work_out_of_place(flow: Flow, node: fx.Node) -> bool:
    """Turn an operation into its out-of-place form; False where it has none that is known."""
    if (module := flow.module_of(node)) is not None:
        if not getattr(module, "inplace", False) or any(
            True for _ in (*module.parameters(), *module.buffers())
        ):
            return False
        path = f"{node.target}__out_of_place"
        flow.copies[path] = copy.copy(module)
        flow.copies[path].inplace = False  # type: ignore[assignment]
        node.target = path
    elif node.kwargs.get("inplace"):
        node.kwargs = {**node.kwargs, "inplace": False}
    elif node.target in _IN_PLACE_OPERATORS:
        node.target = _IN_PLACE_OPERATORS[node.target]
    elif node.op == "call_method" and hasattr(Tensor, _out_of_place_name(str(node.target))):
        node.target = _out_of_place_name(str(node.target))
    else:
        return False
    return True


def _out_of_place_name(name: str) -> str:
    return name[:-1] if name.endswith("_") and not name.endswith("__") else "none"

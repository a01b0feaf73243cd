"""What a partition looks up in a table is checked first, where the numbers come from outside it.

An index beyond its table is an error on a CPU; on a GPU it ends the process's every use of that GPU, and a peer
may send any index.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from common.errors import UserError

__all__ = ["check_lookups", "within"]

# What tells of a tensor's size or place, and not of its values.
_NO_VALUES = (torch.ops.aten.sym_size.int, getattr, "size", "dim")


def check_lookups(graph: fx.Graph, model: nn.Module) -> None:
    """Insert a check before each embedding whose indices follow from the values of the graph's inputs.

    Args:
        graph: over the model's paths; changed in place.
        model: holds the embeddings.
    """
    layers = dict(model.named_modules())
    from_outside: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder" or (
            node.target not in _NO_VALUES and any(n in from_outside for n in node.all_input_nodes)
        ):
            from_outside.add(node)
    for node in list(graph.nodes):
        place = _index_place(node, layers)
        if place is None or node.args[place] not in from_outside:
            continue
        with graph.inserting_before(node):
            rows: Any = (
                model.get_submodule(str(node.target)).num_embeddings
                if node.op == "call_module"
                else graph.call_method("size", (node.args[0], 0))
            )
            node.update_arg(place, graph.call_function(within, (node.args[place], rows)))


def _index_place(node: fx.Node, layers: Mapping[str, nn.Module]) -> int | None:
    if node.op == "call_function" and node.target is torch.ops.aten.embedding.default:
        return 1
    is_layer = node.op == "call_module" and isinstance(layers.get(str(node.target)), nn.Embedding)
    return 0 if is_layer and node.args else None


def within(index: Tensor, rows: int) -> Tensor:
    """Return indices as they are.

    Args:
        index: integers.
        rows: of the table.

    Raises:
        UserError: one is not from 0 to rows - 1.
    """
    if not index.is_meta and index.numel():
        low, high = torch.stack(torch.aminmax(index)).tolist()
        if low < 0 or high >= rows:
            raise UserError(
                f"a token, its position or its type is numbered {low if low < 0 else high}, and the model's table has "
                f"{rows} rows: model and tokenizer do not belong together, or texts are too long"
            )
    return index

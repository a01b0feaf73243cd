"""A model as a graph of named operations, traced by torch.export: for models that torch.fx cannot follow.

Transformers look at sizes and build masks as they run; torch.export follows that with symbolic sizes, so one
graph serves every batch and every number of tokens. Nodes are named as in `common.graph`: by the path of the
module (``bert.encoder.layer.0.attention.output.LayerNorm``), or of the module whose forward they are part of
and the operation.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from common.errors import UserError
from common.graph import TRACING, Traced, mode
from common.propagate import TensorInfo

__all__ = ["export_modes"]

# Sizes of the example that is traced: unlike any constant that a model is likely to compare them with.
_BATCH, _TOKENS = 3, 11

# What torch.export adds to check at run time what it has assumed; sizes and types are checked at the cuts.
_CHECKS = ("_assert_tensor_metadata", "_assert_scalar", "_assert_async", "sym_constrain_range")


def export_modes(model: nn.Module, inputs: Sequence[TensorInfo]) -> dict[bool, Traced]:
    """Trace a model for training (True) and evaluation (False); the model itself stays as it is.

    Args:
        model: takes the inputs by name; returns a tensor, or a structure whose first tensor is the result.
        inputs: their dimensions of tokens, and the batch, may vary.

    Raises:
        UserError: its forward depends on values, or does not take such inputs.
    """
    return {training: _export(model, inputs, training) for training in (True, False)}


def _export(model: nn.Module, inputs: Sequence[TensorInfo], training: bool) -> Traced:
    examples = {info.name: _example(info) for info in inputs}
    auto = torch.export.Dim.AUTO
    varying = {info.name: {0: auto, **{dim + 1: auto for dim in info.token_dims}} for info in inputs}
    try:
        with TRACING, mode(model, training):
            program = torch.export.export(model, (), kwargs=examples, dynamic_shapes=varying)
            module = program.module()
    except Exception as error:
        # Whatever the model's own code, or the tracing of it, raises.
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"{type(model).__name__} cannot be traced by torch.export, and so not split: {reason}"
        ) from error
    assert isinstance(module, fx.GraphModule)
    _check_most_tokens(program, model, inputs)
    return _clean(module, model, [info.name for info in inputs])


def _check_most_tokens(
    program: torch.export.ExportedProgram, model: nn.Module, inputs: Sequence[TensorInfo]
) -> None:
    """Refuse more tokens than those for which the model takes the way that was traced."""
    infos = {info.name: info for info in inputs}
    for node in program.graph.find_nodes(op="placeholder"):
        for dim in infos[node.name].token_dims if node.name in infos else ():
            size, wanted = node.meta["val"].shape[dim + 1], infos[node.name].shape[dim]
            known = program.range_constraints.get(size.node.expr) if isinstance(size, torch.SymInt) else None
            if known is not None and known.upper < wanted:
                raise UserError(
                    f"{type(model).__name__} goes another way for more than {known.upper} tokens, and {wanted} are "
                    f"asked for: give --max-length {known.upper} or less"
                )


def _example(info: TensorInfo) -> Tensor:
    return torch.ones(info.batched(_BATCH, _TOKENS), dtype=info.dtype)


def _clean(module: fx.GraphModule, model: nn.Module, names: Sequence[str]) -> Traced:
    """Copy the graph over the model's own paths, for any device, with its inputs in order and one result."""
    graph = fx.Graph()
    placeholders = {str(node.target): node for node in module.graph.find_nodes(op="placeholder")}
    made: dict[fx.Node, fx.Node] = {placeholders[name]: graph.placeholder(name) for name in names}
    device = graph.call_function(getattr, (made[placeholders[names[0]]], "device"))
    paths = {device.name: "device"}
    for node in module.graph.nodes:
        if node.op == "call_module" or _is_check(node):
            continue
        if node.op == "get_attr":
            _keep_constant(model, module, str(node.target))
            made[node] = graph.node_copy(node, made.__getitem__)
        elif node.op == "call_function":
            made[node] = copy = graph.node_copy(node, made.__getitem__)
            copy.args, copy.kwargs = (_anywhere(given, device) for given in (node.args, node.kwargs))
            copy.args, copy.kwargs = fx.map_arg((copy.args, copy.kwargs), lambda n: made.get(n, n))
            paths[copy.name] = _path(node)
        elif node.op == "output":
            results = [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), Tensor)]
            graph.output(made[results[0]])
    graph.eliminate_dead_code()
    return Traced(graph, _names(graph, paths))


def _is_check(node: fx.Node) -> bool:
    return node.op == "call_function" and any(check in str(node.target) for check in _CHECKS)


def _anywhere(given: Any, device: fx.Node) -> Any:
    """Replace the device that the model was traced on by that of its first input."""
    if isinstance(given, torch.device):
        return device
    if isinstance(given, Mapping):
        return {key: _anywhere(value, device) for key, value in given.items()}
    if isinstance(given, tuple | list):
        return type(given)(_anywhere(value, device) for value in given)
    return given


def _keep_constant(model: nn.Module, module: nn.Module, target: str) -> None:
    """Give the model the tensors that its code makes of constants, where the graph looks for them."""
    path, _, leaf = target.rpartition(".")
    try:
        there = model.get_submodule(path)
    except AttributeError as error:
        raise UserError(f"{type(model).__name__} makes a constant {target}, which cannot be split") from error
    if not hasattr(there, leaf):
        setattr(there, leaf, getattr(module.get_submodule(path), leaf))


def _path(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    path: str = list(stack.values())[-1][0] if stack else ""
    return "" if path.startswith("_empty_nn_module_stack") else path


def _names(graph: fx.Graph, paths: Mapping[str, str]) -> dict[str, str]:
    """Name operations by their module, and by what they do where it has several; alike in both modes."""
    in_module = Counter(path for path in paths.values() if path)
    seen: Counter[str] = Counter()
    names = {}
    for node in graph.nodes:
        path = paths.get(node.name)
        if path is None:
            names[node.name] = node.name
        elif path and in_module[path] == 1:
            names[node.name] = path
        else:
            kind = str(node.target).removeprefix("aten.").partition(".")[0].strip("_")
            name = f"{path}.{kind}".removeprefix(".") if node.target is not getattr else path
            seen[name] += 1
            names[node.name] = name if seen[name] == 1 else f"{name}_{seen[name]}"
    return names

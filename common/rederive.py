"""Makes anew, behind a cut, what need not cross it.

- A mask that follows from the model's integer inputs: what crosses is the input, ``[B, S]``, and not what the
  model has made of it, which may have ``[B, 1, S, S]``. Likewise a table that follows from sizes alone, such as the
  sines and cosines of rotary positions.
- A number, such as a size: it is a constant, or follows the batch and the number of tokens and is read off a
  tensor that crosses anyway. So is the device that tensors are made on.
"""

import operator
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from common.dataflow import OUTPUT_PART, Flow
from common.errors import UserError
from common.propagate import BATCHES, TOKENS, tensors_in

__all__ = ["make_masks_local", "make_numbers_local"]


def make_masks_local(flow: Flow) -> None:
    """Compute masks from the model's integer inputs again in each partition that uses them."""
    masks = _masks(flow)
    for part in range(1, OUTPUT_PART + 1):
        _compute_again(flow, part, masks)


def _compute_again(flow: Flow, part: int, masks: set[fx.Node]) -> None:
    own = [node for node in flow.traced.operations() if flow.part_of(node) == part]
    wanted = _with_sources((n for user in own for n in user.all_input_nodes if n in masks), masks)
    copies: dict[fx.Node, fx.Node] = {}
    for node in flow.traced.operations():
        if node in wanted and flow.part_of(node) < part:
            with flow.traced.graph.inserting_before(own[0]):
                copies[node] = flow.traced.graph.node_copy(node, lambda n: copies.get(n, n))
            flow.insert_like(copies[node], node, part)
    for node, copy in copies.items():
        node.replace_all_uses_with(copy, delete_user_cb=lambda user: flow.part_of(user) == part)


def _masks(flow: Flow) -> set[fx.Node]:
    """The operations that yield tensors and depend on nothing but integer or bool inputs, and on one at least."""
    sources: set[fx.Node] = set()  # the inputs, and what follows from them
    neutral: set[fx.Node] = set()  # made of constants and sizes
    for node in flow.traced.graph.nodes:
        values = flow.found.values.get(node.name, [None])
        if node.op == "placeholder" and isinstance(values[0], Tensor):
            if not values[0].is_floating_point():
                sources.add(node)
        elif (not tensors_in(values[0]) and node.op != "output") or (
            node.op == "get_attr" and _is_table(values[0])
        ):
            neutral.add(node)
        elif _can_be_repeated(node) and isinstance(values[0], Tensor):
            given = node.all_input_nodes
            if all(n in sources or n in neutral for n in given):
                (sources if any(n in sources for n in given) else neutral).add(node)
    return {
        node
        for node in (*sources, *neutral)
        if node.op.startswith("call_") and isinstance(flow.found.values[node.name][0], Tensor)
    }


def _is_table(value: Any) -> bool:
    """Whether a buffer is one of fractions, such as frequencies; what is looked up in others may not be there."""
    return isinstance(value, Tensor) and value.is_floating_point() and not isinstance(value, nn.Parameter)


def _can_be_repeated(node: fx.Node) -> bool:
    """Whether an operation is one of torch.export's that gives the same again: draws nothing, changes nothing."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    return torch.Tag.nondeterministic_seeded not in node.target.tags and not node.target._schema.is_mutable


def _with_sources(nodes: Iterable[fx.Node], masks: set[fx.Node]) -> set[fx.Node]:
    found: set[fx.Node] = set()
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        if node in masks and node not in found:
            found.add(node)
            waiting.extend(node.all_input_nodes)
    return found


def make_numbers_local(flow: Flow) -> None:
    """Replace what crosses a cut and is no tensor by a constant, or by what is read off a tensor that crosses.

    Raises:
        UserError: it is neither.
    """
    for node in list(flow.traced.operations()):
        values = flow.found.values[node.name]
        if isinstance(values[0], Tensor):
            continue
        for user in flow.crossing_users(node):
            number = _number(flow, values, user)
            if number is _UNKNOWN:
                kind, names = type(values[0]).__name__, flow.traced.names
                raise UserError(
                    f"{names[node.name]} yields a {kind}, which cannot cross a cut on its way to "
                    f"{names[user.name]}; choose another cut"
                )
            put = partial(_put, node, number)
            user.args, user.kwargs = fx.map_arg(user.args, put), fx.map_arg(user.kwargs, put)


def _put(node: fx.Node, number: Any, argument: fx.Node) -> Any:
    return number if argument is node else argument


_UNKNOWN = object()


def _number(flow: Flow, values: list[Any], user: fx.Node) -> Any:
    first, second = values
    if isinstance(first, tuple) and isinstance(second, tuple) and len(first) == len(second):
        items = [_number(flow, list(pair), user) for pair in zip(first, second, strict=True)]
        return _UNKNOWN if any(item is _UNKNOWN for item in items) else tuple(items)
    if isinstance(first, torch.device):
        return _Reader(flow, user).device()
    if not isinstance(first, int | float | bool | str | torch.dtype | None):
        return _UNKNOWN
    if first == second:
        return first
    if not isinstance(first, int):
        return _UNKNOWN
    batch_and_tokens = tuple(map(operator.mul, BATCHES, TOKENS))
    for (one, other), follows in (
        (BATCHES, ("batch",)),
        (TOKENS, ("tokens",)),
        (batch_and_tokens, ("batch", "tokens")),
    ):
        if first * other == second * one and first % one == 0:
            return _Reader(flow, user).multiple(first // one, follows)
    return _UNKNOWN


class _Reader:
    """Inserts, before an operation, what reads a number off a tensor that crosses to its partition.

    Args:
        flow: the traced model.
        user: the operation.
    """

    def __init__(self, flow: Flow, user: fx.Node) -> None:
        self._flow = flow
        self._user = user
        self._part = flow.part_of(user)
        self._sources = [
            (source, info)
            for source in flow.traced.graph.nodes
            if source.op != "get_attr"
            and any(flow.part_of(u) == self._part for u in flow.crossing_users(source))
            and (info := flow.found.describe(source.name, source.name)) is not None
        ]

    def device(self) -> Any:
        """The device that the partition's inputs are on."""
        for source, _ in self._sources:
            return self._insert(getattr, (source, "device"), [torch.device("meta")] * 2)
        return _UNKNOWN

    def multiple(self, factor: int, follows: tuple[str, ...]) -> Any:
        """The batch, the number of tokens, or their product, times a factor."""
        number: Any = factor
        values = [factor, factor]
        for what in follows:
            counts = BATCHES if what == "batch" else TOKENS
            count = self._batch() if what == "batch" else self._tokens()
            if count is _UNKNOWN:
                return _UNKNOWN
            values = [value * c for value, c in zip(values, counts, strict=True)]
            number = count if number == 1 else self._insert(operator.mul, (count, number), values)
        return number

    def _batch(self) -> Any:
        for source, info in self._sources:
            if info.rows:
                size = self._size(source, 0, [info.rows * b for b in BATCHES])
                return (
                    size
                    if info.rows == 1
                    else self._insert(operator.floordiv, (size, info.rows), list(BATCHES))
                )
        return _UNKNOWN

    def _tokens(self) -> Any:
        for source, info in self._sources:
            if info.token_dims:
                return self._size(source, info.token_dims[0] + (info.rows > 0), list(TOKENS))
        return _UNKNOWN

    def _size(self, source: fx.Node, dim: int, values: list[Any]) -> fx.Node:
        with self._flow.traced.graph.inserting_before(self._user):
            return self._enter(self._flow.traced.graph.call_method("size", (source, dim)), values)

    def _insert(self, function: Any, args: tuple[Any, ...], values: list[Any]) -> fx.Node:
        with self._flow.traced.graph.inserting_before(self._user):
            return self._enter(self._flow.traced.graph.call_function(function, args), values)

    def _enter(self, node: fx.Node, values: list[Any]) -> fx.Node:
        self._flow.part[node.name] = self._part
        self._flow.found.values[node.name] = values
        self._flow.traced.names[node.name] = node.name
        return node

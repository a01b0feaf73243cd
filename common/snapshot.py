"""Nested state as named tensors and plain values, and back: what a checkpoint file can hold, exactly.

    {"state": {0: {"momentum_buffer": tensor}}, "lr": inf}
        tensors   {"state.0.momentum_buffer": tensor}
        plain     {"map": [["state", {"map": [[0, {"map": [["momentum_buffer", {"tensor": ..}]]}]]}],
                           ["lr", {"float": "inf"}]]}

A JSON object of the plain part is never a map itself: its key says what it stands for. So a map's keys stay what
they were, numbers or text, and what JSON has no word for is spelled.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["CHECKSUM_NAME", "detached", "flatten", "unflatten"]

CHECKSUM_NAME: Final = "__checksum__"
"""Of the tensor that a checkpoint's file has for itself."""

_RESERVED: Final = ("__metadata__", CHECKSUM_NAME)
"""Names that no tensor has: safetensors gives the first to none."""


def flatten(state: Any) -> tuple[dict[str, Tensor], Any]:
    """Take nested state apart.

    Args:
        state: of dicts with keys of text or whole numbers, lists, tuples, None, booleans, numbers, text, bytes and
            tensors.

    Returns:
        The tensors, not copied, by names made of their places; and the rest, which JSON can hold.

    Raises:
        TypeError: something else is in it; says where.
    """
    tensors: dict[str, Tensor] = {}
    return tensors, _flattened(state, (), tensors)


def unflatten(tensors: Mapping[str, Tensor], plain: Any) -> Any:
    """Put together what `flatten` took apart, tensors in the memory order that they had.

    Args:
        tensors: by name, in any memory order; not copied where theirs is the right one.
        plain: as it came out of JSON.

    Raises:
        ValueError: they do not belong together, or `flatten` did not make them.
    """
    try:
        return _unflattened(tensors, plain)
    except (KeyError, TypeError, ValueError, RuntimeError, RecursionError) as error:
        raise ValueError(f"the values and the tensors do not belong together: {error}") from error


def detached(state: Any) -> Any:
    """Return a deep copy in host memory, safe to write from another thread while training goes on.

    Args:
        state: as `flatten` takes it.

    Raises:
        TypeError: something else is in it; says where.
    """
    return _mapped(state, (), lambda tensor: tensor.detach().to("cpu", copy=True))


def copy_of(state: Callable[[], Any]) -> Any:
    """Ask for a state and return a copy of it; what a lane does."""
    return detached(state())


def _mapped(state: Any, place: tuple[object, ...], change: Callable[[Tensor], Tensor]) -> Any:
    match state:
        case Tensor():
            return change(state)
        case Mapping():
            return {_key(key, place): _mapped(value, (*place, key), change) for key, value in state.items()}
        case list() | tuple():
            values = [_mapped(value, (*place, number), change) for number, value in enumerate(state)]
            return values if isinstance(state, list) else tuple(values)
        case None | bool() | int() | float() | str() | bytes():
            return state
    raise _cannot_keep(state, place)


def _flattened(state: Any, place: tuple[object, ...], tensors: dict[str, Tensor]) -> Any:
    match state:
        case Tensor():
            return _described(state, _added(state, place, tensors))
        case Mapping():
            return {
                "map": [
                    [_key(key, place), _flattened(value, (*place, key), tensors)]
                    for key, value in state.items()
                ]
            }
        case list() | tuple():
            values = [_flattened(value, (*place, number), tensors) for number, value in enumerate(state)]
            return values if isinstance(state, list) else {"tuple": values}
        case float() if not math.isfinite(state):
            return {"float": str(float(state))}
        case bytes():
            return {"bytes": state.hex()}
        case None | bool() | int() | float() | str():
            return state
    raise _cannot_keep(state, place)


def _unflattened(tensors: Mapping[str, Tensor], plain: Any) -> Any:
    match plain:
        case list():
            return [_unflattened(tensors, value) for value in plain]
        case {"map": list(pairs)}:
            return {key: _unflattened(tensors, value) for key, value in pairs}
        case {"tuple": list(values)}:
            return tuple(_unflattened(tensors, value) for value in values)
        case {"tensor": str(name), "strides": list(strides)}:
            return _laid_out(tensors[name], strides)
        case {"tensor": str(name)}:
            return tensors[name].contiguous()
        case {"float": str(text)}:
            return float(text)
        case {"bytes": str(digits)}:
            return bytes.fromhex(digits)
        case None | bool() | int() | float() | str():
            return plain
    raise ValueError(f"{str(plain)[:40]!r} is nothing that a state is made of")


def _added(tensor: Tensor, place: tuple[object, ...], tensors: dict[str, Tensor]) -> str:
    """Name a tensor by its place, and a little longer where another has that name: 0 and "0" read alike."""
    name = ".".join(map(str, place)).encode("utf-8", "replace").decode()
    while name in tensors or name in _RESERVED:
        name += "'"
    tensors[name] = tensor.detach()
    return name


def _described(tensor: Tensor, name: str) -> dict[str, Any]:
    # Results depend on the memory order, for operators round by the order that they meet. All strides are kept, as
    # torch looks at those of sizes of 1, too.
    strides = torch.empty_like(tensor, device="meta").stride()
    usual = torch.empty(tensor.shape, device="meta").stride()
    return {"tensor": name} | ({} if strides == usual else {"strides": list(strides)})


def _laid_out(tensor: Tensor, strides: Sequence[int]) -> Tensor:
    reach = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, strides, strict=True))
    if tensor.numel() and (min(strides) < 0 or reach != tensor.numel()):
        raise ValueError(f"strides {list(strides)} leave gaps in a tensor of {list(tensor.shape)}")
    laid_out = torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=tensor.device)
    return laid_out.copy_(tensor)


def _key(key: object, place: tuple[object, ...]) -> str | int:
    if isinstance(key, str) or type(key) is int:
        return key
    raise TypeError(f"a key must be text or a whole number, not {key!r:.40}{_at(place)}")


def _cannot_keep(value: object, place: tuple[object, ...]) -> TypeError:
    return TypeError(f"a {type(value).__name__} cannot be kept{_at(place)}")


def _at(place: tuple[object, ...]) -> str:
    return f", at {'.'.join(map(str, place))}" if place else ""

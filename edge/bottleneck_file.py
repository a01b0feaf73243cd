"""A bottleneck's own weights in a file: that of ``calibrate``, with what they are for, or a whole model's."""

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from common.errors import UserError
from common.partition import Split
from common.weights import BOTTLENECK_PREFIX, load_state, partition_state, save_model, split_bottleneck

_FORMAT = "isthmus bottleneck 1"


@dataclass(frozen=True, kw_only=True)
class Purpose:
    """What a bottleneck was made for; it is of no use for anything else.

    Attributes:
        model: its name.
        cuts: the two cut points.
        bottlenecks: the specification at each cut, empty for none.
        shapes: of a sample of each tensor that crosses each cut without a bottleneck.
    """

    model: str
    cuts: tuple[str, str]
    bottlenecks: tuple[str, str]
    shapes: tuple[tuple[tuple[int, ...], ...], ...]

    @classmethod
    def of(
        cls, parts: Split, *, model: str, cuts: tuple[str, str], bottlenecks: tuple[str, str]
    ) -> "Purpose":
        """Describe the bottleneck of a split model."""
        shapes = tuple(tuple(info.shape for info in infos) for infos in (parts.dense1, parts.dense2))
        return cls(model=model, cuts=cuts, bottlenecks=bottlenecks, shapes=shapes)

    def to_metadata(self) -> dict[str, str]:
        """Write it as strings, for a file's header."""
        return {"format": _FORMAT, **{name: json.dumps(value) for name, value in vars(self).items()}}


_WORDS = {
    "model": "the model",
    "cuts": "the cuts",
    "bottlenecks": "--compress",
    "shapes": "tensors of shape",
}


def save_bottleneck(path: Path, parts: Split, purpose: Purpose) -> None:
    """Write the bottleneck of a split model, whole or not at all.

    Raises:
        OSError: the disk is full, or the file cannot be written.
    """
    save_model(path, {}, _bottleneck_of(parts), purpose.to_metadata())


def load_bottleneck(path: Path, parts: Split, purpose: Purpose) -> None:
    """Start a split model's bottleneck from a file.

    Raises:
        UserError: there is no such file, it holds something else, or a bottleneck that was made for something
            else; says what differs.
    """
    expected = _bottleneck_of(parts)
    state, metadata = _read(path)
    if not expected:
        raise UserError(f"--bottleneck {path} needs a bottleneck in --compress; name the one that it holds")
    for name, word in _WORDS.items():
        theirs, ours = metadata.get(name), json.loads(json.dumps(getattr(purpose, name)))
        if theirs != ours:
            raise UserError(
                f"{path} holds a bottleneck for {word} {_spelled(theirs)}, and this run has {_spelled(ours)}: "
                "calibrate anew, or change the run"
            )
    for name in sorted(expected.keys() | state.keys()):
        theirs, ours = _described(state.get(name)), _described(expected.get(name))
        if theirs != ours:
            raise UserError(f"{path} holds {name} as {theirs}, and this run has {ours}: calibrate anew")
    try:
        _take(parts, state)
    except RuntimeError as error:
        raise UserError(f"{path} does not fit together: {' '.join(str(error).split())}") from error


@dataclass(frozen=True)
class Trained:
    """The bottleneck that a model was trained and saved with.

    Attributes:
        state: its weights.
        cuts: where it was; None where the file does not say.
    """

    state: Mapping[str, Tensor]
    cuts: tuple[str, ...] | None

    def at_other_cuts(self, purpose: Purpose) -> str:
        """Say, where it was at other cuts than these, at which; else nothing."""
        if self.cuts is None or self.cuts == purpose.cuts:
            return ""
        return f", but cut after {' and '.join(self.cuts)}"


def read_trained(path: Path) -> Trained | None:
    """Read the bottleneck from a file of a model's weights; None where they were trained without one.

    Raises:
        UserError: there is no such file, or it is none.
    """
    cuts = None
    try:
        with safe_open(path, "pt") as file:  # the rest of the model has been read, and may be large
            names = [name for name in file.keys() if name.startswith(BOTTLENECK_PREFIX)]  # noqa: SIM118  (no dict)
            state = {name: file.get_tensor(name) for name in names}
            with suppress(ValueError):
                cuts = json.loads((file.metadata() or {}).get("cuts", "null"))
    except SafetensorError:  # a file of torch.save, which says nothing of cuts
        state = split_bottleneck(load_state(path))[1]
    if not state:
        return None
    return Trained(state, tuple(map(str, cuts)) if isinstance(cuts, list) else None)


def take_trained(parts: Split, trained: Trained, purpose: Purpose) -> bool:
    """Start a split model's bottleneck from one that was trained.

    Layers that narrow while they train go on where they were.

    Returns:
        Whether it is of the same kind and size, and at the same cuts; if not, nothing has changed.
    """
    before = {name: tensor.clone() for name, tensor in _bottleneck_of(parts).items()}
    if before.keys() != trained.state.keys() or trained.at_other_cuts(purpose):
        return False
    try:
        _take(parts, trained.state)
    except RuntimeError:  # how wide a layer is that narrows shows only as it takes the steps that it has made
        _take(parts, before)
        return False
    return True


def _take(parts: Split, state: Mapping[str, Tensor]) -> None:
    for part in parts.partitions.values():
        part.load_state_dict({name: state[name] for name in part.state_dict() if name in state}, strict=False)


def _bottleneck_of(parts: Split) -> dict[str, Tensor]:
    states = [split_bottleneck(partition_state(part))[1] for part in parts.partitions.values()]
    return {name: tensor for state in states for name, tensor in state.items()}


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if not path.is_file():
        raise UserError(f"there is no bottleneck file {path}; edge-client calibrate makes one")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (it is no dict)
        if metadata.pop("format", None) != _FORMAT:
            raise UserError(f"{path} is not a file of edge-client calibrate, which --bottleneck takes")
        return state, {name: json.loads(value) for name, value in metadata.items()}
    except (SafetensorError, ValueError) as error:
        raise UserError(f"{path} is no readable bottleneck file, perhaps cut short: {error}") from error


def _spelled(value: object) -> str:
    """Write a name, a shape, or several joined by "and", as people write them."""
    if not isinstance(value, list):
        return str(value) or "none"
    if value and all(isinstance(size, int) for size in value):
        return f"[B,{','.join(map(str, value))}]"
    return " and ".join(map(_spelled, value))


def _described(tensor: Tensor | None) -> str:
    if tensor is None:
        return "nothing"
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"

"""State dicts: read, written whole or not at all, joined from partitions, and compared by digest."""

import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from common.errors import UserError

BOTTLENECK_PREFIX = "bottleneck."
"""What the names of a bottleneck's own weights start with; no other part of a model uses it."""


def load_state(path: Path) -> dict[str, Tensor]:
    """Read a state dict onto the CPU. Nothing in the file is executed.

    Args:
        path: a safetensors file of any name, or one of `torch.save` with plain tensors: a state dict, or a map that
            holds one as ``state_dict`` or ``model``.

    Raises:
        UserError: no such file, a damaged one, or one that holds something else.
    """
    if not path.is_file():
        raise UserError(f"there is no weights file {path}")
    try:
        if _is_safetensors(path):
            return load_file(path)
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, MemoryError):
        raise
    except Exception as error:
        # A damaged file raises whatever its reader met first: half a dozen types, one of them the unpickler's
        # own.
        reason = str(error).strip().partition("\n")[0].partition(". ")[0]
        raise UserError(f"{path} is no readable weights file, perhaps cut short: {reason}") from error
    return _state_dict_in(loaded, path)


def _is_safetensors(path: Path) -> bool:
    with path.open("rb") as file:  # the length of a JSON object, and the object
        return path.suffix == ".safetensors" or file.read(9)[8:] == b"{"


def _state_dict_in(loaded: Any, path: Path) -> dict[str, Tensor]:
    for key in ("state_dict", "model"):
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
    if not isinstance(loaded, Mapping) or not all(isinstance(tensor, Tensor) for tensor in loaded.values()):
        raise UserError(f"{path} holds no state dict: it must map names to tensors")
    return dict(loaded)


def save_model(
    path: Path, full: Mapping[str, Tensor], bottleneck: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> None:
    """Write a whole model as one safetensors file, whole or not at all.

    Without a bottleneck the file loads into the plain model with ``strict=True``.

    Args:
        path: an existing file is replaced only once the new one is safely on disk.
        full: the model's state dict.
        bottleneck: the bottleneck's weights, their names starting with `BOTTLENECK_PREFIX`; empty without
            one.
        metadata: strings that travel in the file's header.

    Raises:
        OSError: the disk is full, or the directory is not there or not writable.
    """
    state = {name: _to_plain(tensor) for name, tensor in {**full, **bottleneck}.items()}
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        try:
            save_file(state, temporary, metadata=dict(metadata))
        except SafetensorError as error:
            raise _as_os_error(error) from error
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _as_os_error(error: SafetensorError) -> OSError:
    """Give what the operating system said to safetensors, which reports it in words of its own."""
    number = re.search(r"\(os error (\d+)\)", str(error))
    return OSError(str(error)) if number is None else OSError(int(number[1]), os.strerror(int(number[1])))


def _to_plain(tensor: Tensor) -> Tensor:
    # safetensors refuses tensors that share memory and those in channels-last order; a clone is neither.
    return tensor.detach().to("cpu").clone(memory_format=torch.contiguous_format)


def partition_state(partition: nn.Module) -> dict[str, Tensor]:
    """Return a partition's parameters and buffers (running statistics, counters), detached, by full name."""
    return {name: tensor.detach() for name, tensor in partition.state_dict().items()}


def split_bottleneck(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Separate a state dict into the model's own tensors and the bottleneck's."""
    own = {name: tensor for name, tensor in state.items() if not name.startswith(BOTTLENECK_PREFIX)}
    return own, {name: tensor for name, tensor in state.items() if name.startswith(BOTTLENECK_PREFIX)}


def merge_states(
    initial: Mapping[str, Tensor], *partitions: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Join the partitions' states into that of the whole model.

    Args:
        initial: the whole model's state before training: gives the order of names, and the tensors that no
            partition uses.
        partitions: `partition_state` of front, middle and back.

    Returns:
        The model's state dict, and the bottleneck's.

    Raises:
        ValueError: a name that the model does not have.
    """
    full = dict(initial)
    joined, bottleneck = split_bottleneck({name: t for state in partitions for name, t in state.items()})
    unknown = joined.keys() - full.keys()
    if unknown:
        raise ValueError(f"the model has no {', '.join(sorted(unknown)[:3])}")
    full.update(joined)
    return full, bottleneck


def state_digest(state: Mapping[str, Tensor]) -> str:
    """Return 64 hex digits that are equal for equal states: the same names, dtypes, shapes and bytes.

    Independent of the order of names, of the device and of the memory format.
    """
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().to("cpu").contiguous()
        digest.update(f"{name}\x1f{tensor.dtype}\x1f{tuple(tensor.shape)}\x1e".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()

"""What training a partition takes in memory, found before anything is allocated.

One chunk goes forward on tensors that have shapes and a device and no data (torch's fake tensors), and what autograd
would keep of it for the backward pass is added up: the very operators that the device will run, so half precision
under autocast and attention with or without its S × S matrix come out as they are.
"""

import copy
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from typing import Final

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from common.errors import UserError
from common.model_spec import ModelSpec
from common.models import build_model, is_registered
from common.optim import OptimSpec
from common.propagate import TensorInfo

__all__ = ["TrainingBytes", "model_bytes", "training_bytes"]

# As measured, see tests/common/test_memory.py: without them the estimate is 0 to 30 % below the truth.
_LIBRARIES: Final = 64 << 20
_UNUSED: Final = 0.1


@dataclass(frozen=True, kw_only=True)
class TrainingBytes:
    """What a partition takes while it trains, in bytes.

    Attributes:
        parameters: its weights.
        gradients: of the weights.
        optimizer: momenta, and what a step of the optimizer needs besides.
        buffers: running statistics and the like, and the copy of them that a step can be undone from.
        activations: what all chunks in flight keep for their backward passes, their inputs and outputs included.
        working: what the largest operation takes for itself.
        queues: chunks that have come and are not computed yet, or are computed and have not left.
        overhead: what libraries keep for themselves, and what lies unused between tensors.
    """

    parameters: int
    gradients: int
    optimizer: int
    buffers: int
    activations: int
    working: int
    queues: int
    overhead: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum(getattr(self, field.name) for field in fields(self))


def training_bytes(
    partition: nn.Module,
    inputs: Sequence[TensorInfo],
    *,
    chunk_size: int,
    in_flight: int,
    optim: OptimSpec,
    tokens: int | None = None,
    device: torch.device | None = None,
    amp: torch.dtype | None = None,
) -> TrainingBytes:
    """Estimate what training a partition takes on a device.

    Nothing of the partition changes, and nothing is allocated but the structure of a copy.

    Args:
        partition: takes the inputs and returns a tuple of tensors. Its own tensors may be on the meta device.
        inputs: what it takes.
        chunk_size: samples in the largest chunk.
        in_flight: most chunks between forward and backward.
        optim: what it is trained with.
        tokens: of each sample; None for the most.
        device: where it will train; the CPU unless given. A GPU must be there.
        amp: the type of autocast, or None.

    Raises:
        UserError: it does not run on such inputs, or takes more than any machine has.
    """
    device = device or torch.device("cpu")
    fake = FakeTensorMode()
    fake.cache_enabled = False  # it is the process's, and would grow with every other job
    try:
        with fake:
            trial = _structure(partition, device).train()
            chunk = [
                torch.empty(info.batched(chunk_size, tokens), dtype=info.dtype, device=device)
                for info in inputs
            ]
            kept, boundary = _kept_bytes(trial, chunk, [info.requires_grad for info in inputs], amp)
    except (RuntimeError, ValueError, AssertionError, TypeError, IndexError, OverflowError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"the memory for chunks of {chunk_size} samples cannot be told: {reason}") from error
    trained = [parameter for parameter in trial.parameters() if parameter.requires_grad]
    parameters, gradients = _bytes_of(trial.parameters()), _bytes_of(trained)
    found = {
        "parameters": parameters,
        "gradients": gradients,
        "optimizer": _optimizer_bytes(optim, gradients, max(map(_bytes, trained), default=0), device),
        "buffers": 2 * _bytes_of(trial.buffers()),
        "activations": in_flight * sum(kept),
        # A backward operation has the gradient of its output, that of its input, and often one of them in another
        # layout.
        "working": 3 * max(kept, default=0),
        "queues": in_flight * boundary,
    }
    return TrainingBytes(**found, overhead=_LIBRARIES + round(_UNUSED * sum(found.values())))


def model_bytes(spec: ModelSpec) -> int | None:
    """Return what the whole of a model takes, parameters and buffers, before it is built.

    Returns:
        Bytes; None for a model that can only be told by building it: those of the server's owner, whose size is the
        owner's to know, and torchvision's regnets, of which the largest has 2.6 GB.

    Raises:
        UserError: as `build_model`.
    """
    if is_registered(spec.name):
        return None
    try:
        model = build_model(replace(spec, weights=None), device="meta")
    except UserError as error:
        if isinstance(error.__cause__, NotImplementedError):  # it looks at numbers while it is built
            return None
        raise
    return _bytes_of((*model.parameters(), *model.buffers()))


def _structure(partition: nn.Module, device: torch.device) -> nn.Module:
    """Copy a module with fake tensors in place of its own."""
    plain = (
        value
        for module in partition.modules()
        for value in vars(module).values()
        if isinstance(value, Tensor)
    )
    memo: dict[int, object] = {}
    for tensor in (*partition.parameters(), *partition.buffers(), *plain):
        fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
        memo[id(tensor)] = (
            nn.Parameter(fake, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fake
        )
    return copy.deepcopy(partition, memo)


def _kept_bytes(
    trial: nn.Module, chunk: Sequence[Tensor], needs_grad: Sequence[bool], amp: torch.dtype | None
) -> tuple[list[int], int]:
    """Run a chunk forward; return the bytes of each storage that lives on to its backward, and of what crosses."""
    own = {tensor.untyped_storage()._cdata for tensor in (*trial.parameters(), *trial.buffers())}
    kept: dict[int, torch.UntypedStorage] = {}  # the storages themselves, so that no address comes twice

    def keep(tensor: Tensor) -> None:
        # It is not given back: an operation's own output would keep the operation, and so itself, for ever.
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage

    entries = [tensor.requires_grad_(needed) for tensor, needed in zip(chunk, needs_grad, strict=True)]
    autocast = nullcontext() if amp is None else torch.autocast(chunk[0].device.type, dtype=amp)
    with (
        torch.enable_grad(),
        torch.autograd.graph.saved_tensors_hooks(keep, _never),
        autocast,
    ):
        # Through a view, as `Stage` does: an operation in place may not touch a leaf.
        outputs = trial(*(tensor.view_as(tensor) for tensor in entries))
    # What leaves is fp32, whatever it was computed in.
    outputs = [out.float() if out.is_floating_point() else out for out in outputs]
    for tensor in (*entries, *outputs):
        keep(tensor)
    return [storage.nbytes() for storage in kept.values()], sum(map(_bytes, (*entries, *outputs)))


def _never(kept: object) -> Tensor:
    raise AssertionError("nothing goes backward here")


def _optimizer_bytes(optim: OptimSpec, gradients: int, largest: int, device: torch.device) -> int:
    if optim.name == "sgd":
        return gradients if optim.momentum else 0
    # AdamW divides by a tensor of its own making: one for each parameter in turn, or on a GPU for all at once.
    return 2 * gradients + (largest if device.type == "cpu" else gradients)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _bytes_of(tensors: Iterable[Tensor]) -> int:
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in tensors}
    return sum(storage.nbytes() for storage in storages.values())

"""Whether a partition runs faster on contiguous or channels-last tensors: measured, not guessed.

On CPUs with wide vectors channels-last spares convolutions two copies each, and MobileNetV2 a third of its
time; on others, or for other models, it can lose. The two give results that differ in rounding, so the
choice is part of a run's settings: measured once, then told to whoever must repeat it.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final

import torch
from torch import Tensor, nn

__all__ = ["FORMATS", "SAMPLES", "FormatChoice", "choose_memory_format", "faster_format"]

FORMATS: Final[Mapping[str, torch.memory_format]] = MappingProxyType(
    {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
)
"""The formats by name; the option `auto` stands for measuring."""

SAMPLES: Final = 4
"""Of a chunk, enough to order the formats, and cheap."""


@dataclass(frozen=True, kw_only=True)
class FormatChoice:
    """What was chosen and why.

    Attributes:
        name: `contiguous` or `channels_last`.
        seconds: the best time of each format, empty where nothing was measured.
    """

    name: str
    seconds: Mapping[str, float] = field(default_factory=dict)

    @property
    def format(self) -> torch.memory_format:
        """The format as torch names it."""
        return FORMATS[self.name]


def faster_format(run: Callable[[torch.memory_format], object], *, budget_s: float = 1.5) -> FormatChoice:
    """Time `run` in each format, in turns, and choose the one with the shortest best time.

    Args:
        run: does the work once in the format given. Its first call in each format is not timed.
        budget_s: no further round starts after this many seconds; one round is always timed.
    """
    begin_s = time.perf_counter()
    for memory_format in FORMATS.values():
        run(memory_format)
    best_s = dict.fromkeys(FORMATS, float("inf"))
    while True:
        for name, memory_format in FORMATS.items():
            start_s = time.perf_counter()
            run(memory_format)
            best_s[name] = min(best_s[name], time.perf_counter() - start_s)
        if time.perf_counter() - begin_s + sum(best_s.values()) > budget_s:
            return FormatChoice(name=min(best_s, key=best_s.__getitem__), seconds=best_s)


def choose_memory_format(
    partition: nn.Module,
    inputs: Sequence[Tensor],
    *,
    option: str = "auto",
    autocast: torch.dtype | None = None,
    budget_s: float = 1.5,
) -> FormatChoice:
    """Choose the format in which a partition trains fastest on chunks like these.

    Runs forward and backward on a copy: neither the partition, nor random numbers to come, nor the inputs
    change. Where no input is an image batch there is nothing to choose, and `contiguous` it is.

    Args:
        partition: takes the inputs and returns a tensor or a tuple of tensors.
        inputs: one chunk, on the partition's device; the first 4 samples are used.
        option: `contiguous` or `channels_last` to have that one without measuring, or `auto`.
        autocast: run under autocast to this type, as training will.
        budget_s: see `faster_format`.

    Raises:
        ValueError: for another option.
    """
    if option in FORMATS:
        return FormatChoice(name=option)
    if option != "auto":
        raise ValueError(f"there is no memory format {option!r}: use auto, {', '.join(FORMATS)}")
    if not any(tensor.dim() == 4 for tensor in inputs):
        return FormatChoice(name="contiguous")
    device = inputs[0].device
    trial = copy.deepcopy(partition).train()
    few = [tensor.detach()[:SAMPLES] for tensor in inputs]

    def run(memory_format: torch.memory_format) -> None:
        trial.to(memory_format=memory_format)  # type: ignore[call-overload]
        leaves = [_leaf(tensor, memory_format) for tensor in few]
        with torch.enable_grad(), torch.autocast(device.type, autocast, enabled=autocast is not None):
            outputs = trial(*leaves)
        outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
        attached = [output for output in outputs if output.requires_grad]
        torch.autograd.backward(attached, [torch.ones_like(output) for output in attached])
        trial.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        return faster_format(run, budget_s=budget_s)


def _leaf(tensor: Tensor, memory_format: torch.memory_format) -> Tensor:
    if tensor.dim() == 4:
        tensor = tensor.contiguous(memory_format=memory_format)
    return tensor.requires_grad_() if tensor.is_floating_point() else tensor

"""Random numbers for stochastic rounding: cheap to draw, and a function of the seed alone.

Drawing fresh numbers costs more than all the rest of quantization. So they come from one fixed table, of
which each block of a tensor takes a stretch that starts where the seed says. The table holds evenly spaced
numbers, each once, in a random order: over all starting points rounding is unbiased to 1 part in `PERIOD`.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import torch

from wire.codecs.base import mixed

if TYPE_CHECKING:
    from torch import Tensor

PERIOD = 1 << 19
"""How many different numbers the table holds."""


def dither(seed: int, count: int, device: torch.device) -> Tensor:
    """Numbers spread evenly over (0, 1), which make rounding down stochastic when added first.

    Args:
        seed: of the tensor.
        count: how many.
        device: where they are needed.

    Returns:
        Float32 `[count]`.
    """
    numbers = table(device)
    return torch.cat([numbers[start : start + PERIOD] for start in dither_starts(seed, count)])[:count]


def dither_starts(seed: int, count: int) -> list[int]:
    """Where in the table each block of `PERIOD` numbers starts, for `count` numbers."""
    key = mixed(seed)
    return [mixed(key + block) % PERIOD for block in range(-(-count // PERIOD))]


@cache
def table(device: torch.device) -> Tensor:
    """Float32 `[2 * PERIOD]`: all numbers, twice so that every block is contiguous; not to be changed."""
    order = torch.randperm(PERIOD, generator=torch.Generator().manual_seed(0))
    return ((order + 0.5) / PERIOD).repeat(2).to(device)

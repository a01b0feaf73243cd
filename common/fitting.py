"""Fits an inserted pair to give back what crosses without it, before any training of the model."""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.nn.modules.batchnorm import _BatchNorm

from common.decay_bottleneck import start_rotated
from common.inputs import padding_mask
from common.linear_bottleneck import start_from_tokens
from common.narrowing import LAST, Narrowing, narrowing_layers
from common.partition import Partition
from common.seeding import derive_seed

OnStep: TypeAlias = Callable[[int, int, float], None]
"""Told a step's number, how many there are, and the relative error on that step's batch."""

_HELD_OUT = 8


@dataclass(frozen=True, kw_only=True)
class Fit:
    """What fitting one pair came to.

    Attributes:
        before: relative error of the pair as it was, on batches that are not fitted to.
        after: the same in the end, at most `before`: a fit that makes it worse is undone.
        steps: of Adam that were made; 0 where the best pair was computed outright.
        undone: whether it was.
    """

    before: float
    after: float
    steps: int
    undone: bool


def fit_pair(
    encoder: nn.Module,
    decoder: nn.Module,
    batches: Sequence[Tensor],
    *,
    steps: int,
    lr: float,
    seed: int,
    on_step: OnStep | None = None,
) -> Fit:
    """Fit encoder and decoder to give the least squared error of what comes back.

    Linear pairs are put onto the principal axes of all the batches, where it is least for those at any width, so that
    one that narrows while training loses nothing at first; it is judged at its last width. Convolutions go down with
    Adam, its rate falling to nothing.

    Args:
        encoder: before the cut; changed in place.
        decoder: after it.
        batches: what crosses without them; every eighth batch, but for a single one, is held out to judge by.
        steps: of Adam, for convolutions.
        lr: its first rate.
        seed: of the order of batches.
        on_step: is told each step.
    """
    every = min(_HELD_OUT, len(batches))
    held_out = batches[every - 1 :: every]  # not the first, which the pair may have been started from
    fitted = [batch for index, batch in enumerate(batches, 1) if index % every] or batches
    before = relative_error(encoder, decoder, held_out)
    kept = [{name: t.clone() for name, t in coder.state_dict().items()} for coder in (encoder, decoder)]
    first = next(encoder.children())
    if isinstance(first, Narrowing):
        start_rotated(encoder, decoder, fitted)
    elif isinstance(first, nn.Linear):
        start_from_tokens(encoder, decoder, fitted)
    else:
        _descend(encoder, decoder, fitted, steps=steps, lr=lr, seed=seed, on_step=on_step)
    after = relative_error(encoder, decoder, held_out)
    undone = not after <= before
    if undone:
        for coder, state in zip((encoder, decoder), kept, strict=True):
            coder.load_state_dict(state)
    steps = 0 if isinstance(first, Narrowing | nn.Linear) else steps
    return Fit(before=before, after=before if undone else after, steps=steps, undone=undone)


def _descend(
    encoder: nn.Module,
    decoder: nn.Module,
    batches: Sequence[Tensor],
    *,
    steps: int,
    lr: float,
    seed: int,
    on_step: OnStep | None,
) -> None:
    optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    drawn = torch.Generator().manual_seed(derive_seed(seed, "fit"))
    order: list[int] = []
    for step in range(1, steps + 1):
        order = order or torch.randperm(len(batches), generator=drawn).tolist()
        batch = batches[order.pop()]
        loss = mse_loss(decoder(encoder(batch)), batch)
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if on_step is not None:
            on_step(step, steps, math.sqrt(loss.item() / max(batch.square().mean().item(), 1e-30)))


@torch.no_grad()
def relative_error(encoder: nn.Module, decoder: nn.Module, batches: Sequence[Tensor]) -> float:
    """Return the norm of what does not come back over the norm of what crosses, at a narrowing pair's last width.

    Args:
        encoder: before the cut.
        decoder: after it.
        batches: what crosses without them.
    """
    lost = whole = 0.0
    for batch in batches:
        tensor = batch
        for layer in (*encoder.children(), *decoder.children()):
            forward = (
                partial(layer.forward_as_after, committed=LAST) if isinstance(layer, Narrowing) else layer
            )
            tensor = forward(tensor)
        lost += (tensor - batch).double().square().sum().item()
        whole += batch.double().square().sum().item()
    return math.sqrt(lost / whole) if whole else 0.0


def copy_to_record(partition: Partition) -> Partition:
    """Copy a partition to run what crosses out of, for running statistics move.

    It normalizes by the batch, as in training; where nothing does that it drops nothing out either, for the noise only
    blurs what a pair is fitted to.
    """
    copied = copy.deepcopy(partition)
    return copied.train(any(isinstance(module, _BatchNorm) for module in copied.modules()))


def without_padding(tensor: Tensor, encoder: nn.Module, inputs: Sequence[Tensor]) -> Tensor:
    """Leave padding out of what an encoder is fitted to: what a model makes of it means nothing.

    Args:
        tensor: what crosses, ``[B, S, H]`` for text.
        encoder: what it is for; one that works along S needs every position.
        inputs: what the front was given; the mask among them says which tokens are no padding.

    Returns:
        The tokens, ``[1, N, H]``, or the tensor itself where nothing is to be left out.
    """
    mask = padding_mask(inputs)
    along_sequence = any(layer.along_sequence for layer in narrowing_layers(encoder))
    if mask is None or along_sequence or tensor.shape[:2] != mask.shape:
        return tensor
    return tensor[mask][None]

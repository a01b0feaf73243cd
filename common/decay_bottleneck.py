"""The ``decay`` bottleneck: a square pair that passes everything on at first, and narrows while training.

    [B, S, H] → encoder: H→h, then S→s ──cut──▶ decoder: s→S, then h→H → [B, S, H]

Either axis may narrow, or both, each at its own rate; see `common.narrowing`. What crosses is really narrow: the
part that was dropped is neither computed nor sent.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from common.bottleneck_options import split_options
from common.errors import UserError
from common.linear_bottleneck import check_weights, described, principal_axes, set_pair
from common.narrowing import LAST, Decay, Narrowing

STARTS = ("identity", "pca")

_KEYS = ("rate", "steps", "iterations", "l1", "rate2", "start")
_GRAMMAR = (
    "write rate=, steps=, iterations= and, if wanted, l1=, rate2= and start=identity or start=pca, as in "
    "decay:rate=0.9,steps=300,iterations=9"
)


@dataclass(frozen=True, kw_only=True)
class DecayOptions:
    """What ``decay:rate=0.9,steps=300,iterations=9`` says.

    Attributes:
        features: how the hidden axis falls.
        sequence: how the sequence axis falls.
        l1: weight of the penalty on what goes next.
        start: one of `STARTS`.
    """

    features: Decay
    sequence: Decay
    l1: float
    start: str

    def narrow_shape(self, shape: Sequence[int], committed: int) -> tuple[int, ...]:
        """Return what crosses of a sample of a shape, after so many committed steps."""
        *rest, full = shape
        if self.sequence.rate < 1:
            rest = [self.sequence.width(rest[0], committed)]
        return (*rest, self.features.width(full, committed))


def parse_decay(args: str) -> DecayOptions:
    """Parse what follows the colon.

    Raises:
        UserError: it does not parse; points at the character.
    """
    options = split_options("decay", args, _KEYS, _GRAMMAR)
    rates = {"rate": 0.9, "rate2": 1.0}
    for key in rates:
        rate = options.decimal(key)
        if rate is None:
            continue
        if not 0 < rate <= 1:
            raise options.wrong(options.named[key][1], f"{key} must be above 0 and at most 1")
        rates[key] = rate
    if min(rates.values()) == 1:
        raise options.wrong(options.named["rate"][1], "a rate of 1 narrows nothing without a rate2 below 1")
    l1 = options.decimal("l1") or 0.0
    decay = Decay(
        rate=rates["rate"], steps=options.whole("steps", 300), iterations=options.whole("iterations", 9)
    )
    return DecayOptions(
        features=decay,
        sequence=replace(decay, rate=rates["rate2"]),
        l1=l1,
        start=options.choice("start", STARTS, "identity"),
    )


def build_decay(
    options: DecayOptions, cut: int, shape: Sequence[int]
) -> tuple[nn.Sequential, nn.Sequential, Callable[[int], tuple[int, ...]]]:
    """Build encoder and decoder for a tensor, the identity both.

    Returns:
        The two, and the shape of a sample between them as a function of the committed steps.

    Raises:
        UserError: the tensor has no sequence axis of a fixed length where that is to narrow, is too wide, or
            nothing would be left of it.
    """
    if options.sequence.rate < 1 and (len(shape) != 2 or shape[0] < 1):
        raise UserError(
            f"decay with rate2 narrows the sequence axis, which needs a fixed length S of [B,S,H]; at cut {cut} "
            f"there is {described(shape)}: leave rate2 out, or pad all samples to one length"
        )
    last = options.narrow_shape(shape, LAST)
    if min(last[-2:]) < 1:
        raise UserError(
            f"decay leaves nothing of the tensor at cut {cut}, {described(shape)}; use fewer iterations or a rate "
            "nearer to 1"
        )
    encoder, decoder = nn.Sequential(), nn.Sequential()
    for axis, decay in ((-1, options.features), (-2, options.sequence)):
        if decay.rate < 1:
            full, along_sequence = shape[axis], axis == -2
            check_weights("decay", cut, shape, full**2)
            down, up = (
                Narrowing(full, decay, options.l1, encodes=encodes, along_sequence=along_sequence)
                for encodes in (True, False)
            )
            encoder.append(down)
            decoder.insert(0, up)
    return encoder, decoder, lambda committed: options.narrow_shape(shape, committed)


@torch.no_grad()
def start_rotated(encoder: nn.Module, decoder: nn.Module, tokens: Iterable[Tensor]) -> None:
    """Turn a square pair onto the principal axes of some tensors, so that what goes first varies least.

    It still passes everything on, and no other pair of one axis loses less of those tensors at any width.

    Args:
        encoder: of `build_decay`.
        decoder: of `build_decay`.
        tokens: what crosses without them, each ``[B, S, H]`` or ``[B, H]``; gone through once an axis.
    """
    for down, up in zip(encoder.children(), reversed(list(decoder.children())), strict=True):
        assert isinstance(down, Narrowing)
        axis = -2 if down.along_sequence else -1
        mean, basis = principal_axes(some.movedim(axis, -1).flatten(0, -2) for some in tokens)
        set_pair(down, up, basis, mean)
        tokens = _Through(down, tokens)


class _Through:
    """Tensors as a layer passes them on, made anew each time they are gone through."""

    def __init__(self, layer: nn.Module, tensors: Iterable[Tensor]) -> None:
        self._layer, self._tensors = layer, tensors

    def __iter__(self) -> Iterator[Tensor]:
        return map(self._layer, self._tensors)

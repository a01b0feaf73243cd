"""The ``conv`` bottleneck: convolutions whose stride is their kernel before a cut, their transposes after it.

A pair ``CxK`` takes a map ``[B, C0, H, W]`` to ``[B, C, H//K, W//K]`` and back. Several pairs nest:
``32x4/16x1``.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from common.block_transpose import BlockTranspose2d
from common.bottleneck_options import not_expected
from common.errors import UserError

_PAIR = re.compile(r"([1-9]\d{0,5})x([1-9]\d{0,3})", re.ASCII)
_PART_OF_PAIR = re.compile(r"([1-9]\d{0,5}x?)?", re.ASCII)
_GRAMMAR = "write CHANNELSxKERNEL for each cut, as in conv:20x3,360x1; / nests pairs, as in 32x4/16x1"

# MobileNetV2's widths, 32 and 1280 channels, are what the defaults were made for; other maps scale them.
_DEFAULTS = {
    "conv": ((((20, 32), 3),), (((360, 1280), 1),)),
    "conv2": ((((32, 32), 4), ((16, 32), 1)), (((360, 1280), 1), ((100, 1280), 1))),
}

MOST_PAIRS = 8
"""Pairs nested at one cut."""

MOST_WEIGHTS = 1 << 26
"""Weights of one convolution; a bottleneck that comes near it is no bottleneck."""


@dataclass(frozen=True)
class Pair:
    """One convolution and its transpose.

    Attributes:
        channels: that cross.
        kernel: side and stride.
    """

    channels: int
    kernel: int


def parse_pairs(kind: str, args: str) -> tuple[tuple[Pair, ...], ...]:
    """Parse what follows the colon of ``conv:20x3,360x1``.

    Args:
        kind: ``conv`` or ``conv2``, for messages.
        args: the pairs of both cuts, or of one; empty for the defaults.

    Returns:
        The pairs of each cut named, outermost first.

    Raises:
        UserError: it does not parse; points at the character.
    """
    cuts: list[tuple[Pair, ...]] = []
    pairs: list[Pair] = []
    place = 0
    while args:
        match = _PAIR.match(args, place)
        if match is None:
            part = _PART_OF_PAIR.match(args, place)
            raise not_expected(kind, args, part.end() if part else place, _GRAMMAR)
        pairs.append(Pair(int(match[1]), int(match[2])))
        place = match.end()
        mark = args[place : place + 1]
        if mark in (",", ""):
            if len(pairs) > MOST_PAIRS:
                raise UserError(f"{kind} nests at most {MOST_PAIRS} pairs at a cut, not {len(pairs)}")
            cuts.append(tuple(pairs))
            pairs = []
        if mark == "":
            break
        if mark not in (",", "/") or (mark == "," and len(cuts) == 2):
            raise not_expected(kind, args, place, _GRAMMAR)
        place += 1
    return tuple(cuts)


def choose_pairs(kind: str, args: str, cut: int, shape: Sequence[int]) -> tuple[Pair, ...]:
    """Return the pairs for one map.

    Args:
        kind: ``conv`` or ``conv2``.
        args: explicit pairs, or empty for the defaults: MobileNetV2's, their widths scaled to the map's and
            their kernels limited to its size.
        cut: 1 or 2.
        shape: of a sample's map, ``(C, H, W)``.

    Raises:
        UserError: the map has another number of dimensions, or is smaller than a kernel or narrower than what
            would cross.
    """
    if len(shape) != 3:
        raise UserError(
            f"{kind} needs maps [C,H,W] at a cut, and cut {cut} has {list(shape)}; use codecs alone there"
        )
    channels, height, width = shape
    given = parse_pairs(kind, args)
    if given:
        pairs = given[min(cut, len(given)) - 1]
    else:
        side = min(height, width)
        pairs = ()
        for (part, whole), kernel in _DEFAULTS[kind][cut - 1]:
            pairs += (Pair(max(1, round(channels * part / whole)), min(kernel, side)),)
            side //= pairs[-1].kernel
    for pair in pairs:
        size = pair.kernel
        if min(height, width) < size:
            raise UserError(
                f"kernel {size} of {kind} is larger than the map at cut {cut}, {height}x{width}; use a smaller "
                "one or larger images"
            )
        if pair.channels > channels * size**2 or pair.channels * channels * size**2 > MOST_WEIGHTS:
            raise UserError(
                f"{pair.channels}x{size} of {kind} is too wide for the map at cut {cut}, {channels} channels of "
                f"{height}x{width}; use fewer channels or a smaller kernel"
            )
        channels, height, width = pair.channels, height // size, width // size
    return pairs


def narrow_shape(pairs: Sequence[Pair], shape: Sequence[int]) -> tuple[int, int, int]:
    """Return the shape ``(C, H, W)`` that crosses."""
    channels, height, width = shape
    for pair in pairs:
        channels, height, width = pair.channels, height // pair.kernel, width // pair.kernel
    return channels, height, width


def build_coders(
    pairs: Sequence[Pair], shape: Sequence[int], generator: torch.Generator
) -> tuple[nn.Sequential, nn.Sequential]:
    """Build the encoder of maps of a shape ``(C, H, W)``, and the decoder back to exactly that shape."""
    channels, height, width = shape
    encoder: list[nn.Module] = []
    decoder: list[nn.Module] = []
    for pair in pairs:
        size = pair.kernel
        # The rows and columns that no kernel covers come back from the transpose's output padding.
        uncovered = (height % size, width % size)
        # Made without data, so that torch's default generator is not drawn from.
        with torch.device("meta"):
            down = nn.Conv2d(channels, pair.channels, size, size)
            up = BlockTranspose2d(pair.channels, channels, size, uncovered)
        _start_near_identity(down.to_empty(device="cpu"), up.to_empty(device="cpu"), generator)
        encoder.append(down)
        decoder.insert(0, up)
        channels, height, width = pair.channels, height // size, width // size
    return nn.Sequential(*encoder), nn.Sequential(*decoder)


@torch.no_grad()
def _start_near_identity(down: nn.Conv2d, up: nn.ConvTranspose2d, generator: torch.Generator) -> None:
    """Start encoder and decoder as an orthonormal projection of local averages and its transpose.

    Against torch's own first weights, MobileNetV2 at 64 px, SGD with momentum: put into a model trained for
    500 steps on CIFAR-10 (37.0 % accuracy) it keeps 29.5 % (torch's: 10.3 %) and has 35.7 % after 100 more
    steps (23.5 %); from random weights on digits the loss after 160 steps is 0.131 and 0.175 (0.158 and
    0.194).
    """
    basis = smooth_basis(down.out_channels, down.in_channels, down.kernel_size[0], generator)
    for layer in (down, up):
        layer.weight.copy_(basis)
        assert layer.bias is not None
        layer.bias.zero_()


def smooth_basis(count: int, channels: int, kernel: int, generator: torch.Generator) -> Tensor:
    """Return orthonormal patterns over a patch, the smoothest first.

    Args:
        count: of patterns, no more than the patch has values.
        channels: of the patch.
        kernel: side of the patch.
        generator: chooses the mixture of channels.

    Returns:
        ``[count, channels, kernel, kernel]``.
    """
    position = torch.arange(kernel, dtype=torch.float64) + 0.5
    waves = torch.cos(torch.outer(torch.arange(kernel), position) * torch.pi / kernel)
    waves = waves / waves.norm(dim=1, keepdim=True)
    order = sorted((i + j, max(i, j), i, j) for i in range(kernel) for j in range(kernel))
    patterns: list[Tensor] = []
    for done, (_, _, i, j) in zip(range(0, count, channels), order, strict=False):
        left = min(channels, count - done)
        mix = torch.randn(channels, left, dtype=torch.float64, generator=generator)
        patterns.append(torch.einsum("cp,h,w->pchw", torch.linalg.qr(mix).Q, waves[i], waves[j]))
    return torch.cat(patterns).to(torch.float32)


@torch.no_grad()
def start_from_maps(encoder: nn.Module, decoder: nn.Module, maps: Tensor) -> None:
    """Start a pair, or nested pairs, from the principal components of some maps.

    Of a convolution's random or trained filters a few mixtures carry nearly all the energy, and a random choice of
    mixtures misses half of it: for MobileNetV2's first convolution on CIFAR-10 at 96 px, 20 channels of kernel 3
    leave 47 % of the energy out as `build_coders` starts them, 0.2 % as this does.

    Args:
        encoder: of `build_coders`.
        decoder: of `build_coders`.
        maps: what crosses without them, ``[B, C, H, W]``.
    """
    assert isinstance(encoder, nn.Sequential)
    assert isinstance(decoder, nn.Sequential)
    for down, up in zip(encoder, reversed(list(decoder)), strict=True):
        assert isinstance(down, nn.Conv2d)
        assert isinstance(up, nn.ConvTranspose2d)
        mean = maps.mean(dim=(0, 2, 3))
        basis = principal_basis(maps - mean[:, None, None], down.out_channels, down.kernel_size[0])
        for layer in (down, up):
            layer.weight.copy_(basis)
        assert down.bias is not None
        assert up.bias is not None
        down.bias.copy_(-torch.einsum("pchw,c->p", basis, mean))
        up.bias.copy_(mean)
        maps = down(maps)


def principal_basis(maps: Tensor, count: int, kernel: int) -> Tensor:
    """Return orthonormal patterns over a patch that carry most of some maps' energy, the greatest first.

    Draws from torch's default generator. Source: Halko, Martinsson and Tropp 2011, arXiv:0909.4061.

    Args:
        maps: ``[B, C, H, W]``, of mean 0.
        count: of patterns.
        kernel: side of the patch.

    Returns:
        ``[count, C, kernel, kernel]``.
    """
    patches = functional.unfold(maps, kernel, stride=kernel).transpose(1, 2).flatten(0, 1)
    # A few more than are wanted make those exact; all of them would take ten times as long.
    patterns: Tensor = torch.svd_lowrank(patches, q=min(count + 8, *patches.shape), niter=2)[2][:, :count]
    found = patterns.shape[1]
    if found < count:  # fewer patches than patterns: any others beside those will do
        others = torch.randn(patches.shape[1], count - found)
        patterns = torch.linalg.qr(torch.cat([patterns, others], dim=1)).Q
    return patterns.T.reshape(count, maps.shape[1], kernel, kernel)

"""The ``linear`` bottleneck: a linear layer H→r before a cut, a linear layer r→H after it.

Works on tokens ``[B, S, H]`` and on features ``[B, H]``. Both layers have biases: with the principal
components of centred tensors the decoder's is the mean, and the encoder's takes the mean away, so that what
crosses is centred and a quantizer behind it spends no levels on a constant.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from common.bottleneck_options import split_options
from common.errors import UserError

STARTS = ("pca", "identity")

MOST_WEIGHTS = 1 << 26
"""Weights of one layer; a bottleneck that comes near it is no bottleneck."""

_GRAMMAR = "write a width, or one for each cut, then perhaps start=identity or start=pca, as in linear:64,32"
_DEFAULT_SHARE = 4


@dataclass(frozen=True)
class LinearOptions:
    """What ``linear:64,32,start=pca`` says.

    Attributes:
        widths: of each cut, or one for both; empty for a quarter of what crosses.
        start: one of `STARTS`: from the principal components of samples, or the identity's first rows.
    """

    widths: tuple[int, ...] = ()
    start: str = "pca"


def parse_linear(args: str) -> LinearOptions:
    """Parse what follows the colon.

    Raises:
        UserError: it does not parse; points at the character.
    """
    options = split_options("linear", args, ("start",), _GRAMMAR, values=2)
    return LinearOptions(
        widths=tuple(options.as_whole(text, place) for text, place in options.values),
        start=options.choice("start", STARTS, "pca"),
    )


def choose_width(options: LinearOptions, cut: int, shape: Sequence[int]) -> int:
    """Return the width that crosses.

    Args:
        options: as parsed.
        cut: 1 or 2.
        shape: of a sample's tensor; the last axis is narrowed.

    Raises:
        UserError: the tensor is narrower.
    """
    full = shape[-1]
    widths = options.widths or (max(1, full // _DEFAULT_SHARE),)
    width = widths[min(cut, len(widths)) - 1]
    if width > full:
        raise UserError(
            f"linear:{width} is wider than the tensor at cut {cut}, {described(shape)}; use a width up to {full}"
        )
    check_weights("linear", cut, shape, width * full)
    return width


def check_weights(kind: str, cut: int, shape: Sequence[int], weights: int) -> None:
    """Refuse a layer that is larger than any bottleneck should be.

    Raises:
        UserError: it is.
    """
    if weights > MOST_WEIGHTS:
        raise UserError(
            f"{kind} would take {weights} weights at cut {cut}, {described(shape)}, and the most is {MOST_WEIGHTS}; "
            "use codecs or another cut"
        )


def described(shape: Sequence[int]) -> str:
    """Write a sample's shape with its batch, as in ``[B,128,768]``."""
    return f"[B,{','.join(map(str, shape))}]"


def build_linear(full: int, width: int) -> tuple[nn.Sequential, nn.Sequential]:
    """Build encoder and decoder that pass the first `width` of `full` features on as they are."""
    # Made without data, so that torch's default generator is not drawn from.
    with torch.device("meta"):
        down, up = nn.Linear(full, width), nn.Linear(width, full)
    down, up = down.to_empty(device="cpu"), up.to_empty(device="cpu")
    set_pair(down, up, torch.eye(width, full), torch.zeros(full))
    return nn.Sequential(down), nn.Sequential(up)


@torch.no_grad()
def start_from_tokens(encoder: nn.Module, decoder: nn.Module, tokens: Iterable[Tensor]) -> None:
    """Start a pair from the principal components of some tensors; no other linear pair loses less of them.

    Args:
        encoder: of `build_linear`.
        decoder: of `build_linear`.
        tokens: what crosses without them, each ``[..., H]``.
    """
    (down,), (up,) = encoder.children(), decoder.children()
    mean, axes = principal_axes(some.flatten(0, -2) for some in tokens)
    set_pair(down, up, axes[: down.get_parameter("weight").shape[0]], mean)


@torch.no_grad()
def set_pair(down: nn.Module, up: nn.Module, basis: Tensor, mean: Tensor) -> None:
    """Make two linear layers the projection on some orthonormal rows, about a mean, and its transpose.

    Args:
        down: with ``weight`` ``[r, H]`` and ``bias``.
        up: with ``weight`` ``[H, r]`` and ``bias``.
        basis: ``[r, H]``.
        mean: ``[H]``.
    """
    for layer, weight, bias in ((down, basis, -basis @ mean), (up, basis.T, mean)):
        layer.get_parameter("weight").copy_(weight)
        layer.get_parameter("bias").copy_(bias)


def principal_axes(batches: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Return the mean of some vectors, and orthonormal axes of their spread, the widest first.

    However few the vectors, there are as many axes as dimensions.

    Args:
        batches: the vectors, each ``[n, H]``; one of them at least.

    Returns:
        ``[H]`` and ``[H, H]``, an axis a row; float32.
    """
    count, shift = 0, torch.zeros(())
    total = outer = torch.zeros((), dtype=torch.float64)
    for rows in batches:
        if not count:
            shift = rows.double().mean(dim=0)  # squares of what lies far from 0 would drown the spread
        near = rows.double() - shift
        count, total, outer = count + len(rows), total + near.sum(dim=0), outer + near.T @ near
    off = total / count
    axes = torch.linalg.eigh(outer - count * torch.outer(off, off)).eigenvectors.flip(1).T
    return (shift + off).float(), axes.float().contiguous()

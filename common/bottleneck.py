"""Bottlenecks: trainable pairs of layers around a cut that make what crosses it narrow.

    front → encoder ──cut 1──▶ decoder → middle → encoder ──cut 2──▶ decoder → back

They are part of the model: trained with it, saved with it under ``bottleneck.``, and built alike on both
sides from the seed. A kind of bottleneck is one entry of `KINDS`.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor, nn

from common.conv_bottleneck import (
    build_coders,
    choose_pairs,
    narrow_shape,
    parse_pairs,
    start_from_maps,
)
from common.decay_bottleneck import DecayOptions, build_decay, parse_decay, start_rotated
from common.errors import UserError
from common.linear_bottleneck import (
    LinearOptions,
    build_linear,
    choose_width,
    described,
    parse_linear,
    start_from_tokens,
)
from common.partition import Partition, ShapeAfter, Split
from common.propagate import TensorInfo
from common.seeding import derive_seed
from common.weights import BOTTLENECK_PREFIX


@dataclass(frozen=True, kw_only=True)
class Coders:
    """What is inserted at a cut for one tensor.

    Attributes:
        encoder: before the cut.
        decoder: after it; gives back the tensor's own shape.
        crossing: what crosses between them in the first step.
        shape_after: a sample's shape as a function of the committed steps, where it changes.
    """

    encoder: nn.Module
    decoder: nn.Module
    crossing: TensorInfo
    shape_after: ShapeAfter | None = None


@dataclass(frozen=True)
class BottleneckSpec:
    """A parsed specification, such as ``conv:20x3,360x1``.

    Attributes:
        kind: a key of `KINDS`.
        args: what follows the colon, empty for the defaults.
    """

    kind: str
    args: str = ""


Build: TypeAlias = Callable[[BottleneckSpec, int, TensorInfo, torch.Generator], Coders]


def _check_conv(spec: BottleneckSpec) -> None:
    if spec.kind == "conv2" and spec.args:
        raise UserError(
            f"conv2 takes no widths; nest pairs in conv:{spec.args} with /, as in conv:32x4/16x1,360x1"
        )
    parse_pairs(spec.kind, spec.args)


def _build_conv(spec: BottleneckSpec, cut: int, info: TensorInfo, generator: torch.Generator) -> Coders:
    pairs = choose_pairs(spec.kind, spec.args, cut, info.shape)
    encoder, decoder = build_coders(pairs, info.shape, generator)
    crossing = replace(info, shape=narrow_shape(pairs, info.shape), requires_grad=True)
    return Coders(encoder=encoder, decoder=decoder, crossing=crossing)


def _build_linear(spec: BottleneckSpec, cut: int, info: TensorInfo, generator: torch.Generator) -> Coders:
    width = choose_width(parse_linear(spec.args), cut, info.shape)
    encoder, decoder = build_linear(info.shape[-1], width)
    crossing = replace(info, shape=(*info.shape[:-1], width), requires_grad=True)
    return Coders(encoder=encoder, decoder=decoder, crossing=crossing)


def _build_decay(spec: BottleneckSpec, cut: int, info: TensorInfo, generator: torch.Generator) -> Coders:
    options = parse_decay(spec.args)
    encoder, decoder, shape_after = build_decay(options, cut, info.shape)
    crossing = replace(info, requires_grad=True)
    if options.sequence.rate < 1:
        crossing = replace(crossing, token_dims=())  # a matrix has one length of sequences
    return Coders(encoder=encoder, decoder=decoder, crossing=crossing, shape_after=shape_after)


@dataclass(frozen=True, kw_only=True)
class Kind:
    """How a kind of bottleneck is checked and built.

    Attributes:
        check: raises UserError for arguments that do not parse.
        dims: the dimensions, with the batch's, of the tensors that get one; of several, the first that crosses.
        needs: the same in words.
        build: from the specification, the cut's number, the tensor, and a generator of first weights.
        from_samples: whether what the arguments say starts from what crosses.
        start: starts encoder and decoder anew from a tensor as it crosses without them.
    """

    check: Callable[[BottleneckSpec], object]
    dims: tuple[int, ...]
    needs: str
    build: Build
    from_samples: Callable[[BottleneckSpec], bool]
    start: Callable[[nn.Module, nn.Module, Tensor], None]


def _of_tokens(
    parse: Callable[[str], LinearOptions | DecayOptions],
    build: Build,
    start: Callable[[nn.Module, nn.Module, Iterable[Tensor]], None],
) -> Kind:
    """A kind for transformers, which starts from the principal axes of tokens or as the identity."""
    return Kind(
        check=lambda spec: parse(spec.args),
        dims=(3, 2),
        needs="tokens [B,S,H] or features [B,H]",
        build=build,
        from_samples=lambda spec: parse(spec.args).start == "pca",
        start=lambda encoder, decoder, tokens: start(encoder, decoder, (tokens,)),
    )


_CONV = Kind(
    check=_check_conv,
    dims=(4,),
    needs="a map [B,C,H,W]",
    build=_build_conv,
    from_samples=lambda spec: True,
    start=start_from_maps,
)
KINDS = {
    "conv": _CONV,
    "conv2": _CONV,
    "linear": _of_tokens(parse_linear, _build_linear, start_from_tokens),
    "decay": _of_tokens(parse_decay, _build_decay, start_rotated),
}


def parse_bottleneck(text: str) -> BottleneckSpec:
    """Parse a bottleneck's specification: a kind, and after a colon its arguments.

    The rate is the bytes that cross both cuts over those that would without. For MobileNetV2 at 224 px:
    ``conv`` has 0.097, ``conv:19x4,360x1`` 0.070, ``conv2`` 0.038.

    Raises:
        UserError: no such kind, or arguments that do not parse; points at the character.
    """
    kind, colon, args = text.strip().partition(":")
    if kind not in KINDS:
        raise UserError(f"unknown bottleneck {kind!r}; there are {', '.join(KINDS)}")
    spec = BottleneckSpec(kind, args)
    if colon and not args:
        raise UserError(f"{text}: nothing follows the colon; leave it out for the default widths")
    KINDS[kind].check(spec)
    return spec


def build_pair(cut: int, info: TensorInfo, spec: BottleneckSpec, seed: int, position: int = 0) -> Coders:
    """Build encoder and decoder for one tensor of a cut, in float32 on the CPU.

    Args:
        cut: 1 or 2.
        info: what crosses without a bottleneck.
        spec: what to build.
        seed: of the first weights; equal seeds give equal ones.
        position: of the tensor among those that cross.

    Raises:
        UserError: the tensor's shape does not suit the kind.
    """
    generator = torch.Generator().manual_seed(derive_seed(seed, "bottleneck", cut, position))
    return KINDS[spec.kind].build(spec, cut, info, generator)


def with_bottleneck(split: Split, specs: Sequence[str], *, seed: int) -> Split:
    """Insert bottlenecks at the cuts of a split model.

    Every floating-point tensor of a number of dimensions that suits the kind gets a pair. Parameters are named
    ``bottleneck.cut1.encoder.0.weight`` and so on, with the tensor's position after the cut where several get
    one.

    Args:
        split: as `split` made it; its partitions are extended in place.
        specs: of cut 1 and cut 2; empty strings for none.
        seed: of the first weights.

    Returns:
        The split with what crosses now; without any bottleneck, the same one.

    Raises:
        UserError: a specification that does not parse, or does not suit what crosses.
    """
    parsed = [parse_bottleneck(text) if text else None for text in specs]
    cuts = [
        _narrow(cut, infos, spec, seed)
        for cut, infos, spec in zip((1, 2), (split.cut1, split.cut2), parsed, strict=True)
    ]
    for cut, coders, before, after in zip(
        (1, 2), cuts, (split.front, split.middle), (split.middle, split.back), strict=True
    ):
        _insert(cut, coders, before, after)
    crossing = [
        tuple(coders[i].crossing if i in coders else info for i, info in enumerate(infos))
        for coders, infos in zip(cuts, (split.cut1, split.cut2), strict=True)
    ]
    shapes = {
        (cut, position): pair.shape_after
        for cut, coders in zip((1, 2), cuts, strict=True)
        for position, pair in coders.items()
        if pair.shape_after is not None
    }
    return replace(split, cut1=crossing[0], cut2=crossing[1], shapes=shapes)


def _narrow(
    cut: int, infos: Sequence[TensorInfo], spec: BottleneckSpec | None, seed: int
) -> dict[int, Coders]:
    if spec is None:
        return {}
    kind = KINDS[spec.kind]
    for dims in kind.dims:
        fitting = [
            position
            for position, info in enumerate(infos)
            if info.dtype.is_floating_point and info.rows == 1 and len(info.shape) + 1 == dims
        ]
        if fitting:
            return {position: build_pair(cut, infos[position], spec, seed, position) for position in fitting}
    shapes = ", ".join(described(info.shape) for info in infos)
    raise UserError(
        f"{spec.kind} needs {kind.needs}, and {shapes} crosses cut {cut}; use codecs or another cut"
    )


def _insert(cut: int, coders: dict[int, Coders], before: Partition, after: Partition) -> None:
    for position, pair in coders.items():
        place = f"{BOTTLENECK_PREFIX}cut{cut}" + (f".{position}" if len(coders) > 1 else "")
        before.add_encoder(position, f"{place}.encoder", pair.encoder)
        after.add_decoder(position, f"{place}.decoder", pair.decoder)

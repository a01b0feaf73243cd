"""What ``--compress`` means: a bottleneck a cut, a codec chain a stream.

``--compress conv+int8`` sets everything. ``--compress WHERE=SPEC`` sets a part apart and may be repeated;
WHERE is ``cut1``, ``cut2``, ``act``, ``grad``, or both joined by a dot (``cut1.grad``), and the narrower one
wins over the wider.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from common.bottleneck import KINDS, parse_bottleneck
from common.errors import UserError
from common.propagate import TensorInfo
from common.spec import CUTS, STREAMS
from wire.codecs.base import Role
from wire.codecs.layout import TensorType
from wire.codecs.ragged import Ragged
from wire.codecs.registry import codec_class
from wire.codecs.spec import NONE, StageSpec, check_chain, spell_chain, split_chain
from wire.streams import uses_ids

AUTO = "auto"
"""In place of a specification: to be chosen when training begins, see `edge.auto`."""

BOTTLENECKS = tuple(KINDS)
_WHOLE_CUTS = ("", "cut1", "cut2")
_WHERE = re.compile(r"(?P<where>[A-Za-z0-9.]+)=(?P<spec>.*)", re.DOTALL)
_PLACES = ("cut1", "cut2", "act", "grad", *STREAMS)


@dataclass(frozen=True, kw_only=True)
class Compression:
    """What to insert and how to encode.

    Attributes:
        bottlenecks: the bottleneck's specification at cut 1 and at cut 2, empty for none.
        codecs: the codec chain of each stream in `STREAMS`.
    """

    bottlenecks: tuple[str, str]
    codecs: dict[str, str]


def asks_for_auto(texts: Sequence[str]) -> bool:
    """Whether a value of ``--compress`` leaves the choice to measurements."""
    specs = (match["spec"] if (match := _WHERE.fullmatch(text)) else text for text in texts)
    return any(spec.strip() == AUTO for spec in specs)


def parse_compress(texts: Sequence[str]) -> Compression:
    """Read the values of ``--compress``.

    Raises:
        UserError: a place that does not exist, a bottleneck that is not the first stage or is set for one
            direction only.
        SpecError: a chain that does not parse, pointing at the character.
    """
    if asks_for_auto(texts):
        raise UserError(f"--compress {AUTO} is for training alone; edge-client plan compares what there is")
    settings: dict[str, tuple[str, str]] = {}
    for text in texts:
        place, spec = _place(text)
        if place in settings:
            raise UserError(f"--compress sets {place or 'everything'} twice; keep one")
        bottleneck, chain = _split(spec)
        if bottleneck and place not in _WHOLE_CUTS:
            raise UserError(
                f"{place}={bottleneck}: a bottleneck is part of the model and works in both directions; "
                f"set it for everything or for a cut, such as cut1={bottleneck}"
            )
        settings[place] = bottleneck, chain
    settings.setdefault("", ("", NONE))
    bottlenecks = [settings.get(f"cut{cut}", settings[""])[0] for cut in CUTS]
    codecs = {}
    for stream in STREAMS:
        cut_name, direction = stream.split(".")
        narrowest = next(place for place in (stream, direction, cut_name, "") if place in settings)
        codecs[stream] = settings[narrowest][1]
    return Compression(bottlenecks=(bottlenecks[0], bottlenecks[1]), codecs=codecs)


def with_ragged(compression: Compression, crossing: Sequence[Sequence[TensorInfo]]) -> Compression:
    """Leave padding out of what crosses, where a mask crosses cut 1 that tells it from tokens.

    A bottleneck along the sequence leaves no token of its own in any place: its cut stays as it is.

    Args:
        compression: what was asked for.
        crossing: what crosses cut 1 and cut 2.
    """
    if not any(map(_is_mask, crossing[0])):
        return compression
    first, codecs = StageSpec(Ragged.name), dict(compression.codecs)
    for cut, infos in zip(CUTS, crossing, strict=True):
        if not any(info.token_dims and info.dtype.is_floating_point for info in infos):
            continue
        for stream in (name for name in STREAMS if name.startswith(f"cut{cut}.")):
            chain = split_chain(codecs[stream])
            codecs[stream] = spell_chain(chain if first in chain else (first, *chain))
    return replace(compression, codecs=codecs)


def check_lengths(
    dense: Sequence[Sequence[TensorInfo]], crossing: Sequence[Sequence[TensorInfo]], *, padding: str
) -> None:
    """Check that texts have one length where a bottleneck along the sequence needs that.

    Args:
        dense: what crosses cut 1 and cut 2 without bottlenecks.
        crossing: what crosses with them.
        padding: how texts are padded.

    Raises:
        UserError: they have not.
    """
    fixed = any(
        before.token_dims and not after.token_dims
        for infos in zip(dense, crossing, strict=True)
        for before, after in zip(*infos, strict=True)
    )
    if fixed and padding == "longest":
        raise UserError(
            "--compress decay with rate2 narrows the sequence, for which all texts need one length: give --padding max"
        )


def _is_mask(info: TensorInfo) -> bool:
    return info.dtype == torch.bool and info.rows == 1 and len(info.shape) == 1


def check_repetition(compression: Compression, *, varied: bool) -> None:
    """Check that samples come again as they were, where a codec counts on it.

    Args:
        compression: what was asked for.
        varied: whether training samples are varied at random.

    Raises:
        UserError: they do not.
    """
    if varied and uses_ids(compression.codecs):
        raise UserError(
            "--compress delta sends what has changed of a sample since the last epoch, and training images are flipped "
            "and shifted at random: give --no-augment"
        )


def check_fit(compression: Compression, crossing: Sequence[Sequence[TensorInfo]], chunk: int) -> None:
    """Check that each codec can do something for the tensors that it is for.

    Args:
        compression: what was asked for.
        crossing: what crosses cut 1 and cut 2, behind bottlenecks.
        chunk: samples in a chunk.

    Raises:
        UserError: a codec's arguments fit none of a cut's floating-point tensors.
    """
    for cut, infos in zip(CUTS, crossing, strict=True):
        dense = [
            TensorType(info.dtype, info.batched(chunk)) for info in infos if info.dtype.is_floating_point
        ]
        for stream, chain in compression.codecs.items():
            if not dense or not stream.startswith(f"cut{cut}."):
                continue
            for stage in split_chain(chain):
                codec = codec_class(stage.name)(stage.args, Role.ACTIVATION)
                if isinstance(codec, Ragged) and not any(map(_is_mask, crossing[0])):
                    raise UserError(
                        f"--compress {stage} does nothing at cut {cut}: it drops padding of texts, and no mask "
                        "crosses cut 1 that says where some is"
                    )
                misfits = [codec.misfit(whole) for whole in dense]
                if all(misfits):
                    raise UserError(f"--compress {stage} does nothing at cut {cut}: {misfits[0]}")


def _place(text: str) -> tuple[str, str]:
    match = _WHERE.fullmatch(text)
    if match is None:
        return "", text
    if match["where"] not in _PLACES:
        raise UserError(f"--compress {text}: {match['where']} is no place; use {', '.join(_PLACES)}")
    return match["where"], match["spec"]


def _split(spec: str) -> tuple[str, str]:
    """Check a specification, and split it into its bottleneck, if any, and its codec chain."""
    stages = split_chain(spec)
    bottleneck, chain = "", stages
    if stages and stages[0].name in BOTTLENECKS:
        bottleneck, chain = str(stages[0]), stages[1:]
        parse_bottleneck(bottleneck)
    late = next((stage for stage in chain if stage.name in BOTTLENECKS), None)
    if late is not None:
        raise UserError(f"{spec}: {late} changes the model, so it comes first and once, as in {late}+int8")
    check_chain(chain, spec, before=BOTTLENECKS)
    return bottleneck, spell_chain(chain)

"""What ``--compress`` means: a bottleneck a cut, a codec chain a stream.

``--compress conv+int8`` sets everything. ``--compress WHERE=SPEC`` sets a part apart and may be repeated;
WHERE is ``cut1``, ``cut2``, ``act``, ``grad``, or both joined by a dot (``cut1.grad``), and the narrower one
wins over the wider.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from common.errors import UserError
from common.spec import CUTS, STREAMS
from wire.codecs.chain import parse_chain

BOTTLENECKS = ("conv", "conv2")
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


def parse_compress(texts: Sequence[str]) -> Compression:
    """Read the values of ``--compress``.

    Raises:
        UserError: a place that does not exist, a bottleneck that is not the first stage or is set for one
            direction only.
        SpecError: a chain that does not parse, pointing at the character.
    """
    settings: dict[str, str] = {}
    for text in texts:
        place, spec = _place(text)
        if place in settings:
            raise UserError(f"--compress sets {place or 'everything'} twice; keep one")
        settings[place] = spec
    bottlenecks = []
    for cut in CUTS:
        spec = settings.get(f"cut{cut}", settings.get("", "none"))
        bottlenecks.append(_split(spec)[0])
    codecs = {}
    for stream in STREAMS:
        cut_name, direction = stream.split(".")
        narrowest = next(p for p in (stream, direction, cut_name, "") if p in settings or p == "")
        bottleneck, chain = _split(settings.get(narrowest, "none"))
        if bottleneck and narrowest in (stream, direction):
            raise UserError(
                f"{narrowest}={bottleneck}: a bottleneck is part of the model and works in both directions; "
                f"set it for everything or for a cut, such as cut1={bottleneck}"
            )
        parse_chain(chain)
        codecs[stream] = chain
    return Compression(bottlenecks=(bottlenecks[0], bottlenecks[1]), codecs=codecs)


def _place(text: str) -> tuple[str, str]:
    match = _WHERE.fullmatch(text)
    if match is None or ":" in match["where"]:
        return "", text
    if match["where"] not in _PLACES:
        raise UserError(f"--compress {text}: {match['where']} is no place; use {', '.join(_PLACES)}")
    return match["where"], match["spec"]


def _split(spec: str) -> tuple[str, str]:
    """Split a specification into its bottleneck, if any, and its codec chain."""
    stages = spec.split("+")
    kinds = [stage.partition(":")[0].strip() for stage in stages]
    if kinds[0] in BOTTLENECKS:
        first, rest = stages[0].strip(), stages[1:]
    else:
        first, rest = "", stages
    late = next((s for s in rest if s.partition(":")[0].strip() in BOTTLENECKS), None)
    if late is not None:
        raise UserError(f"{spec}: {late} changes the model, so it comes first and once, as in {late}+int8")
    return first, "+".join(rest) or "none"

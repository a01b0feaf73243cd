"""Chains as text: ``none``, ``int8``, ``fp16+lz4``, ``name:arguments+name``."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass

from wire.codecs.base import Role
from wire.codecs.options import ArgumentError
from wire.codecs.registry import always_on, codec_class, codec_names
from wire.errors import SpecError

NONE = "none"


@dataclass(frozen=True, slots=True)
class StageSpec:
    """One stage of a chain.

    Attributes:
        name: the codec's name.
        args: what followed the name and a colon, or nothing.
        position: where in the text the stage starts; two stages are equal wherever they stand.
    """

    name: str
    args: str = ""
    position: int = 0

    def __str__(self) -> str:
        return f"{self.name}:{self.args}" if self.args else self.name

    def __eq__(self, other: object) -> bool:
        return isinstance(other, StageSpec) and (self.name, self.args) == (other.name, other.args)

    def __hash__(self) -> int:
        return hash((self.name, self.args))


Chain = tuple[StageSpec, ...]
"""Stages in the order in which they encode; the empty chain sends tensors raw."""


def split_chain(text: str) -> Chain:
    """Splits a spec into stages, whatever their names.

    For callers that take some names for themselves before `check_chain` sees the rest.

    Raises:
        SpecError: a stage is missing or has no name, or ``none`` does not stand alone.
    """
    stages: list[StageSpec] = []
    position = 0
    for piece in text.split("+"):
        name, colon, args = piece.strip().partition(":")
        start = position + len(piece) - len(piece.lstrip())
        if not name:
            raise SpecError(f"no codec stands at character {start + 1} of {text!r}", text, start)
        if colon and not args:
            end = start + len(name)
            raise SpecError(f"no arguments follow the colon at character {end + 1} of {text!r}", text, end)
        stages.append(StageSpec(name, args, start))
        position += len(piece) + 1
    for stage in stages:
        if stage.name == NONE and (len(stages) > 1 or stage.args):
            raise SpecError(
                f"{NONE} at character {stage.position + 1} of {text!r} must stand alone", text, stage.position
            )
    return () if stages[0].name == NONE else tuple(stages)


def check_chain(stages: Chain, text: str, *, before: Sequence[str] = ()) -> None:
    """Checks that every stage is a codec in its place with arguments that it takes, and that none comes twice.

    Args:
        stages: what `split_chain` returned, or some of it.
        text: what was split, for the message.
        before: what else may stand before a chain, for the message.

    Raises:
        SpecError: a stage is not right.
    """
    seen: set[str] = set()
    for stage in stages:
        if stage.name in always_on():
            where = f"at character {stage.position + 1} of {text!r}"
            raise SpecError(f"{stage.name} {where} is always on; leave it out", text, stage.position)
        at = f"at character {stage.position + 1} of {text!r}"
        if stage.name not in codec_names():
            known = (NONE, *codec_names())
            close = difflib.get_close_matches(stage.name, (*known, *before), n=1)
            hint = f"did you mean {close[0]}? There" if close else "there"
            first = f", and before them {', '.join(before)}" if before else ""
            raise SpecError(
                f"unknown codec {stage.name!r} {at}; {hint} are {', '.join(known)}{first}",
                text,
                stage.position,
            )
        if stage.name in seen:
            raise SpecError(f"{stage.name} {at} comes a second time", text, stage.position)
        seen.add(stage.name)
        try:
            codec_class(stage.name)(stage.args, Role.ACTIVATION)
        except ArgumentError as error:
            position = stage.position + (len(stage.name) + 1 + error.position if stage.args else 0)
            reason = f"{stage} is wrong at character {position + 1} of {text!r}: {error}"
            raise SpecError(reason, text, position) from None
        except ValueError as error:
            raise SpecError(f"{stage} {at} is wrong: {error}", text, stage.position) from None
    classes = [codec_class(stage.name) for stage in stages]
    for number, stage in enumerate(stages):
        why_not = classes[number].misplaced(classes[:number], classes[number + 1 :])
        if why_not is not None:
            at = f"at character {stage.position + 1} of {text!r}"
            raise SpecError(f"{stage.name} {at} stands in a wrong place: {why_not}", text, stage.position)


def parse_chain(text: str) -> Chain:
    """Reads a chain of codecs.

    Args:
        text: names, each perhaps with a colon and arguments, joined by ``+``; or ``none``.

    Raises:
        SpecError: the text is no chain; the message points at the character and says what there is.
    """
    stages = split_chain(text)
    check_chain(stages, text)
    return stages


def spell_chain(chain: Chain) -> str:
    """The text that `parse_chain` reads as `chain`."""
    return "+".join(map(str, chain)) or NONE

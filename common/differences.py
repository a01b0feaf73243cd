"""Two descriptions of a run, compared: which settings differ, in words that a person can act on."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, Final

from common.errors import UserError

_NAMED: Final = 3
_ABSENT: Final = object()


def differences(
    ours: Mapping[str, Any],
    theirs: Mapping[str, Any],
    *,
    here: str = "here",
    there: str = "in the checkpoint",
) -> list[str]:
    """Name what differs between two nested maps, such as ``optim.lr: 0.1 here, 0.02 in the checkpoint``.

    Args:
        ours: of plain values; a tuple equals a list, and NaN itself.
        theirs: the same.
        here: what to call the place of `ours`.
        there: what to call that of `theirs`.

    Returns:
        One line for each, in the order of `ours`, then of `theirs`; none where they are equal.
    """
    return [
        f"{name}: {_shown(one)} {here}, {_shown(other)} {there}"
        for name, one, other in _differing("", ours, theirs)
    ]


def check_same(ours: Mapping[str, Any], theirs: Mapping[str, Any], what: str) -> None:
    """Refuse to go on from something made with other settings.

    Args:
        ours: the settings of this run.
        theirs: those that it was made with.
        what: it is, as in ``the checkpoint in DIR``.

    Raises:
        UserError: they differ; names the first few differences.
    """
    found = differences(ours, theirs)
    if found:
        more = f"; and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
        raise UserError(f"{what} is of another run: {'; '.join(found[:_NAMED])}{more}")


def _differing(name: str, one: Any, other: Any) -> list[tuple[str, Any, Any]]:
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        keys = [*one, *(key for key in other if key not in one)]
        return [
            found
            for key in keys
            for found in _differing(
                f"{name}.{key}" if name else str(key), one.get(key, _ABSENT), other.get(key, _ABSENT)
            )
        ]
    if isinstance(one, list | tuple) and isinstance(other, list | tuple) and len(one) == len(other):
        return [
            found
            for number, pair in enumerate(zip(one, other, strict=True))
            for found in _differing(f"{name}[{number}]", *pair)
        ]
    return [] if _equal(one, other) else [(name, one, other)]


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, float) and isinstance(other, float) and math.isnan(one) and math.isnan(other):
        return True
    return bool(one == other)


def _shown(value: Any) -> str:
    if value is _ABSENT:
        return "nothing"
    text = value if isinstance(value, str) and value else json.dumps(value, default=repr)
    text = " ".join(text.split())
    return text if len(text) <= 60 else f"{text[:57]}..."

"""What follows a bottleneck's colon: items joined by commas, each ``value`` or ``key=value``."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from common.errors import UserError

_WHOLE = re.compile(r"[1-9]\d{0,6}", re.ASCII)
_DECIMAL = re.compile(r"\d{1,9}(\.\d{1,17})?(e-\d{1,2})?", re.ASCII)


@dataclass(frozen=True)
class Options:
    """The items of one specification, and where each stands.

    Attributes:
        kind: of bottleneck, for messages.
        args: what followed the colon.
        grammar: what would be right, for messages.
        values: items without a key, in order, with their places in `args`.
        named: the others by key, with the places of their values.
    """

    kind: str
    args: str
    grammar: str
    values: tuple[tuple[str, int], ...]
    named: Mapping[str, tuple[str, int]]

    def whole(self, key: str, default: int) -> int:
        """Return a whole number from 1 up.

        Raises:
            UserError: it is none; points at the character.
        """
        return self.as_whole(*self.named[key]) if key in self.named else default

    def decimal(self, key: str) -> float | None:
        """Return a number that is not negative, such as 0.9 or 1e-4; None where it was not given.

        Raises:
            UserError: it is none; points at the character.
        """
        if key not in self.named:
            return None
        text, place = self.named[key]
        return float(text[: self._end(_DECIMAL, text, place)])

    def choice(self, key: str, choices: Sequence[str], default: str) -> str:
        """Return one of some words.

        Raises:
            UserError: it is another; points at the character.
        """
        text, place = self.named.get(key, (default, 0))
        if text not in choices:
            raise self.wrong(place, f"{key} is {' or '.join(choices)}, not {text!r}")
        return text

    def as_whole(self, text: str, place: int) -> int:
        """Read an item as `whole` does."""
        return int(text[: self._end(_WHOLE, text, place)])

    def wrong(self, place: int, reason: str) -> UserError:
        """Make an error that points at a place in `args`."""
        return UserError(f"{self.kind}:{self.args}: {reason}, at character {self._character(place)}")

    def _end(self, number: re.Pattern[str], text: str, place: int) -> int:
        match = number.match(text)
        end = match.end() if match else 0
        if end < len(text) or not text:
            raise not_expected(self.kind, self.args, place + end, self.grammar)
        return end

    def _character(self, place: int) -> int:
        return len(self.kind) + 2 + place


def split_options(kind: str, args: str, keys: Sequence[str], grammar: str, *, values: int = 0) -> Options:
    """Split what follows a bottleneck's colon.

    Args:
        kind: of bottleneck.
        args: to be split; may be empty.
        keys: that there are.
        grammar: what would be right, for messages.
        values: the most items without a key; they come first.

    Raises:
        UserError: it does not split; points at the character.
    """
    plain: list[tuple[str, int]] = []
    named: dict[str, tuple[str, int]] = {}
    place = 0
    for item in args.split(",") if args else ():
        key, equals, value = item.partition("=")
        if equals and key in keys and key not in named:
            named[key] = value, place + len(key) + 1
        elif item and not equals and not named and len(plain) < values:
            plain.append((item, place))
        else:
            # An item too many is wrong where it stands, a key that is none at its first character.
            raise not_expected(kind, args, place, grammar)
        place += len(item) + 1
    return Options(kind, args, grammar, tuple(plain), named)


def not_expected(kind: str, args: str, place: int, grammar: str) -> UserError:
    """Make the error for text that does not parse at a place; one line that says what would be right."""
    found = repr(args[place]) if place < len(args) else "the end"
    return UserError(
        f"{kind}:{args}: {found} at character {len(kind) + 2 + place} is not expected; {grammar}"
    )

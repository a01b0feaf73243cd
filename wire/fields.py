"""What may stand in the fields of a message's header.

A field of a message is annotated with a type and a `Rule`, which is applied on the way out and on the way in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Annotated, Any, get_type_hints

from wire.buffers import ALIGNMENT
from wire.errors import CorruptPayload

__all__ = [
    "Code",
    "Count",
    "Desc",
    "Descs",
    "Digest",
    "Flag",
    "HeaderLimit",
    "Name",
    "Names",
    "Nanoseconds",
    "Nonce",
    "OptionalDigest",
    "OptionalNumber",
    "OptionalStep",
    "Plain",
    "Rule",
    "Seconds",
    "Sentence",
    "SessionId",
    "Size",
    "Step",
    "Steps",
    "Versions",
    "fits",
    "payload_size",
    "rules_of",
]

MAX_ITEMS = 65_536
MAX_KEYS = 4096
MAX_DEPTH = 16
_MAX_INT = 2**63 - 1
_MAX_LEAF = 2**48


@dataclass(frozen=True, slots=True)
class Rule:
    """Checks one field's value.

    Attributes:
        accepts: says whether a value is good.
        wanted: what a good value is, in words.
    """

    accepts: Callable[[Any], bool]
    wanted: str


def _integer(low: int, high: int = _MAX_INT) -> Rule:
    return Rule(lambda v: type(v) is int and low <= v <= high, f"an integer from {low} to {high}")


def _real(low: float, high: float) -> Rule:
    return Rule(lambda v: type(v) is float and low <= v <= high, f"a float from {low:g} to {high:g}")


def _text(longest: int) -> Rule:
    return Rule(lambda v: type(v) is str and len(v) <= longest, f"a string of at most {longest} characters")


def _bytes(size: int) -> Rule:
    return Rule(lambda v: type(v) is bytes and len(v) == size, f"{size} bytes")


def _or_nil(rule: Rule) -> Rule:
    return Rule(lambda v: v is None or rule.accepts(v), f"{rule.wanted}, or nil")


def _list_of(accepts: Callable[[Any], bool], item: str, longest: int) -> Rule:
    return Rule(
        lambda v: type(v) in (list, tuple) and len(v) <= longest and all(map(accepts, v)),
        f"a list of at most {longest} items, each {item}",
    )


def _is_plain(value: Any, depth: int = MAX_DEPTH) -> bool:
    if value is None or isinstance(value, (bool, float, str, bytes)):
        return True
    if isinstance(value, int):
        return -(2**63) <= value < 2**64
    if depth == 0:
        return False
    if isinstance(value, Mapping):
        return len(value) <= MAX_KEYS and all(
            isinstance(k, str) and _is_plain(v, depth - 1) for k, v in value.items()
        )
    return (
        isinstance(value, (list, tuple))
        and len(value) <= MAX_ITEMS
        and all(_is_plain(v, depth - 1) for v in value)
    )


def _is_desc(desc: Any, depth: int = MAX_DEPTH) -> bool:
    if type(desc) is not dict:
        return False
    parts = desc.get("parts")
    if parts is None:
        size = desc.get("size")
        return type(size) is int and 0 <= size <= _MAX_LEAF
    return depth > 0 and type(parts) in (list, tuple) and all(_is_desc(part, depth - 1) for part in parts)


def rules_of(message_type: type) -> dict[str, Rule]:
    """Return the rules in the annotations of a message's fields, in their order; a payload has none."""
    hints = get_type_hints(message_type, include_extras=True)
    return {f.name: hints[f.name].__metadata__[0] for f in fields(message_type) if f.name != "payload"}


def fits(descs: Sequence[Desc], nbytes: int) -> bool:
    """Say whether a payload is as long as descriptions want it.

    Every leaf is followed by padding to a multiple of 64 bytes.

    Args:
        descs: descriptions that the rule of `Descs` accepts.
        nbytes: length of the payload.
    """
    return nbytes == sum(size + -size % ALIGNMENT for size in _leaf_sizes(descs))


def payload_size(desc: Any) -> int:
    """Return how many bytes of payload a tensor takes, padding included, as far as its description says.

    Raises:
        CorruptPayload: that is none.
    """
    if not _is_desc(desc):
        raise CorruptPayload("a tensor's description is malformed")
    return sum(size + -size % ALIGNMENT for size in _leaf_sizes([desc]))


def _leaf_sizes(descs: Sequence[Desc]) -> list[int]:
    sizes: list[int] = []
    for desc in descs:
        parts = desc.get("parts")
        if parts is not None:
            sizes += _leaf_sizes(parts)
        elif desc["size"]:
            sizes.append(desc["size"])
    return sizes


Desc = dict[str, Any]
Step = Annotated[int, _integer(0)]
OptionalStep = Annotated[int | None, _or_nil(_integer(0))]
Steps = Annotated[Sequence[int], _list_of(_integer(0).accepts, "an integer from 0", 1024)]
SessionId = Annotated[bytes, _bytes(16)]
Nonce = Annotated[bytes, _bytes(32)]
Digest = Annotated[bytes, _bytes(32)]
OptionalDigest = Annotated[bytes | None, _or_nil(_bytes(32))]
Count = Annotated[int, _integer(1, 2**31 - 1)]
Size = Annotated[int, _integer(0)]
HeaderLimit = Annotated[int, _integer(4096)]
Nanoseconds = Annotated[int, _integer(-(2**63))]
Seconds = Annotated[float, _real(0.01, 3600.0)]
# A gradient's norm may overflow: infinity and NaN have to cross, so that the loss of a step is seen.
OptionalNumber = Annotated[float | None, Rule(lambda v: v is None or type(v) is float, "a float or nil")]
Flag = Annotated[bool, Rule(lambda v: type(v) is bool, "a boolean")]
Code = Annotated[str, _text(64)]
Name = Annotated[str, _text(256)]
Sentence = Annotated[str, _text(1024)]
Names = Annotated[Sequence[str], _list_of(_text(1024).accepts, "a string", MAX_ITEMS)]
Versions = Annotated[Sequence[int], _list_of(_integer(0, 2**16).accepts, "a small integer", 64)]
Plain = Annotated[
    Mapping[str, Any],
    Rule(
        lambda v: isinstance(v, Mapping) and _is_plain(v),
        f"a map with string keys and plain values, at most {MAX_DEPTH} levels deep",
    ),
]
Descs = Annotated[
    Sequence[Desc], _list_of(_is_desc, 'a map with "parts", or else with a "size" in bytes', MAX_ITEMS)
]

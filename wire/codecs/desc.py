"""Tensor descriptions: making them, and checking those of the peer in full before anything is allocated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from wire.codecs.layout import TensorType, padded
from wire.errors import CorruptPayload

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from wire.codecs.base import Codec, Facts
    from wire.codecs.spec import StageSpec

_LEAF_KEYS = {"dtype", "shape", "order", "size"}
_NODE_KEYS = {"codec", "meta", "dtype", "shape", "order", "parts"}


@dataclass(frozen=True, slots=True)
class Leaf:
    """A tensor that lies in the payload as it is."""

    type: TensorType

    @property
    def size(self) -> int:
        """Bytes of payload, padding included."""
        return padded(self.type.nbytes)


@dataclass(frozen=True, slots=True)
class Node:
    """A tensor that `codec` puts together from `parts`."""

    type: TensorType
    codec: Codec
    meta: Mapping[str, Any]
    parts: tuple[Leaf | Node, ...]

    @property
    def size(self) -> int:
        """Bytes of payload, padding included."""
        return sum(part.size for part in self.parts)


def leaf_desc(type: TensorType) -> dict[str, Any]:
    """Describes a tensor that is sent as it is."""
    return {**type.fields(), "size": type.nbytes}


def node_desc(
    codec: str, meta: dict[str, Any], type: TensorType, parts: list[dict[str, Any]]
) -> dict[str, Any]:
    """Describes a tensor that a codec took apart."""
    return {"codec": codec, "meta": meta, **type.fields(), "parts": parts}


def parse_desc(
    desc: object,
    chain: Sequence[StageSpec],
    codec_at: Callable[[int, str], Codec],
    max_bytes: int,
    facts: Facts,
    *,
    first: int = 0,
    path: str = "",
) -> Leaf | Node:
    """Checks a description against the chain that was agreed.

    Args:
        desc: anything.
        chain: the stages that may appear, in this order, each at most once on a path.
        codec_at: the codec of the stage with the given index, at the given path in the tree.
        max_bytes: the largest tensor accepted, at any stage.
        facts: of the chunk.
        first: index of the first stage that may appear at `path`.
        path: where in the tree `desc` stands.

    Returns:
        The checked tree.

    Raises:
        CorruptPayload: this is no description, or not one that an encoder for this chain makes.
    """
    if not isinstance(desc, dict):
        raise CorruptPayload("a tensor's description is not a map")
    if desc.keys() == _LEAF_KEYS:
        type = TensorType.parse(desc, max_bytes)
        if desc["size"] != type.nbytes or isinstance(desc["size"], bool | float):
            raise CorruptPayload(
                f"a tensor of {type.nbytes} bytes was described as of {desc['size']!r:.40} bytes"
            )
        return Leaf(type)
    if desc.keys() != _NODE_KEYS:
        raise CorruptPayload("a tensor's description has keys that are missing or unknown")
    name, meta, parts = desc["codec"], desc["meta"], desc["parts"]
    index = next((i for i in range(first, len(chain)) if chain[i].name == name), None)
    if index is None:
        raise CorruptPayload(f"a tensor was encoded with {name!r:.40}, which was not agreed on here")
    if not isinstance(meta, dict) or not isinstance(parts, list | tuple):
        raise CorruptPayload(f"the description of a tensor encoded with {name} is malformed")
    type = TensorType.parse(desc, max_bytes)
    codec = codec_at(index, path)
    expected = codec.part_types(type, meta, facts)
    if len(parts) != len(expected):
        raise CorruptPayload(f"{name} makes {len(expected)} parts of this tensor; {len(parts)} are described")
    children = []
    for number, (part, wanted) in enumerate(zip(parts, expected, strict=True)):
        child = parse_desc(
            part,
            chain,
            codec_at,
            max_bytes,
            facts,
            first=index + 1 if wanted.follow else len(chain),
            path=f"{path}.{number}",
        )
        if child.type != wanted.type:
            raise CorruptPayload(f"part {number} of a tensor encoded with {name} is not what {name} makes")
        children.append(child)
    return Node(type, codec, meta, tuple(children))

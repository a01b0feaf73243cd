"""The codec instances of one stream, and decoding with them, which an encoder may have to do as well."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from wire.codecs.base import Codec, Facts, Role
from wire.codecs.desc import Leaf, Node, parse_desc
from wire.codecs.registry import always_on, codec_class
from wire.codecs.spec import Chain, StageSpec, spell_chain

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor


class Stages:
    """The codecs of one stream, one for each place in the tree, made when first needed.

    Args:
        chain: what was agreed on.
        role: what the stream carries.

    Attributes:
        chain: the stages that may come to work: those that always do, then the agreed ones.
    """

    def __init__(self, chain: Chain, role: Role) -> None:
        self._agreed = chain
        self.chain = (*map(StageSpec, always_on()), *chain)
        self._role = role
        self._codecs: dict[str, Codec] = {}

    def codec(self, index: int, path: str) -> Codec:
        """The codec of a stage at a place in the tree."""
        spec = self.chain[index]
        key = f"{'' if codec_class(spec.name).everywhere else path}:{spec}"
        if key not in self._codecs:
            self._codecs[key] = codec_class(spec.name)(spec.args, self._role)
        return self._codecs[key]

    def parse(
        self, desc: object, max_bytes: int, facts: Facts, *, first: int = 0, path: str = ""
    ) -> Leaf | Node:
        """Checks a description; see `parse_desc`."""
        return parse_desc(desc, self.chain, self.codec, max_bytes, facts, first=first, path=path)

    def state_dict(self) -> dict[str, Any]:
        """The state of all codecs that keep some, by place."""
        states = {key: codec.state_dict() for key, codec in self._codecs.items()}
        return {key: state for key, state in states.items() if state}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes back to a state that `state_dict` returned.

        Raises:
            ValueError: the state belongs to another chain.
        """
        specs = {str(spec): index for index, spec in enumerate(self.chain)}
        codecs: dict[str, Codec] = {}
        for key, value in state.items():
            spec = key.partition(":")[2]
            if spec not in specs:
                raise ValueError(f"codec state for {spec!r} does not belong to {spell_chain(self._agreed)}")
            stage = self.chain[specs[spec]]
            codecs[key] = codec_class(stage.name)(stage.args, self._role)
            codecs[key].load_state_dict(value)
            codecs[key].commit()
        self.close()
        self._codecs = codecs

    def commit(self) -> None:
        """See `Codec.commit`."""
        for codec in self._codecs.values():
            codec.commit()

    def rollback(self) -> None:
        """See `Codec.rollback`."""
        for codec in self._codecs.values():
            codec.rollback()

    def close(self) -> None:
        """See `Codec.close`."""
        for codec in self._codecs.values():
            codec.close()


def put_together(
    tree: Leaf | Node, load: Callable[[Leaf], Tensor], device: torch.device, facts: Facts
) -> Tensor:
    """Decodes a tree.

    Args:
        tree: a checked description.
        load: gives the leaves' tensors; it is asked for them depth first.
        device: where the tensor is decoded and returned.
        facts: of the chunk.

    Raises:
        CorruptPayload: values that fit no tensor.
    """
    if isinstance(tree, Leaf):
        return load(tree).to(device, non_blocking=True)
    at = torch.device("cpu") if tree.codec.on_host else device
    parts = [put_together(part, load, at, facts) for part in tree.parts]
    return tree.codec.decode(parts, tree.type, tree.meta, facts).to(device, non_blocking=True)

"""Chains at work: an encoder and a decoder for one stream of tensors each.

A stream is what crosses one cut in one direction under one name. Its encoder stands on one side, its
decoder on the other; stateful codecs keep their state in step because both see the same tensors in the
same order.

The description of a tensor is a tree of plain maps. A leaf says what bytes are in the payload::

    {"dtype": "float32", "shape": [8, 32], "order": "C", "size": 1024}

A node says what a codec makes of its parts; a codec that was skipped does not appear::

    {"codec": "int8", "meta": {}, "dtype": "float32", "shape": [8, 32], "order": "C", "parts": [..]}

Leaves lie in the payload depth first, each padded with zeros to a multiple of 64 bytes.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from wire.codecs.base import NOTHING_KNOWN, Call, Facts, Role
from wire.codecs.buffers import leaf_buffers, load_leaf
from wire.codecs.desc import Leaf, leaf_desc, node_desc
from wire.codecs.layout import TensorType, dense
from wire.codecs.spec import Chain, StageSpec, parse_chain, spell_chain
from wire.codecs.stages import Stages, put_together
from wire.errors import CorruptPayload

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor

__all__ = ["Chain", "Decoder", "Encoded", "Encoder", "StageSpec", "parse_chain", "spell_chain"]

MAX_TENSOR_BYTES = 1 << 31
"""The largest tensor that a decoder accepts unless told otherwise, raw or at any stage of decoding."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """A tensor ready to be sent.

    Attributes:
        desc: its description, plain values only.
        buffers: bytes-like, in order, padding included; they keep what they view alive.
        size: bytes in `buffers`, always a multiple of 64.
    """

    desc: dict[str, Any]
    buffers: list[memoryview]
    size: int


class _End:
    """One end of a stream: its codecs, and the state that they keep.

    Args:
        chain: what `parse_chain` returned.
        role: what the stream carries.
        threads: how many threads torch may use meanwhile; None leaves the calling thread's setting.
    """

    def __init__(self, chain: Chain, role: Role, *, threads: int | None = None) -> None:
        self._stages = Stages(chain, role)
        self._threads = threads

    def state_dict(self) -> dict[str, Any]:
        """The state of the stream's codecs; empty where none keeps any."""
        return self._stages.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes back to a state that `state_dict` returned, of this or another end of the same kind for the same chain.

        Raises:
            ValueError: the state belongs to another chain.
        """
        self._stages.load_state_dict(state)

    def commit(self) -> None:
        """Makes the present state the one that `rollback` goes back to."""
        self._stages.commit()

    def rollback(self) -> None:
        """Goes back to the state of the last `commit`, or of the beginning."""
        self._stages.rollback()

    def close(self) -> None:
        """Gives up what codecs hold outside memory; nothing is coded after that."""
        self._stages.close()


class Encoder(_End):
    """Encodes one stream of tensors. One thread at a time uses it.

    Args:
        chain: what `parse_chain` returned.
        role: what the stream carries.
        threads: how many threads torch may use meanwhile; None leaves the calling thread's setting.
    """

    def encode(self, x: Tensor, *, seed: int, facts: Facts = NOTHING_KNOWN) -> Encoded:
        """Encodes a tensor, on the tensor's own device.

        Args:
            x: any shape, on any device, of a dtype that can cross. What is sent raw is not copied from host
                memory, so `x` must not be changed in place until it is sent.
            seed: of stochastic rounding; the same seed, state, facts and tensor give the same bytes.
            facts: what the decoder will know of the chunk.

        Raises:
            NonFiniteTensor: a quantizer met NaN or infinity.
            ValueError: a tensor of such a dtype or shape cannot cross.
        """
        leaves: list[Tensor] = []
        with torch.no_grad(), _torch_threads(self._threads):
            desc = self._encode(dense(x), 0, "", Call(seed, facts), leaves)
            buffers = leaf_buffers(leaves)
        return Encoded(desc, buffers, sum(map(len, buffers)))

    def _encode(self, x: Tensor, first: int, path: str, call: Call, leaves: list[Tensor]) -> dict[str, Any]:
        chain = self._stages.chain
        whole = TensorType.of(x)
        for index in range(first, len(chain)):
            codec = self._stages.codec(index, path)
            packed = codec.encode(x, call)
            if packed is None:
                continue
            sent_before = len(leaves)
            parts = [
                self._encode(
                    dense(part.tensor),
                    index + 1 if part.follow else len(chain),
                    f"{path}.{number}",
                    call.child(number) if part.follow else call,
                    leaves,
                )
                for number, part in enumerate(packed.parts)
            ]
            desc = node_desc(codec.name, packed.meta, whole, parts)
            if codec.mirrored:
                self._mirror(desc, index, path, call.facts, leaves[sent_before:], x.device)
            return desc
        leaves.append(x)
        return leaf_desc(whole)

    def _mirror(
        self,
        desc: dict[str, Any],
        first: int,
        path: str,
        facts: Facts,
        leaves: list[Tensor],
        device: torch.device,
    ) -> None:
        """Decodes what was just encoded, as the other end will, for the state that decoding leaves behind."""
        tree = self._stages.parse(desc, MAX_TENSOR_BYTES, facts, first=first, path=path)
        sent = iter(leaves)
        put_together(tree, lambda leaf: next(sent), device, facts)


class Decoder(_End):
    """Decodes one stream of tensors. One thread at a time uses it.

    Args:
        chain: the encoder's chain.
        role: what the stream carries.
        threads: how many threads torch may use meanwhile; None leaves the calling thread's setting.
        max_bytes: the largest tensor accepted, raw or at any stage of decoding.
    """

    def __init__(
        self, chain: Chain, role: Role, *, threads: int | None = None, max_bytes: int = MAX_TENSOR_BYTES
    ) -> None:
        super().__init__(chain, role, threads=threads)
        self._max_bytes = max_bytes

    def size(self, desc: object, facts: Facts = NOTHING_KNOWN) -> int:
        """How many bytes of payload a description of a chunk's tensor covers, padding included.

        Raises:
            CorruptPayload: it is no description that this stream's encoder can have made.
        """
        return self._stages.parse(desc, self._max_bytes, facts).size

    def decode(
        self,
        desc: object,
        payload: Any,
        *,
        offset: int = 0,
        device: torch.device | str | None = None,
        facts: Facts = NOTHING_KNOWN,
    ) -> tuple[Tensor, int]:
        """Decodes one tensor.

        Args:
            desc: from the peer; anything.
            payload: a writable bytes-like object. A tensor that was sent raw is a view of it, which keeps it
                alive and must not be overwritten. Read-only memory is copied.
            offset: where in the payload the tensor starts, in bytes.
            device: where the tensor is decoded and returned; the CPU unless given.
            facts: what the encoder knew of the chunk.

        Returns:
            The tensor, in the memory order in which it was encoded, and the offset of the next one.

        Raises:
            CorruptPayload: the description is not one that this stream's encoder can have made, or does not
                fit the payload.
        """
        tree = self._stages.parse(desc, self._max_bytes, facts)
        view = memoryview(payload).cast("B")
        if offset < 0 or offset + tree.size > len(view):
            raise CorruptPayload(
                f"a tensor of {tree.size} bytes at offset {offset} is beyond a payload of {len(view)} bytes"
            )
        target = torch.device(device or "cpu")
        with torch.no_grad(), _torch_threads(self._threads):
            x = put_together(tree, _Leaves(view, offset), target, facts)
            if target.type == "cuda":
                # The copies may still be reading the payload, which is the caller's again after this.
                torch.cuda.current_stream(target).synchronize()
        return x, offset + tree.size


class _Leaves:
    """Gives the tensors of a payload's leaves, one after the other."""

    def __init__(self, view: memoryview, offset: int) -> None:
        self._view, self._offset = view, offset

    def __call__(self, leaf: Leaf) -> Tensor:
        start = self._offset
        self._offset += leaf.size
        return load_leaf(leaf.type, self._view[start : start + leaf.type.nbytes])


def _torch_threads(count: int | None) -> AbstractContextManager[None]:
    """Sets the number of threads that torch uses for work started by this thread."""
    return nullcontext() if count is None else _changed_threads(count)


@contextmanager
def _changed_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)

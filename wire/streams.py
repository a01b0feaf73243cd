"""Named tensors to messages and back: the streams of one cut and direction."""

from collections.abc import Callable, Container, Mapping, Sequence
from functools import partial
from itertools import accumulate
from typing import Any, Generic, TypeAlias, TypeVar

import torch
from torch import Tensor

from wire.codecs.base import NOTHING_KNOWN, Facts, NonFiniteTensor, Role
from wire.codecs.chain import Chain, Decoder, Encoded, Encoder
from wire.codecs.registry import codec_class
from wire.codecs.spec import parse_chain
from wire.errors import CorruptPayload
from wire.fields import payload_size
from wire.messages import Backward, Forward

Encodings: TypeAlias = tuple[list[dict[str, Any]], list[memoryview]]
"""The descriptions and the payload's buffers of some tensors, as a message takes them."""

C = TypeVar("C", Encoder, Decoder)

IDS = "sample ids"
"""The name under which a chunk's ids, int64 `[B]`, cross; no tensor of a model has a space in its name."""

_MOST_IDS = 1 << 16


def uses_ids(chains: Mapping[str, str]) -> bool:
    """Whether chunks have to bring their samples' ids with them.

    Args:
        chains: of the streams; those whose names end in ``grad`` carry gradients.
    """
    return any(
        codec_class(stage.name)(stage.args, _role(name.endswith("grad"))).uses_ids
        for name, chain in chains.items()
        for stage in parse_chain(chain)
    )


def disk_bytes(chain: str, *, gradient: bool) -> int:
    """Return the most bytes that either end of a stream keeps on disk for each tensor that crosses."""
    stages = parse_chain(chain)
    return sum(codec_class(stage.name)(stage.args, _role(gradient)).disk_bytes for stage in stages)


def facts_of(tensors: Mapping[str, Tensor]) -> Facts:
    """What the tensors of cut 1 say of their chunk, to both ends.

    Args:
        tensors: by name: the ids are those under `IDS`; the first other one that is bool, `[B, S]`, is the mask,
            true where a token is.

    Raises:
        CorruptPayload: the ids are none.
    """
    ids, known = tensors.get(IDS), None
    if ids is not None:
        if ids.dtype != torch.int64 or ids.dim() != 1 or bool((ids < 0).any()):
            raise CorruptPayload(f"the sample ids came as {ids.dtype} {list(ids.shape)}, not int64 from 0")
        known = tuple(ids.tolist())
    masks = (t for name, t in tensors.items() if name != IDS and t.dtype == torch.bool and t.dim() == 2)
    mask = next(masks, None)
    return Facts(known, None if mask is None else mask.cpu())


def _role(gradient: bool) -> Role:
    return Role.GRADIENT if gradient else Role.ACTIVATION


class Stream(Generic[C]):
    """One end of what crosses one cut in one direction; each named tensor has codecs with a state of their own.

    What they learn in a step is part of the step: it is kept with `commit` and forgotten with `rollback`.

    Args:
        chain: the codec chain, such as ``int8+lz4``.
        gradient: whether it carries gradients (stochastic rounding) or activations.
        make: makes one named tensor's codecs.
    """

    def __init__(self, chain: str, gradient: bool, make: Callable[[Chain, Role], C]) -> None:
        self._make: Callable[[], C] = partial(make, parse_chain(chain), _role(gradient))
        self._coders: dict[str, C] = {}

    def _of(self, name: str) -> C:
        if name not in self._coders:
            self._coders[name] = self._make()
        return self._coders[name]

    def commit(self) -> None:
        """Keep what the codecs have learnt since the last commit."""
        for coder in self._coders.values():
            coder.commit()

    def rollback(self) -> None:
        """Forget what the codecs have learnt since the last commit."""
        for coder in self._coders.values():
            coder.rollback()

    def state_dict(self) -> dict[str, Any]:
        """Return what the codecs have learnt, by tensor; what is learnt later does not change it."""
        states = {name: coder.state_dict() for name, coder in self._coders.items()}
        return {name: state for name, state in states.items() if state}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go back to what `state_dict` returned, of this or another such end of the same chain, and commit that.

        Raises:
            ValueError: it belongs to another chain.
        """
        for name in self._coders.keys() | state.keys():
            coder = self._of(name)
            coder.load_state_dict(state.get(name, {}))
            coder.commit()

    def close(self) -> None:
        """Give up what the codecs keep, on disk too; the stream is not used again."""
        for coder in self._coders.values():
            coder.close()


class StreamEncoder(Stream[Encoder]):
    """Encodes what crosses one cut in one direction.

    Args:
        chain: the codec chain, such as ``int8+lz4``.
        gradient: whether it carries gradients (stochastic rounding) or activations.
    """

    def __init__(self, chain: str, *, gradient: bool) -> None:
        super().__init__(chain, gradient, Encoder)
        self._raw = Encoder(parse_chain("none"), _role(gradient))

    def encode(
        self,
        tensors: Mapping[str, Tensor],
        *,
        seed: int,
        facts: Facts = NOTHING_KNOWN,
        unmasked: Container[str] = (),
    ) -> Encodings:
        """Encode one chunk's tensors.

        A tensor that is not finite is sent raw, so that NaN arrives as NaN and the loss shows it.

        Args:
            tensors: by name.
            seed: of stochastic rounding.
            facts: of the chunk; at cut 1, where they cross for the first time, what `facts_of` returns.
            unmasked: the names of tensors that the chunk's mask tells nothing of, whatever their shapes.
        """
        encodings = [
            self._encode(name, tensor, seed + index, Facts(facts.ids) if name in unmasked else facts)
            for index, (name, tensor) in enumerate(tensors.items())
        ]
        return [one.desc for one in encodings], [buffer for one in encodings for buffer in one.buffers]

    def _encode(self, name: str, tensor: Tensor, seed: int, facts: Facts) -> Encoded:
        try:
            return (self._raw if name == IDS else self._of(name)).encode(tensor, seed=seed, facts=facts)
        except NonFiniteTensor:
            return self._raw.encode(tensor, seed=seed)


class StreamDecoder(Stream[Decoder]):
    """Decodes what a `StreamEncoder` of the same chain and direction made.

    Args:
        chain: the codec chain.
        gradient: whether it carries gradients.
        max_bytes: the largest tensor accepted, at any stage of decoding.
    """

    def __init__(self, chain: str, *, gradient: bool, max_bytes: int) -> None:
        super().__init__(chain, gradient, partial(Decoder, max_bytes=max_bytes))
        self._ids = Decoder(parse_chain("none"), _role(gradient), max_bytes=8 * _MOST_IDS)

    def decode(
        self,
        message: Forward | Backward,
        names: Sequence[str],
        *,
        device: torch.device | None = None,
        facts: Facts | None = None,
        unmasked: Container[str] = (),
    ) -> dict[str, Tensor]:
        """Decode a message's tensors.

        Args:
            message: as received.
            names: the names it must carry, in order.
            device: where the tensors are wanted; the CPU unless given.
            facts: of the chunk; None at cut 1, where the message itself brings them: `facts_of` what this
                returns says the same.
            unmasked: as it was encoded with.

        Raises:
            CorruptPayload: other names, or a payload that does not fit its description.
        """
        if list(message.names) != list(names):
            raise CorruptPayload(
                f"a {message.kind} message carries {list(message.names)[:4]}, not {list(names)[:4]}"
            )
        offsets = list(accumulate(map(payload_size, message.tensors), initial=0))
        spans = list(zip(message.names, message.tensors, offsets, strict=False))
        if facts is None:
            # What says how others are to be read is read first, wherever it stands.
            spans.sort(key=lambda span: span[0] != IDS and not _describes_mask(span[1]))
        tensors: dict[str, Tensor] = {}
        for name, desc, offset in spans:
            if facts is None and name != IDS and not _describes_mask(desc):
                facts = facts_of(tensors)
            coder = self._ids if name == IDS else self._of(name)
            known = facts or NOTHING_KNOWN
            known = Facts(known.ids) if name in unmasked else known
            tensors[name], _ = coder.decode(desc, message.payload, offset=offset, device=device, facts=known)
        return {name: tensors[name] for name in names}


def _describes_mask(desc: Mapping[str, Any]) -> bool:
    shape = desc.get("shape")
    return desc.get("dtype") == "bool" and isinstance(shape, list | tuple) and len(shape) == 2


def chunk_message(
    encodings: Encodings,
    names: Sequence[str],
    step: int,
    chunk: int,
    *,
    backward: bool,
    evaluate: bool = False,
    norm_sq: float | None = None,
) -> Forward | Backward:
    """Make the message that carries a chunk's encoded tensors.

    Args:
        encodings: from `StreamEncoder.encode`.
        names: of the tensors, in the same order.
        step: the step's number.
        chunk: the chunk's number.
        backward: gradients, not activations.
        evaluate: of an evaluation.
        norm_sq: the middle's squared gradient norm, with its last gradient.
    """
    descs, payload = encodings
    if backward:
        return Backward(step=step, chunk=chunk, names=names, tensors=descs, norm_sq=norm_sq, payload=payload)
    return Forward(step=step, chunk=chunk, evaluate=evaluate, names=names, tensors=descs, payload=payload)

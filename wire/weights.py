"""A partition's weights as messages of a few megabytes, and back."""

from collections.abc import Iterator, Mapping

from torch import Tensor

from wire.codecs.base import Role
from wire.codecs.chain import Decoder, Encoded, Encoder
from wire.codecs.spec import parse_chain
from wire.errors import CorruptPayload
from wire.messages import Weights

_MESSAGE_BYTES = 4 << 20


def weights_messages(state: Mapping[str, Tensor]) -> Iterator[Weights]:
    """Cut a state dict into messages of a few megabytes; a larger tensor makes one of its own."""
    encoder = Encoder(parse_chain("none"), Role.ACTIVATION)
    names: list[str] = []
    encoded: list[Encoded] = []
    seq = 0
    for name, tensor in state.items():
        names.append(name)
        encoded.append(encoder.encode(tensor, seed=0))
        if sum(part.size for part in encoded) >= _MESSAGE_BYTES:
            yield _weights(seq, names, encoded, last=False)
            names, encoded, seq = [], [], seq + 1
    yield _weights(seq, names, encoded, last=True)


def _weights(seq: int, names: list[str], encoded: list[Encoded], *, last: bool) -> Weights:
    return Weights(
        seq=seq,
        last=last,
        names=names,
        tensors=[part.desc for part in encoded],
        payload=[buffer for part in encoded for buffer in part.buffers],
    )


class WeightsReceiver:
    """Puts a state dict together from `weights` messages.

    Args:
        expected: name, dtype and shape of every tensor that must come; no other may.
    """

    def __init__(self, expected: Mapping[str, Tensor]) -> None:
        self._expected = {name: (t.dtype, t.shape) for name, t in expected.items()}
        self._state: dict[str, Tensor] = {}
        self._next_seq = 0
        largest = max((t.numel() * t.element_size() for t in expected.values()), default=0)
        self._decoder = Decoder(parse_chain("none"), Role.ACTIVATION, max_bytes=largest)

    def take(self, message: Weights) -> dict[str, Tensor] | None:
        """Take the next message; return the whole state after the last one.

        Raises:
            CorruptPayload: a message out of order, or tensors other than the expected.
        """
        if message.seq != self._next_seq:
            raise CorruptPayload(f"weights message {message.seq} came where {self._next_seq} was due")
        self._next_seq += 1
        offset = 0
        for name, desc in zip(message.names, message.tensors, strict=True):
            tensor, offset = self._decoder.decode(desc, message.payload, offset=offset)
            if name in self._state or self._expected.get(name) != (tensor.dtype, tensor.shape):
                raise CorruptPayload(
                    f"the weights hold {name!r} as {tensor.dtype} {tuple(tensor.shape)}, which does not fit"
                )
            self._state[name] = tensor
        if not message.last:
            return None
        if missing := self._expected.keys() - self._state.keys():
            raise CorruptPayload(f"the weights lack {', '.join(sorted(missing)[:3])}")
        return self._state

"""The middle's ends of the four streams of tensors."""

from collections.abc import Mapping
from dataclasses import dataclass

from wire.streams import StreamDecoder, StreamEncoder, uses_ids


@dataclass(frozen=True)
class Streams:
    """Encoders and decoders by cut.

    Attributes:
        encoders: of gradients at cut 1, of activations at cut 2.
        decoders: of activations at cut 1, of gradients at cut 2.
        uses_ids: whether the chunks of a training step bring their samples' ids.
    """

    encoders: dict[int, StreamEncoder]
    decoders: dict[int, StreamDecoder]
    uses_ids: bool

    def close(self) -> None:
        """Give up what codecs keep on disk."""
        for encoder in self.encoders.values():
            encoder.close()
        for decoder in self.decoders.values():
            decoder.close()

    @classmethod
    def make(cls, codecs: Mapping[str, str], max_bytes: int) -> "Streams":
        """Make streams with fresh state.

        Args:
            codecs: the codec chain of each stream.
            max_bytes: the largest tensor that a message may bring.

        Raises:
            SpecError: a chain that this side does not know.
        """

        def encoder(stream: str) -> StreamEncoder:
            return StreamEncoder(codecs[stream], gradient=stream.endswith("grad"))

        def decoder(stream: str) -> StreamDecoder:
            return StreamDecoder(codecs[stream], gradient=stream.endswith("grad"), max_bytes=max_bytes)

        return cls(
            {1: encoder("cut1.grad"), 2: encoder("cut2.act")},
            {1: decoder("cut1.act"), 2: decoder("cut2.grad")},
            uses_ids(codecs),
        )

"""The middle's ends of the four streams of tensors."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from common.errors import UserError
from common.propagate import TensorInfo
from wire.errors import SpecError
from wire.streams import StreamDecoder, StreamEncoder, disk_bytes, uses_ids

GIB = 1 << 30


def check_disk(codecs: Mapping[str, str], crossing: Mapping[int, Sequence[TensorInfo]], limit: int) -> None:
    """Check that a job does not take more of this machine's disk than a client may.

    Args:
        codecs: the codec chain of each stream.
        crossing: what crosses each cut.
        limit: bytes.

    Raises:
        UserError: it might.
    """
    wanted = sum(
        disk_bytes(codecs[f"cut{cut}.act"], gradient=False)
        * sum(info.dtype.is_floating_point for info in infos)
        for cut, infos in crossing.items()
    )
    if wanted > limit:
        raise UserError(
            f"delta may keep {wanted / GIB:.3g} GiB on the server's disk, where a client may have {limit / GIB:.3g}: "
            "give delta a lower limit, as in delta:limit=1G, or cloud-server a higher --disk-limit"
        )


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
            UserError: a chain that this side does not know.
        """

        def encoder(stream: str) -> StreamEncoder:
            return StreamEncoder(codecs[stream], gradient=stream.endswith("grad"))

        def decoder(stream: str) -> StreamDecoder:
            return StreamDecoder(codecs[stream], gradient=stream.endswith("grad"), max_bytes=max_bytes)

        try:
            return cls(
                {1: encoder("cut1.grad"), 2: encoder("cut2.act")},
                {1: decoder("cut1.act"), 2: decoder("cut2.grad")},
                uses_ids(codecs),
            )
        except SpecError as error:
            raise UserError(str(error)) from error

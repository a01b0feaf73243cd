"""How fast both sides are, as a comparison with this machine."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from common.cost import CLOUD, DOWN, EDGE, UP, ChunkCost


@dataclass(frozen=True, kw_only=True)
class Speeds:
    """How long work takes where it belongs, over what it takes on this machine with nothing else to do.

    Attributes:
        edge: computing on the edge.
        cloud: computing on the cloud.
        edge_codecs: encoding and decoding on the edge.
        cloud_codecs: the same on the cloud.
    """

    edge: float = 1.0
    cloud: float = 1.0
    edge_codecs: float = 1.0
    cloud_codecs: float = 1.0

    def scaled(self, cost: ChunkCost) -> ChunkCost:
        """Return the cost of a chunk that was measured with all parts on this machine."""
        return ChunkCost(
            seconds={
                kind: seconds * (self.cloud if kind in CLOUD else self.edge)
                for kind, seconds in cost.seconds.items()
            },
            messages={
                kind: replace(
                    message,
                    encode_s=message.encode_s * (self.edge_codecs if kind in UP else self.cloud_codecs),
                    decode_s=message.decode_s * (self.cloud_codecs if kind in UP else self.edge_codecs),
                )
                for kind, message in cost.messages.items()
            },
        )

    @classmethod
    def between(cls, cost: ChunkCost, local: ChunkCost) -> "Speeds":
        """Compare what a chunk cost with what the same one costs on this machine alone."""
        return cls(
            edge=_share(cost.compute_s(EDGE), local.compute_s(EDGE)),
            cloud=_share(cost.compute_s(CLOUD), local.compute_s(CLOUD)),
            edge_codecs=_share(_codecs(cost, UP, DOWN), _codecs(local, UP, DOWN)),
            cloud_codecs=_share(_codecs(cost, DOWN, UP), _codecs(local, DOWN, UP)),
        )


def _share(seconds: float, of: float) -> float:
    return seconds / of if seconds > 0 and of > 0 else 1.0


def _codecs(cost: ChunkCost, sent: Iterable[str], received: Iterable[str]) -> float:
    """Sum the seconds that one side encodes and decodes."""
    encode_s = sum(cost.messages[kind].encode_s for kind in sent)
    return encode_s + sum(cost.messages[kind].decode_s for kind in received)

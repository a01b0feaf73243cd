"""Chunks of texts for the tests: hidden states, and which of their positions hold tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from wire.codecs.base import NOTHING_KNOWN, Facts, Role
from wire.codecs.chain import Decoder, Encoded, Encoder, parse_chain

LENGTHS = (5, 1, 12, 9)
WIDTH = 12


def mask(lengths: tuple[int, ...] = LENGTHS, width: int = WIDTH) -> Tensor:
    """True where a token is, each sample's at its start."""
    return torch.arange(width) < torch.tensor(lengths)[:, None]


def hidden(kept: Tensor, *shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Values `[B, S, *shape]`, none of them 0."""
    x = torch.randn(*kept.shape, *shape, generator=torch.Generator().manual_seed(seed))
    return (x + x.sign() * 0.01).to(dtype)


def only(kept: Tensor, x: Tensor) -> Tensor:
    """The tensor with zeros where no token is."""
    return x * kept.view(*kept.shape, *[1] * (x.dim() - 2))


class Ends:
    """Both ends of a stream."""

    def __init__(self, chain: str, role: Role = Role.ACTIVATION) -> None:
        self.encoder = Encoder(parse_chain(chain), role)
        self.decoder = Decoder(parse_chain(chain), role)

    def send(self, x: Tensor, facts: Facts = NOTHING_KNOWN, seed: int = 0) -> tuple[Tensor, Encoded]:
        """Encode and decode; what has to hold for every chain is checked."""
        encoded = self.encoder.encode(x, seed=seed, facts=facts)
        payload = bytearray(b"".join(encoded.buffers))
        assert len(payload) == encoded.size == self.decoder.size(encoded.desc, facts)
        y, end = self.decoder.decode(encoded.desc, payload, device=x.device, facts=facts)
        assert end == encoded.size
        assert (y.shape, y.dtype, y.device) == (x.shape, x.dtype, x.device)
        return y, encoded


def codecs_in(desc: dict[str, object]) -> list[str]:
    """The codecs of a description, from the root down."""
    parts = desc.get("parts", [])
    assert isinstance(parts, list)
    below = [name for part in parts for name in codecs_in(part)]
    return [str(desc["codec"]), *below] if "codec" in desc else below

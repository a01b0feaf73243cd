"""fp16 and bf16."""

import pytest
import torch

from wire.codecs.base import Role
from wire.codecs.chain import Decoder, Encoder, parse_chain


def send(name, x):
    encoded = Encoder(parse_chain(name), Role.ACTIVATION).encode(x, seed=0)
    y, _ = Decoder(parse_chain(name), Role.ACTIVATION).decode(encoded.desc, b"".join(encoded.buffers))
    return y, encoded


@pytest.mark.parametrize(("name", "top"), [("fp16", 65504.0), ("bf16", torch.finfo(torch.bfloat16).max)])
def test_finite_values_beyond_the_range_become_the_largest(name, top):
    x = torch.tensor([3.4e38, -3.4e38, 1.0]).repeat(32)
    assert send(name, x)[0][:3].tolist() == [top, -top, 1.0]


@pytest.mark.parametrize("name", ["fp16", "bf16"])
def test_nan_and_infinity_stay_what_they_are(name):
    x = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e38]).repeat(32)
    y, _ = send(name, x)
    assert y[0].isnan()
    assert y[1:3].tolist() == [torch.inf, -torch.inf]
    assert y[3].isfinite()


@pytest.mark.parametrize("name", ["fp16", "bf16"])
def test_half_the_bytes_cross(name):
    _, encoded = send(name, torch.randn(8, 32, 16, 16))
    assert encoded.size == 8 * 32 * 16 * 16 * 2
    assert encoded.desc["codec"] == name


@pytest.mark.parametrize("name", ["fp16", "bf16"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_what_is_narrow_already_is_sent_raw(name, dtype):
    x = torch.randn(100).to(dtype)
    y, encoded = send(name, x)
    assert "codec" not in encoded.desc
    assert torch.equal(x, y)

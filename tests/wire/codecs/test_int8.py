"""int8."""

import sys

import pytest
import torch

from wire.codecs import compiled
from wire.codecs.base import NonFiniteTensor, Role
from wire.codecs.chain import Decoder, Encoder, parse_chain
from wire.codecs.dither import PERIOD

CHAIN = parse_chain("int8")


def encode(x, role=Role.ACTIVATION, seed=0):
    return Encoder(CHAIN, role).encode(x, seed=seed)


def send(x, role=Role.ACTIVATION, seed=0):
    encoded = encode(x, role, seed)
    return Decoder(CHAIN, role).decode(encoded.desc, b"".join(encoded.buffers))[0]


def channels_last(x):
    return x.contiguous(memory_format=torch.channels_last)


@pytest.fixture(params=["compiled", "torch"])
def either_path(request, monkeypatch):
    """Runs a test with the compiled kernels and with the operations that a GPU runs."""
    if request.param == "torch":
        monkeypatch.setattr(compiled, "kernels", lambda module, device: None)


def test_a_quarter_of_the_bytes_and_two_numbers_a_channel_cross():
    encoded = encode(torch.randn(8, 32, 28, 28))
    assert encoded.size == 8 * 32 * 28 * 28 + 2 * 32 * 4


@pytest.mark.parametrize("order", [torch.clone, channels_last])
def test_each_channel_has_its_own_range(either_path, order):
    x = order(torch.randn(3, 4, 16, 16) * torch.tensor([1e-6, 1.0, 1e3, 1e6]).view(-1, 1, 1))
    error = (send(x) - x).abs().amax((0, 2, 3))
    span = x.amax((0, 2, 3)) - x.amin((0, 2, 3))
    assert torch.all(error <= span / 255 * 0.501)


def test_each_token_has_its_own_range(either_path):
    x = torch.randn(3, 4, 100) * torch.tensor([1e-6, 1.0, 1e3, 1e6]).view(-1, 1)
    error = (send(x) - x).abs().amax(-1)
    assert torch.all(error <= (x.amax(-1) - x.amin(-1)) / 255 * 0.501)


@pytest.mark.parametrize("role", Role)
def test_constant_channels_come_back_exactly(either_path, role):
    x = torch.tensor([0.0, 1 / 3, -1e30, 1e-44]).view(-1, 1, 1).expand(2, 4, 8, 8).contiguous()
    assert torch.equal(send(x, role, seed=9), x)


def test_least_and_greatest_hardly_move(either_path):
    x = torch.randn(16, 1000)
    y = send(x)
    torch.testing.assert_close(y.amin(1), x.amin(1), rtol=1e-6, atol=0)
    torch.testing.assert_close(y.amax(1), x.amax(1), rtol=1e-5, atol=0)


@pytest.mark.parametrize("bad", [torch.nan, -torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("role", Role)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_and_infinity_are_refused(either_path, bad, role, dtype):
    x = torch.randn(2, 3, 40, 40).to(dtype)
    x[1, 2, 3, 4] = bad
    for y in (x, channels_last(x), x.view(6, -1)):
        with pytest.raises(NonFiniteTensor, match="NaN or infinity"):
            encode(y, role)


def test_a_negative_nan_is_refused_too():
    bits = torch.zeros(1000, dtype=torch.int32)
    bits[500] = -0x3FFFFF
    assert bits.view(torch.float32).isnan().any()
    with pytest.raises(NonFiniteTensor):
        encode(bits.view(torch.float32))


@pytest.mark.parametrize("top", [3e38, torch.finfo(torch.float32).max])
def test_ranges_beyond_float32_are_sent_raw(top):
    x = torch.tensor([-top, 0.0, top / 2]).repeat(400)
    assert "codec" not in encode(x).desc
    assert torch.equal(send(x), x)


def test_gradients_are_rounded_without_bias(either_path):
    x = torch.rand(1, 4000, generator=torch.Generator().manual_seed(0))
    x[0, :2] = torch.tensor([0.0, 1.0])
    count = 200
    mean = sum(send(x, Role.GRADIENT, seed).double() for seed in range(count)) / count
    # One rounding has a standard deviation of at most half a level; 5 of them for the mean of `count`.
    level = 1 / 255
    assert (mean - x).abs().max() < 5 * level / 2 / count**0.5
    assert (mean - x).mean().abs() < 5 * level / 2 / (count * x.numel()) ** 0.5


def test_roundings_of_neighbours_and_of_blocks_are_independent():
    x = torch.full((1, 2 * PERIOD), 0.5)
    x[0, :2] = torch.tensor([0.0, 255.0])
    error = (send(x, Role.GRADIENT, seed=4) - x)[0, 2:].double()
    for lag in (1, 2, 7, 128, PERIOD):
        correlation = (error[lag:] * error[:-lag]).mean() / error.square().mean()
        assert abs(correlation) < 0.01, lag


def test_seeds_round_differently():
    x = torch.randn(10, 1000)
    assert not torch.equal(send(x, Role.GRADIENT, 1), send(x, Role.GRADIENT, 2))


def test_activations_do_not_depend_on_the_seed():
    x = torch.randn(10, 1000)
    assert torch.equal(send(x, seed=1), send(x, seed=2))


@pytest.mark.parametrize("role", Role)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    "shape",
    [(5,), (PERIOD + 77,), (3, 7), (2, 5, 130), (3, 5, 7, 7), (1, 5, 7, 7), (2, 5, 33, 40), (2, 2000, 3, 3)],
)
def test_the_kernels_give_the_bits_that_torch_gives(monkeypatch, role, dtype, shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    tensors = [x, channels_last(x)] if len(shape) == 4 else [x]
    fast = [(b"".join(encode(t, role, 3).buffers), send(t, role, 3)) for t in tensors]
    monkeypatch.setattr(compiled, "kernels", lambda module, device: None)
    for t, (sent, received) in zip(tensors, fast, strict=True):
        assert b"".join(encode(t, role, 3).buffers) == sent
        assert torch.equal(send(t, role, 3), received)


def test_without_numba_torch_does_it(monkeypatch):
    compiled._loaded.cache_clear()
    monkeypatch.setitem(sys.modules, "wire.codecs._kernels", None)
    try:
        assert compiled.kernels("_kernels", torch.device("cpu")) is None
    finally:
        compiled._loaded.cache_clear()

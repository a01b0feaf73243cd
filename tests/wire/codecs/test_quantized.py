"""Fewer than eight bits, groups of neighbours, and rotation."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wire.codecs import bits, compiled
from wire.codecs.base import NonFiniteTensor, Role
from wire.codecs.chain import Decoder, Encoder, parse_chain
from wire.codecs.dither import PERIOD
from wire.codecs.hadamard import rotated
from wire.codecs.layout import padded
from wire.errors import CorruptPayload, SpecError

WIDTHS = {"int8": 8, "int6": 6, "int4": 4, "int3": 3, "int2": 2}
NARROW = [name for name, width in WIDTHS.items() if width < 8]


def encode(spec, x, role=Role.ACTIVATION, seed=0):
    return Encoder(parse_chain(spec), role).encode(x, seed=seed)


def decode(spec, desc, payload):
    return Decoder(parse_chain(spec), Role.ACTIVATION).decode(desc, payload)[0]


def send(spec, x, role=Role.ACTIVATION, seed=0):
    encoded = encode(spec, x, role, seed)
    return decode(spec, encoded.desc, b"".join(encoded.buffers))


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def channels_last(x):
    return x.contiguous(memory_format=torch.channels_last)


@pytest.fixture
def without_kernels(monkeypatch):
    monkeypatch.setattr(compiled, "kernels", lambda module, device: None)


@pytest.mark.parametrize(("name", "width"), WIDTHS.items())
def test_levels_take_no_more_bits_than_they_need(name, width):
    encoded = encode(name, random(8, 4, 28, 28))
    assert encoded.size == padded(8 * 4 * 28 * 28 * width // 8) + padded(2 * 4 * 4)


@pytest.mark.parametrize(
    ("width", "numbers", "packed"),
    [
        (6, [0b000001, 0b100000, 0b111111, 0b101010], [0b00000001, 0b11111000, 0b10101011]),
        (4, [0x1, 0x2, 0x3], [0x21, 0x03]),
        (3, [1, 2, 3, 4, 5, 6, 7, 0], [0b11010001, 0b01011000, 0b00011111]),
        (2, [3, 0, 2, 1, 1], [0b01100011, 0b00000001]),
        (1, [1, 0, 0, 0, 0, 0, 0, 1, 1], [0b10000001, 0b1]),
    ],
)
def test_numbers_follow_each_other_from_the_lowest_bit_up(width, numbers, packed):
    assert bits.pack(torch.tensor(numbers, dtype=torch.uint8), width).tolist() == packed


@settings(deadline=None)
@given(st.integers(1, 8), st.data())
def test_what_is_unpacked_is_what_was_packed_with_kernels_and_without(width, data):
    numbers = torch.tensor(data.draw(st.lists(st.integers(0, 2**width - 1), max_size=40)), dtype=torch.uint8)
    packed = bits.pack(numbers, width)
    assert packed.numel() == bits.packed_size(numbers.numel(), width)
    assert torch.equal(bits.unpack(packed, width, numbers.numel()), numbers)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled, "kernels", lambda module, device: None)
        assert torch.equal(bits.pack(numbers, width), packed)
        assert torch.equal(bits.unpack(packed, width, numbers.numel()), numbers)


@pytest.mark.parametrize("name", NARROW)
def test_bits_after_the_last_level_are_corrupt(name):
    x = random(1, 1001)
    encoded = encode(name, x)
    payload = bytearray(b"".join(encoded.buffers))
    last = bits.packed_size(1001, WIDTHS[name]) - 1
    payload[last] |= 0x80
    with pytest.raises(CorruptPayload, match="spare bits"):
        decode(name, encoded.desc, payload)


@pytest.mark.parametrize("role", Role)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", ["", ":group=16", ":hadamard", ":group=100,hadamard"])
@pytest.mark.parametrize(
    "shape", [(700,), (PERIOD + 77,), (30, 37), (2, 5, 768), (3, 41, 7, 7), (2, 5, 33, 40)]
)
def test_the_kernels_give_the_bits_that_torch_gives(monkeypatch, role, dtype, options, shape):
    x = random(*shape).to(dtype)
    for name in ("int6", "int3"):
        spec = name + options
        tensors = [x, channels_last(x)] if len(shape) == 4 else [x]
        fast = [(b"".join(encode(spec, t, role, 3).buffers), send(spec, t, role, 3)) for t in tensors]
        with monkeypatch.context() as patch:
            patch.setattr(compiled, "kernels", lambda module, device: None)
            for t, (sent, received) in zip(tensors, fast, strict=True):
                assert b"".join(encode(spec, t, role, 3).buffers) == sent
                assert torch.equal(send(spec, t, role, 3), received)


@pytest.mark.parametrize("name", NARROW)
def test_gradients_are_rounded_without_bias(name):
    x = torch.rand(1, 4000, generator=torch.Generator().manual_seed(0))
    x[0, :2] = torch.tensor([0.0, 1.0])
    count = 200
    mean = sum(send(name, x, Role.GRADIENT, seed).double() for seed in range(count)) / count
    level = 1 / (2 ** WIDTHS[name] - 1)
    assert (mean - x).abs().max() < 5 * level / 2 / count**0.5
    assert (mean - x).mean().abs() < 5 * level / 2 / (count * x.numel()) ** 0.5


@pytest.mark.parametrize("make", [torch.clone, channels_last])
def test_groups_are_neighbours_in_memory_and_end_with_their_line(make):
    x = make(random(2, 24, 5, 5))
    length = 24 if make is channels_last else 25
    encoded = encode("int4:group=10", x)
    groups = x.numel() // length * 3
    assert encoded.desc["parts"][1]["shape"] == [2, groups]
    memory = (x.permute(0, 2, 3, 1) if make is channels_last else x).reshape(-1, length)
    lows = torch.frombuffer(bytearray(b"".join(encoded.buffers)), dtype=torch.float32, offset=x.numel() // 2)
    expected = torch.stack([part.amin(1) for part in memory.split(10, 1)], 1).view(-1)
    torch.testing.assert_close(lows[padded(600) // 4 - 150 :][:groups], expected, rtol=0, atol=0)


def test_an_outlier_spoils_its_group_only():
    x = random(1, 1024)
    x[0, 3] = 1000.0
    error = (send("int4:group=64", x) - x).abs()
    assert error[0, :64].max() > 1
    assert error[0, 64:].max() < 0.3
    assert (send("int4", x) - x).abs()[0, 64:].max() > 1


def test_a_group_longer_than_the_line_is_the_line():
    x = random(30, 40)
    a, b = encode("int4", x), encode("int4:group=5000", x)
    assert b"".join(a.buffers) == b"".join(b.buffers)


def test_rotation_lets_outliers_do_less_harm():
    x = random(64, 768)
    x[:, 5] *= 100
    plain, turned = ((send(spec, x) - x).square().mean() for spec in ("int4", "int4:hadamard"))
    assert turned < plain / 4


@pytest.mark.parametrize("make", [torch.clone, channels_last])
def test_rotation_runs_along_channels_and_keeps_lengths(make):
    x = make(random(2, 20, 3, 5))
    y = rotated(x)
    assert y.stride() == x.stride()
    hadamard = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    four = torch.kron(hadamard, hadamard) / 2
    sixteen = torch.kron(four, four)
    matrix = torch.block_diag(sixteen, four)
    torch.testing.assert_close(y, torch.einsum("cd,bdhw->bchw", matrix, x))
    torch.testing.assert_close(rotated(y), x)


@pytest.mark.parametrize("options", ["group=8", "hadamard", "group=32,hadamard"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_nan_and_infinity_are_refused(options, bad):
    x = random(2, 16, 9, 9)
    x[1, 2, 3, 4] = bad
    for y in (x, channels_last(x), x.bfloat16()):
        with pytest.raises(NonFiniteTensor):
            encode(f"int4:{options}", y)


@pytest.mark.parametrize("top", [1e37, 3e38, torch.finfo(torch.float32).max])
def test_values_that_rotation_could_carry_beyond_float32_are_sent_raw(top):
    x = torch.full((4, 512), top)
    assert "codec" not in encode("int4:hadamard", x).desc


def test_halves_near_the_largest_stay_finite():
    x = torch.full((4, 512), 65504.0, dtype=torch.float16)
    x[:, ::3] = -65504.0
    assert send("int2:hadamard", x).isfinite().all()


@pytest.mark.parametrize(
    ("text", "position"),
    [
        ("int4:groups=64", 5),
        ("fp16+int4:hadamard,group=7", 19),
        ("int4:group=64,group=32", 14),
        ("int4:hadamard,", 14),
        ("int4:group=", 5),
        ("int4:group=99999999", 5),
        ("int4:hadamard=1", 5),
        ("int4:group=६४", 5),
    ],
)
def test_a_wrong_argument_is_pointed_at(text, position):
    with pytest.raises(SpecError) as caught:
        parse_chain(text)
    assert caught.value.position == position
    assert f"character {position + 1} of" in str(caught.value)

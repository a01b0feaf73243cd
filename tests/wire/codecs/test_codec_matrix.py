"""Every registered codec, over dtypes, shapes, memory orders, roles and devices."""

import pytest
import torch

from wire.codecs.base import Role
from wire.codecs.chain import Decoder, Encoder, parse_chain
from wire.codecs.layout import padded
from wire.codecs.registry import codec_class, codec_names
from wire.errors import SpecError

SPECS = [
    name if not args else f"{name}:{args}" for name in codec_names() for args in codec_class(name).examples
]
LOSSLESS = [spec for spec in SPECS if codec_class(spec.partition(":")[0]).kind == "lossless"]
FIRST = list({spec.partition(":")[0]: spec for spec in reversed(SPECS)}.values())


def is_chain(spec):
    try:
        return bool(parse_chain(spec))
    except SpecError:
        return False


CHAINS = ["none", *SPECS, *filter(is_chain, (f"{a}+{b}" for a in FIRST for b in FIRST if a != b))]
FLOATS = [torch.float32, torch.float16, torch.bfloat16]
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
SHAPES = [
    (),
    (0,),
    (0, 3, 4, 4),
    (2, 0, 5),
    (1,),
    (7,),
    (1031,),
    (3, 5),
    (64, 1000),
    (5, 13, 129),
    (1, 1, 1, 1),
    (2, 3, 5, 7),
    (4, 1280, 1, 1),
    (3, 40, 7, 7),
    (2, 8, 56, 56),
    (2, 3, 2, 5, 9),
]


def make(shape, dtype, device="cpu", channels_last=False, seed=0):
    """Values as after a convolution: a spread of scales, some of them equal, some zero."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    x = x.clamp(min=-0.5) * 3
    if len(shape) > 1:
        x = x * (torch.arange(shape[1]) % 7).view(-1, *[1] * (len(shape) - 2))
    x = x.to(device, dtype)
    return x.contiguous(memory_format=torch.channels_last) if channels_last else x


def send(chain, role, x, seed=5):
    """Encodes and decodes; checks what holds whatever the values are."""
    encoder, decoder = Encoder(parse_chain(chain), role), Decoder(parse_chain(chain), role)
    encoded = encoder.encode(x, seed=seed)
    payload = bytearray(b"".join(encoded.buffers))
    assert len(payload) == encoded.size == decoder.size(encoded.desc)
    y, end = decoder.decode(encoded.desc, payload, device=x.device)
    assert end == encoded.size
    assert (y.shape, y.dtype, y.device) == (x.shape, x.dtype, x.device)
    assert y.numel() == 0 or y.stride() == x.stride()
    return y, encoded


def memory_orders(shape):
    return (False, True) if len(shape) == 4 else (False,)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("role", Role)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("spec", SPECS)
def test_a_tensor_comes_back_within_the_stated_bound(spec, dtype, role, device):
    stage = parse_chain(spec)[0]
    for shape in SHAPES:
        for channels_last in memory_orders(shape):
            x = make(shape, dtype, device, channels_last)
            y, _ = send(spec, role, x)
            bound = codec_class(stage.name)(stage.args, role).error_bound(x)
            error = (y.double() - x.double()).abs()
            assert torch.all(error <= bound), f"{shape}, channels last: {channels_last}"


@pytest.mark.parametrize("chain", CHAINS)
def test_no_chain_ever_sends_more_than_the_raw_tensor(chain):
    for shape in SHAPES:
        for dtype in FLOATS:
            for role in Role:
                x = make(shape, dtype)
                _, encoded = send(chain, role, x)
                assert encoded.size <= padded(x.nbytes)


@pytest.mark.parametrize("chain", ["none", *LOSSLESS])
@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64])
def test_a_lossless_chain_keeps_every_bit(chain, dtype):
    x = make((2, 3, 40, 40), dtype)
    x[0, 0, 0, :6] = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0, 0.0, 1e-44], dtype=dtype)
    y, _ = send(chain, Role.GRADIENT, x)
    assert torch.equal(y.view(torch.uint8), x.view(torch.uint8))


@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize(
    "dtype", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool]
)
def test_integers_and_masks_pass_unchanged(chain, dtype):
    for shape in [(), (0,), (3, 500), (2, 3, 16, 16)]:
        x = torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        y, _ = send(chain, Role.ACTIVATION, x)
        assert torch.equal(x, y)


@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("role", Role)
def test_a_restored_state_gives_the_same_bytes_and_the_same_tensor(chain, role):
    stages = parse_chain(chain)
    first, second = make((4, 8, 20, 20), torch.float32, seed=1), make((4, 8, 20, 20), torch.float32, seed=2)
    encoder, decoder = Encoder(stages, role), Decoder(stages, role)
    encoded = encoder.encode(first, seed=1)
    decoder.decode(encoded.desc, bytearray(b"".join(encoded.buffers)))
    encoder_state, decoder_state = encoder.state_dict(), decoder.state_dict()

    encoded = encoder.encode(second, seed=2)
    payload = b"".join(encoded.buffers)
    y, _ = decoder.decode(encoded.desc, payload)

    for other, other_decoder in [(Encoder(stages, role), Decoder(stages, role)), (encoder, decoder)]:
        other.load_state_dict(encoder_state)
        other_decoder.load_state_dict(decoder_state)
        again = other.encode(second, seed=2)
        assert again.desc == encoded.desc
        assert b"".join(again.buffers) == payload
        assert torch.equal(other_decoder.decode(again.desc, payload)[0], y)


@pytest.mark.parametrize("chain", CHAINS)
def test_the_same_seed_gives_the_same_bytes_whatever_ran_before(chain):
    x = make((4, 8, 20, 20), torch.float32)
    fresh, used = (Encoder(parse_chain(chain), Role.GRADIENT) for _ in range(2))
    state = used.state_dict()
    for seed in range(3):
        used.encode(make((4, 8, 20, 20), torch.float32, seed=seed), seed=seed)
    used.load_state_dict(state)
    torch.manual_seed(123)
    a, b = fresh.encode(x, seed=7), used.encode(x, seed=7)
    assert b"".join(a.buffers) == b"".join(b.buffers)


@pytest.mark.parametrize("spec", SPECS)
def test_encoding_does_not_change_its_input(spec):
    for role in Role:
        x = make((4, 8, 20, 20), torch.float32)
        before = x.clone()
        send(spec, role, x)
        assert torch.equal(x, before)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("role", Role)
def test_what_a_gpu_encodes_a_cpu_decodes(chain, role):
    x = make((4, 8, 20, 20), torch.float32)
    encoded = Encoder(parse_chain(chain), role).encode(x.cuda(), seed=3)
    y, _ = Decoder(parse_chain(chain), role).decode(encoded.desc, b"".join(encoded.buffers))
    torch.testing.assert_close(y, send(chain, role, x, seed=3)[0], rtol=0.01, atol=0.2)

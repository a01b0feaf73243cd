"""ragged: tokens without the padding between them."""

from __future__ import annotations

import copy

import pytest
import torch

from tests.wire.codecs.chunks import LENGTHS, WIDTH, Ends, codecs_in, hidden, mask, only
from wire.codecs.base import NOTHING_KNOWN, Facts, Role
from wire.codecs.chain import Encoder, parse_chain
from wire.codecs.registry import codec_class, codec_names
from wire.errors import CorruptPayload, SpecError

FLOATS = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
LATER = [
    f"{name}:{args}" if args else name
    for name in codec_names()
    if name not in ("ragged", "delta")
    for args in codec_class(name).examples
]
DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(), (64,), (3, 5, 7)])
@pytest.mark.parametrize("dtype", FLOATS)
def test_tokens_come_back_to_the_bit_and_zeros_between_them(dtype, shape, device):
    kept = mask((60, 2, 31), 64)
    x = hidden(kept, *shape, dtype=dtype).to(device)
    y, encoded = Ends("ragged").send(x, Facts(kept=kept))
    assert torch.equal(y.cpu(), only(kept, x.cpu()))
    assert encoded.desc["parts"][0]["shape"] == [1, 93, *shape]


def test_tokens_need_not_stand_in_front():
    kept = torch.rand(8, 50, generator=torch.Generator().manual_seed(3)) < 0.3
    x = hidden(kept, 16)
    assert torch.equal(Ends("ragged").send(x, Facts(kept=kept))[0], only(kept, x))


def test_chunk_without_any_token_is_sent_as_nothing():
    kept = torch.zeros(2, 40, dtype=torch.bool)
    y, encoded = Ends("ragged+int8").send(hidden(kept, 16), Facts(kept=kept))
    assert encoded.size == 0
    assert torch.equal(y, torch.zeros(2, 40, 16))


@pytest.mark.parametrize(
    ("x", "facts"),
    [
        (hidden(mask(), 16), NOTHING_KNOWN),
        (hidden(mask(), 16), Facts(kept=torch.ones(4, WIDTH, dtype=torch.bool))),
        (hidden(mask(), 16), Facts(kept=mask((3, 3, 3, 3), WIDTH + 1))),
        (hidden(mask(), 16)[:3], Facts(kept=mask())),
        (torch.randn(4), Facts(kept=mask())),
        (torch.ones(4, WIDTH, 16, dtype=torch.int32), Facts(kept=mask())),
        (hidden(mask(), 3, 5).contiguous(memory_format=torch.channels_last), Facts(kept=mask())),
    ],
    ids=[
        "no mask",
        "all kept",
        "another length",
        "other samples",
        "one dimension",
        "integers",
        "channels last",
    ],
)
def test_tensor_that_the_mask_has_no_say_in_is_sent_whole(x, facts):
    y, encoded = Ends("ragged").send(x, facts)
    assert codecs_in(encoded.desc) == []
    assert torch.equal(x, y)


@pytest.mark.parametrize("role", Role)
@pytest.mark.parametrize("spec", LATER)
def test_every_codec_works_on_the_tokens(spec, role):
    kept = mask((31, 3, 64, 17), 64)
    x = hidden(kept, 96)
    y, encoded = Ends(f"ragged+{spec}", role).send(x, Facts(kept=kept))
    names = codecs_in(encoded.desc)
    assert names[0] == "ragged"
    later = spec.partition(":")[0]
    # Random mantissas leave nothing for a lossless codec to find.
    assert later in names or codec_class(later).kind == "lossless"
    tokens = x[kept][None]
    stage = parse_chain(spec)[0]
    bound = codec_class(stage.name)(stage.args, role).error_bound(tokens)
    assert torch.all((y[kept].double() - tokens[0].double()).abs() <= bound.expand_as(tokens)[0])
    assert not y[~kept].any()


def test_lowrank_makes_a_matrix_of_each_text_again():
    kept = mask((31, 3, 64, 17), 64)
    # Of rank 3 each, together of rank 12.
    directions = torch.randn(4, 3, 48, generator=torch.Generator().manual_seed(1))
    x = torch.bmm(hidden(kept, 3), directions)
    y, encoded = Ends("ragged+lowrank:4").send(x, Facts(kept=kept))
    assert [part["shape"] for part in encoded.desc["parts"][0]["parts"]] == [[4, 4, 64], [4, 4, 48]]
    torch.testing.assert_close(y, only(kept, x), rtol=1e-4, atol=1e-4)


def test_lowrank_leaves_short_texts_as_their_tokens():
    kept = mask((5, 3, 4, 5), 64)
    x = hidden(kept, 48)
    y, encoded = Ends("ragged+lowrank:6").send(x, Facts(kept=kept))
    assert codecs_in(encoded.desc) == ["ragged"]
    assert torch.equal(y, only(kept, x))


def test_lowrank_spends_no_rank_on_padding():
    kept = mask((31, 3, 20, 17), 64)
    tokens = torch.bmm(hidden(kept, 3), torch.randn(4, 3, 48, generator=torch.Generator().manual_seed(1)))
    padding = 100 * hidden(~kept, 48, seed=2)
    x = torch.where(kept[..., None], tokens, padding)
    y, encoded = Ends("lowrank:4").send(x, Facts(kept=kept))
    assert [part["shape"] for part in encoded.desc["parts"]] == [[4, 4, 64], [4, 4, 48]]
    torch.testing.assert_close(y, only(kept, x), rtol=1e-4, atol=1e-4)
    assert not y[~kept].any()
    assert torch.equal(y, Ends("lowrank:4").send(only(kept, x), Facts(kept=kept))[0])


def test_lowrank_sees_what_is_not_finite_only_where_tokens_are():
    kept = mask((31, 3, 20, 17), 64)
    x = hidden(kept, 48)
    x[1, 5] = torch.nan
    assert torch.isfinite(Ends("lowrank:4").send(x, Facts(kept=kept))[0]).all()
    x[1, 0, 3] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinity"):
        Encoder(parse_chain("lowrank:4"), Role.ACTIVATION).encode(x, seed=0, facts=Facts(kept=kept))


def test_each_token_keeps_a_range_of_its_own():
    kept = mask()
    x = hidden(kept, 64) * torch.logspace(-6, 6, WIDTH)[:, None]
    y, _ = Ends("ragged+int8").send(x, Facts(kept=kept))
    ranges = (x.amax(-1) - x.amin(-1))[..., None]
    assert torch.all((y - only(kept, x)).abs() <= ranges / 255)


def test_bytes_follow_the_tokens():
    kept = mask((8, 8, 8, 8), 128)
    _, encoded = Ends("ragged").send(hidden(kept, 768), Facts(kept=kept))
    assert encoded.size == 4 * 8 * 768 * 4


def test_gradients_that_are_not_finite_are_seen_only_where_tokens_are():
    kept = mask()
    x = hidden(kept, 16)
    x[1, 5] = torch.nan
    y, _ = Ends("ragged+int8").send(x, Facts(kept=kept))
    assert torch.isfinite(y).all()
    x[1, 0, 3] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinity"):
        Encoder(parse_chain("ragged+int8"), Role.ACTIVATION).encode(x, seed=0, facts=Facts(kept=kept))


@pytest.mark.parametrize("spec", ["int8+ragged", "ragged+int8+ragged", "fp16+zstd+ragged"])
def test_it_comes_first(spec):
    with pytest.raises(SpecError, match=r"ragged at character \d+ of .* (comes first|second time)") as error:
        parse_chain(spec)
    assert spec[error.value.position :].startswith("ragged")


def sent():
    kept = mask()
    ends = Ends("ragged")
    encoded = ends.encoder.encode(hidden(kept, 16), seed=0, facts=Facts(kept=kept))
    return ends.decoder, encoded.desc, bytearray(b"".join(encoded.buffers))


def test_other_number_of_tokens_than_the_mask_has_is_corrupt():
    decoder, desc, payload = sent()
    for count in (0, sum(LENGTHS) - 1, sum(LENGTHS) + 1, 1 << 20):
        wrong = copy.deepcopy(desc)
        wrong["parts"][0] |= {"shape": [1, count, 16], "size": count * 64}
        with pytest.raises(CorruptPayload, match="not what ragged makes"):
            decoder.decode(wrong, payload, facts=Facts(kept=mask()))


@pytest.mark.parametrize(
    ("facts", "says"),
    [
        (NOTHING_KNOWN, "its mask is not known"),
        (Facts(kept=mask((5, 1, 12), WIDTH)), r"its mask is \[3, 12\]"),
        (Facts(kept=mask((5, 1, 12, 8), WIDTH)), "not what ragged makes"),
    ],
)
def test_tokens_of_a_chunk_with_another_mask_are_corrupt(facts, says):
    decoder, desc, payload = sent()
    with pytest.raises(CorruptPayload, match=says):
        decoder.decode(desc, payload, facts=facts)


def test_meta_values_and_integers_are_corrupt():
    decoder, desc, payload = sent()
    for changes, says in [({"meta": {"n": 27}}, "does not have"), ({"dtype": "int32"}, "never takes")]:
        with pytest.raises(CorruptPayload, match=says):
            decoder.decode({**desc, **changes}, payload, facts=Facts(kept=mask()))

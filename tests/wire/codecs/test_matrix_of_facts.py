"""Every registered codec again, of chunks whose mask and ids both ends know, and over steps that are undone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.wire.codecs.chunks import Ends, hidden, mask
from tests.wire.codecs.test_chain import PLAIN, places
from tests.wire.codecs.test_codec_matrix import FIRST, FLOATS, LOSSLESS, SPECS, is_chain, make
from wire.codecs.base import NOTHING_KNOWN, Facts, NonFiniteTensor, Role
from wire.codecs.chain import Decoder, Encoder, parse_chain
from wire.codecs.layout import padded
from wire.codecs.registry import always_on, codec_class
from wire.errors import CorruptPayload
from wire.messages import Forward
from wire.streams import StreamDecoder, StreamEncoder

KEPT = mask((31, 3, 64, 17), 64)
IDS = (4, 0, 2**50, 9)
KNOWN = {
    "nothing": NOTHING_KNOWN,
    "ids": Facts(ids=IDS),
    "mask": Facts(kept=KEPT),
    "both": Facts(ids=IDS, kept=KEPT),
}
WITH_FACTS = [spec for a in ("ragged+", "delta+", "ragged+delta+") for b in FIRST if is_chain(spec := a + b)]
DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")),
]


def stage_of(spec: str, role: Role) -> Any:
    stage = parse_chain(spec)[0]
    return codec_class(stage.name)(stage.args, role)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("role", Role)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("known", ["ids", "both"])
@pytest.mark.parametrize("spec", SPECS)
def test_tensor_that_comes_twice_comes_within_the_stated_bound(
    spec: str, known: str, dtype: torch.dtype, role: Role, device: str
) -> None:
    facts = KNOWN[known]
    for shape in [(), (8,), (3, 5)]:
        ends = Ends(spec, role)
        for factor in (1.0, 1.01):
            x = (hidden(KEPT, *shape) * factor).to(device, dtype)
            bound = stage_of(spec, role).error_bound(x).expand_as(x)
            if "feedback" in spec:
                continue  # its bound is that of its own state, see test_topk
            y, encoded = ends.send(x, facts, seed=3)
            assert encoded.size <= padded(x.nbytes)
            error = (y.double() - x.double()).abs()
            if facts.kept is not None and spec == "ragged":
                assert not y[~KEPT].any()
                error = error[KEPT]
                bound = bound[KEPT]
            assert torch.all(error <= bound), f"{shape}, {factor}"


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("spec", SPECS)
def test_large_tensor_comes_within_the_stated_bound(spec: str, dtype: torch.dtype) -> None:
    for shape in [(4, 32, 112, 112), (8, 128, 768)]:
        x = make(shape, dtype)
        y, _ = Ends(spec).send(x, Facts(ids=tuple(range(shape[0]))))
        assert torch.all((y.double() - x.double()).abs() <= stage_of(spec, Role.ACTIVATION).error_bound(x))


@pytest.mark.parametrize("known", KNOWN)
@pytest.mark.parametrize("chain", [*SPECS, *WITH_FACTS])
def test_no_chain_ever_sends_more_than_the_raw_tensor_whatever_is_known(chain: str, known: str) -> None:
    ends = Ends(chain)
    for shape in [(), (1,), (7,), (40,)]:
        for dtype in FLOATS:
            for kept in (KEPT, mask((1, 1, 2, 0), 2)):
                x = hidden(kept, *shape, dtype=dtype)
                facts = Facts(ids=KNOWN[known].ids, kept=kept if KNOWN[known].kept is not None else None)
                for _ in range(2):
                    assert ends.send(x, facts)[1].size <= padded(x.nbytes)


@pytest.mark.parametrize("known", KNOWN)
@pytest.mark.parametrize("chain", WITH_FACTS)
@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool])
def test_integers_and_masks_pass_unchanged_whatever_is_known(
    chain: str, dtype: torch.dtype, known: str
) -> None:
    for shape in [(4, 64), (4, 64, 3), (4,), ()]:
        x = torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        assert torch.equal(Ends(chain).send(x, KNOWN[known])[0], x)


@pytest.mark.parametrize("role", Role)
@pytest.mark.parametrize("chain", [*SPECS, *WITH_FACTS])
def test_restored_state_gives_the_same_bytes_and_the_same_tensor(chain: str, role: Role) -> None:
    facts, ends = KNOWN["both"], Ends(chain, role)
    ends.send(hidden(KEPT, 24), facts, seed=1)
    states = ends.encoder.state_dict(), ends.decoder.state_dict()
    y, encoded = ends.send(hidden(KEPT, 24, seed=1), facts, seed=2)
    ends.send(hidden(KEPT, 24, seed=2), Facts(ids=(9, 8, 7, 4), kept=KEPT), seed=3)
    for other in (Ends(chain, role), ends):
        for end, state in zip((other.encoder, other.decoder), states, strict=True):
            end.load_state_dict(state)
        other.send(hidden(KEPT, 24, seed=5), facts, seed=1)
        other.encoder.rollback()  # to what was loaded
        other.decoder.rollback()
        again, repeated = other.send(hidden(KEPT, 24, seed=1), facts, seed=2)
        assert repeated.desc == encoded.desc
        assert b"".join(repeated.buffers) == b"".join(encoded.buffers)
        assert torch.equal(again, y)


@pytest.mark.parametrize("role", Role)
@pytest.mark.parametrize("chain", [*SPECS, "lowrank:4+topk:0.1,feedback", *WITH_FACTS])
def test_undone_step_leaves_nothing_behind(chain: str, role: Role) -> None:
    facts, disturbed, plain = KNOWN["both"], Ends(chain, role), Ends(chain, role)
    for step in range(3):
        for chunk in range(2):
            disturbed.send(hidden(KEPT, 24, seed=50 + chunk), Facts(ids=(9, 4, 5 + chunk, step), kept=KEPT))
        for end in (disturbed.encoder, disturbed.decoder):
            end.rollback()
        for chunk in range(2):
            x = hidden(KEPT, 24, seed=chunk) + step / 50
            (y, encoded), (expected, undisturbed) = (
                ends.send(x, facts, seed=step) for ends in (disturbed, plain)
            )
            assert encoded.desc == undisturbed.desc
            assert b"".join(encoded.buffers) == b"".join(undisturbed.buffers)
            assert torch.equal(y, expected)
        for ends in (disturbed, plain):
            ends.encoder.commit()
            ends.decoder.commit()


# What is broken.


@pytest.mark.parametrize("known", ["ids", "both"])
@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
@pytest.mark.parametrize("spec", [*SPECS, *WITH_FACTS])
def test_what_is_not_finite_arrives_so_and_changes_no_state(spec: str, value: float, known: str) -> None:
    facts = KNOWN[known]
    x = hidden(KEPT, 24)
    encoder = StreamEncoder(spec, gradient=False)
    decoder = StreamDecoder(spec, gradient=False, max_bytes=1 << 20)

    def sent(x: Tensor) -> Tensor:
        descs, buffers = encoder.encode({"x": x}, seed=0, facts=facts)
        return decoder.decode(
            Forward(1, 0, False, ["x"], descs, bytearray(b"".join(buffers))), ["x"], facts=facts
        )["x"]

    sent(x)
    broken = x.clone()
    broken[0, 2, 3] = value
    y = sent(broken)
    assert not torch.isfinite(y[0, 2, 3])
    assert torch.isfinite(y).sum() == y.numel() - 1
    undisturbed = Ends(spec)
    undisturbed.send(x, facts)
    try:
        undisturbed.encoder.encode(broken, seed=0, facts=facts)
    except NonFiniteTensor:
        assert torch.equal(y.view(torch.int32), broken.view(torch.int32))
        assert torch.equal(sent(x), undisturbed.send(x, facts)[0])


@pytest.mark.parametrize("spec", LOSSLESS)
def test_lossless_codec_keeps_what_is_not_finite_to_the_bit(spec: str) -> None:
    x = hidden(KEPT, 24)
    x[0, 0, :3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    y, _ = Ends(spec).send(x, KNOWN["both"])
    assert torch.equal(y[KEPT].view(torch.int32), x[KEPT].view(torch.int32))


def sample(chain: str) -> tuple[Tensor, dict[str, Any], bytearray, Decoder]:
    """A second visit, so that codecs with a memory have some; and a decoder that has seen the first."""
    ends, facts = Ends(chain), KNOWN["both"]
    ends.send(hidden(KEPT, 8).round(decimals=1), facts)
    x = hidden(KEPT, 8, seed=1).round(decimals=1)
    encoded = ends.encoder.encode(x, seed=0, facts=facts)
    return x, encoded.desc, bytearray(b"".join(encoded.buffers)), ends.decoder


@pytest.mark.parametrize("spec", [*FIRST, *WITH_FACTS])
def test_every_truncated_payload_is_corrupt(spec: str) -> None:
    _, desc, payload, decoder = sample(spec)
    for size in range(0, len(payload), max(16, len(payload) // 64 // 16 * 16)):
        with pytest.raises(CorruptPayload):
            decoder.decode(desc, payload[:size], facts=KNOWN["both"])


@settings(max_examples=400, deadline=None)
@given(st.sampled_from([*FIRST, *WITH_FACTS]), st.sampled_from(sorted(KNOWN)), st.data())
def test_mutated_description_is_corrupt_or_decodes(chain: str, known: str, data: st.DataObject) -> None:
    x, desc, payload, decoder = sample(chain)
    *path, key = data.draw(st.sampled_from([place for place in places(desc) if place]))
    desc = copy.deepcopy(desc)
    target: Any = desc
    for step in path:
        target = target[step]
    near = (
        st.integers(0, 600)
        if isinstance(target[key], int)
        else st.sampled_from(["int8", "uint8", "bool", "C"])
    )
    target[key] = data.draw(near | PLAIN)
    try:
        y, _ = decoder.decode(desc, payload, facts=KNOWN[known])
    except CorruptPayload:
        return
    # A byte of lz4 stands for 255 at most, a bit of a mask for a byte, and zeros for padding are no more than x had.
    assert y.nbytes <= max(255 * len(payload), 2 * x.nbytes)


@settings(max_examples=400, deadline=None)
@given(st.sampled_from([*FIRST, *WITH_FACTS]), st.data())
def test_mutated_payload_is_corrupt_or_decodes_to_the_same_shape(chain: str, data: st.DataObject) -> None:
    x, desc, payload, decoder = sample(chain)
    for _ in range(data.draw(st.integers(1, 8))):
        payload[data.draw(st.integers(0, len(payload) - 1))] = data.draw(st.integers(0, 255))
    try:
        y, _ = decoder.decode(desc, payload, facts=KNOWN["both"])
    except CorruptPayload:
        return
    assert (y.shape, y.dtype) == (x.shape, x.dtype)


def test_steps_that_are_always_taken_are_those_known() -> None:
    assert always_on() == ("bits",)
    assert all(codec_class(name).kind == "lossless" for name in always_on())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("chain", WITH_FACTS)
def test_what_a_gpu_encodes_a_cpu_decodes(chain: str) -> None:
    encoder, decoder, plain = Encoder(parse_chain(chain), Role.ACTIVATION), Ends(chain).decoder, Ends(chain)
    for visit in range(2):
        x = hidden(KEPT, 24) + visit / 50
        encoded = encoder.encode(x.cuda(), seed=visit, facts=KNOWN["both"])
        y, _ = decoder.decode(encoded.desc, b"".join(encoded.buffers), facts=KNOWN["both"])
        torch.testing.assert_close(y, plain.send(x, KNOWN["both"], seed=visit)[0], rtol=0.01, atol=0.2)

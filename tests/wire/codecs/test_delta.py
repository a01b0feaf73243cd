"""delta: changes since a sample's last visit, and two memories that stay the same."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.wire.codecs.chunks import Ends, codecs_in, hidden, mask, only
from wire.codecs import compiled
from wire.codecs.base import NOTHING_KNOWN, Facts, NonFiniteTensor, Role
from wire.codecs.chain import Encoder, parse_chain
from wire.codecs.registry import codec_class, codec_names
from wire.errors import CorruptPayload, SpecError

EXACT = [name for name in codec_names() if codec_class(name).exact and name not in ("ragged", "delta")]
LATER = [f"{name}:{codec_class(name).examples[-1]}".removesuffix(":") for name in EXACT]
IDS = (5, 3, 2**40, 0)


def values(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def drifting(steps: int, *shape: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """A tensor that changes less and less."""
    x, all_of_them = values(*shape), []
    for step in range(steps):
        x = x + values(*shape, seed=step + 1) * 0.1 * 0.3**step
        all_of_them.append(x.to(dtype))
    return all_of_them


def memories(ends: Ends) -> tuple[Any, Any]:
    one, other = ends.encoder.state_dict(), ends.decoder.state_dict()
    return one, other


def same(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    return bool(one == other)


def test_error_shrinks_with_the_change_where_plain_quantization_keeps_its_own() -> None:
    ends, errors, plain = Ends("delta+int4"), [], []
    for x in drifting(5, 4, 8, 64):
        errors.append(float((ends.send(x, Facts(ids=IDS))[0] - x).abs().max()))
        plain.append(float((Ends("int4").send(x)[0] - x).abs().max()))
    assert errors[0] < 0.002
    assert errors[1] < 0.1 * plain[1]
    assert errors[4] < 0.005 * plain[4]


@pytest.mark.parametrize("shape", [(), (16,), (8, 12), (3, 5, 7), (2, 3, 4, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("later", LATER)
def test_both_ends_remember_the_same_to_the_bit(
    later: str, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    ends = Ends(f"delta+{later}")
    for visit, x in enumerate(drifting(4, 4, *shape, dtype=dtype)):
        ids = [IDS, (*IDS[2:], 9, 11), IDS, (11, 5, 9, 77)][visit]
        y, encoded = ends.send(x, Facts(ids=ids), seed=visit)
        one, other = memories(ends)
        assert same(one, other)
        if "delta" in codecs_in(encoded.desc):  # else padding would take more than is saved
            (state,) = one.values()
            kept = dict(
                zip(state["places"][:, 0].tolist(), state["values"].split(x.numel() // 4), strict=True)
            )
            for number, sample in enumerate(ids):
                assert torch.equal(kept[sample], y[number].reshape(-1).to(torch.float16))


def test_ends_agree_though_one_has_compiled_kernels_and_the_other_torchs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kernels = compiled.kernels
    for later in LATER:
        ends = Ends(f"delta+{later}")
        for visit, x in enumerate(drifting(3, 4, 24, 33)):
            encoded = ends.encoder.encode(x, seed=visit, facts=Facts(ids=IDS))
            with monkeypatch.context() as patch:
                patch.setattr(compiled, "kernels", lambda module, device: None)
                ends.decoder.decode(encoded.desc, bytearray(b"".join(encoded.buffers)), facts=Facts(ids=IDS))
            assert compiled.kernels is kernels
            assert same(*memories(ends)), later


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("later", LATER)
def test_ends_agree_though_one_is_a_gpu(later: str) -> None:
    ends = Ends(f"delta+{later}")
    for visit, x in enumerate(drifting(3, 4, 24, 33)):
        encoded = ends.encoder.encode(x.cuda(), seed=visit, facts=Facts(ids=IDS))
        ends.decoder.decode(encoded.desc, bytearray(b"".join(encoded.buffers)), facts=Facts(ids=IDS))
        assert same(*memories(ends))


@pytest.mark.parametrize("channels_last", [False, True])
def test_maps_keep_their_memory_order(channels_last: bool) -> None:
    ends = Ends("delta+int8")
    for visit in range(3):
        x = values(4, 8, 5, 6, seed=visit)
        x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
        y, encoded = ends.send(x, Facts(ids=IDS))
        assert y.stride() == x.stride()
        assert codecs_in(encoded.desc) == (["delta", "int8"] if visit else ["delta"])
        torch.testing.assert_close(y, x, atol=0.05, rtol=0)


def test_sample_in_another_memory_order_is_new() -> None:
    ends = Ends("delta+int8")
    x = values(4, 8, 5, 6)
    ends.send(x, Facts(ids=IDS))
    y, encoded = ends.send(x.contiguous(memory_format=torch.channels_last), Facts(ids=IDS))
    assert codecs_in(encoded.desc) == ["delta"]
    torch.testing.assert_close(y, x, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("first", "dtype", "size", "exact"),
    [("", "float16", 2, False), ("first=full", "float32", 4, True), ("first=fp16", "float16", 2, False)],
)
def test_new_samples_are_sent_as_asked_for(first: str, dtype: str, size: int, exact: bool) -> None:
    ends = Ends(f"delta:{first}+int4".replace(":+", "+"))
    x = values(4, 64, 16)
    y, encoded = ends.send(x, Facts(ids=IDS))
    assert [part["dtype"] for part in encoded.desc["parts"]] == [dtype]
    assert encoded.size == x.numel() * size
    assert torch.equal(x, y) is exact
    torch.testing.assert_close(y, x, atol=1e-3, rtol=1e-3)


def test_new_samples_may_go_through_the_rest_of_the_chain() -> None:
    ends = Ends("delta:first=rest+int4")
    x = values(4, 64, 16)
    _, encoded = ends.send(x, Facts(ids=IDS))
    assert codecs_in(encoded.desc) == ["delta", "int4"]
    _, encoded = ends.send(x[:3], Facts(ids=(3, 8, 5)))
    assert codecs_in(encoded.desc) == ["delta", "int4", "int4"]
    assert same(*memories(ends))


def test_values_beyond_what_is_kept_come_right_with_their_change() -> None:
    ends = Ends("delta+fp16")
    x = values(4, 64) * 1e4
    x[1] = 1e5
    y, _ = ends.send(x, Facts(ids=IDS))
    assert float(y.max()) == 65504
    for _ in range(2):
        y, _ = ends.send(x, Facts(ids=IDS))
        torch.testing.assert_close(y, x, rtol=1e-3, atol=1)


def test_chunk_may_hold_both_kinds_of_samples() -> None:
    ends = Ends("delta+int4")
    x = values(4, 8, 64)
    ends.send(x, Facts(ids=IDS))
    y, encoded = ends.send(x + 0.01, Facts(ids=(3, 100, 5, 101)))
    changed, new = encoded.desc["parts"]
    assert (changed["codec"], changed["shape"]) == ("int4", [2, 8, 64])
    assert (new["dtype"], new["shape"]) == ("float16", [2, 8, 64])
    # Samples 3 and 5 changed places with others, so that their change is large, and int4's error with it.
    assert float((y[1] - x[1] - 0.01).abs().max()) < 0.002
    assert same(*memories(ends))


def test_sample_twice_in_a_chunk_is_remembered_as_it_came_last() -> None:
    ends = Ends("delta+int4")
    ends.send(values(4, 64), Facts(ids=(1, 1, 2, 2)))
    one, other = memories(ends)
    assert same(one, other)
    (state,) = one.values()
    assert torch.equal(state["values"].view(2, 64), values(4, 64)[(1, 3), :].half())


def test_samples_without_ids_are_new_and_leave_nothing_behind() -> None:
    ends = Ends("delta+int4")
    for shape in [(), (70,), (4, 64)]:
        y, encoded = ends.send(values(*shape), NOTHING_KNOWN)
        assert codecs_in(encoded.desc) == ["delta"]
        assert [part["dtype"] for part in encoded.desc["parts"]] == ["float16"]
        torch.testing.assert_close(y, values(*shape), atol=1e-3, rtol=1e-3)
    assert memories(ends) == ({}, {})


def test_gradients_go_straight_to_the_rest_of_the_chain() -> None:
    ends = Ends("delta+int4", Role.GRADIENT)
    for _ in range(2):
        _, encoded = ends.send(values(4, 64), Facts(ids=IDS))
        assert codecs_in(encoded.desc) == ["int4"]
    assert memories(ends) == ({}, {})
    _, sent = Ends("delta+int4").send(values(4, 64), Facts(ids=IDS))
    with pytest.raises(CorruptPayload, match="delta never takes gradients"):
        ends.decoder.decode(sent.desc, bytearray(b"".join(sent.buffers)), facts=Facts(ids=IDS))


@pytest.mark.parametrize(
    "x", [values(5, 64), torch.ones(4, 64, dtype=torch.int32), values(4, 0, 8), values(4, 64).double()]
)
def test_tensor_that_falls_into_no_samples_goes_on_as_it_is(x: Tensor) -> None:
    y, encoded = Ends("delta").send(x, Facts(ids=IDS))
    assert codecs_in(encoded.desc) == []
    assert torch.equal(x, y)


def test_several_rows_of_a_sample_stay_together() -> None:
    ends = Ends("delta+int8")
    x = values(8, 3, 40)
    ends.send(x, Facts(ids=IDS))
    y, encoded = ends.send(x[2:6], Facts(ids=(3, 2**40)))
    assert codecs_in(encoded.desc) == ["delta", "int8"]
    torch.testing.assert_close(y, x[2:6], atol=1e-4, rtol=1e-4)


# What does not fit.


def test_samples_beyond_the_limit_are_new_every_time_on_both_ends() -> None:
    ends = Ends("delta:limit=48K+int4")
    x = values(4, 8, 64)
    for _ in range(3):
        y, encoded = ends.send(x, Facts(ids=IDS))
        torch.testing.assert_close(y, x, atol=2e-3, rtol=2e-3)
        assert same(*memories(ends))
    assert [part["shape"] for part in encoded.desc["parts"]] == [[3, 8, 64], [1, 8, 64]]


@pytest.mark.parametrize(
    "args", ["limit=0", "limit=4X", "limit=", "limit=-3", "limit", "first=int8", "half", "limit=1G,limit=2G"]
)
def test_arguments_that_are_none_are_pointed_at(args: str) -> None:
    with pytest.raises(SpecError) as error:
        parse_chain(f"fp16+delta:{args}")
    assert error.value.position >= len("fp16+delta:") or "wrong place" not in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("spec", "position", "says"),
    [
        ("int4+delta", 5, "only ragged comes before it"),
        ("fp16+delta+zstd", 5, "only ragged comes before it"),
        ("delta+lowrank:4", 0, "lowrank, behind it, is rounded otherwise on another machine"),
        ("ragged+delta+lowrank:4+int8", 7, "lowrank, behind it"),
    ],
)
def test_places_in_a_chain_that_make_no_sense_are_pointed_at(spec: str, position: int, says: str) -> None:
    with pytest.raises(SpecError, match=says) as error:
        parse_chain(spec)
    assert error.value.position == position


# Texts.


@pytest.mark.parametrize("later", LATER)
def test_tokens_are_remembered_without_their_padding(later: str) -> None:
    kept = mask((31, 3, 64, 17), 64)
    ends = Ends(f"ragged+delta+{later}")
    x = hidden(kept, 24)
    for visit in range(3):
        x = x + values(*x.shape, seed=visit) * 0.01
        y, encoded = ends.send(x, Facts(ids=IDS, kept=kept), seed=visit)
        assert codecs_in(encoded.desc)[:2] == ["ragged", "delta"]
        assert same(*memories(ends))
        assert not y[~kept].any()
    (state,) = memories(ends)[0].values()
    assert state["places"][:, 3].tolist() == [31 * 24, 3 * 24, 64 * 24, 17 * 24]


def test_text_is_known_again_beside_longer_and_shorter_ones() -> None:
    ends = Ends("ragged+delta+int8")
    kept = mask((31, 3), 64)
    x = hidden(kept, 24)
    ends.send(x, Facts(ids=(1, 2), kept=kept))
    narrow = mask((3, 31), 31)
    y, encoded = ends.send(x[(1, 0), :31], Facts(ids=(2, 1), kept=narrow))
    assert codecs_in(encoded.desc) == ["ragged", "delta", "int8"]
    torch.testing.assert_close(y, only(narrow, x[(1, 0), :31]), atol=1e-4, rtol=1e-3)
    alone, encoded = ends.send(x[:1, :31], Facts(ids=(1,), kept=mask((31,), 31)))
    assert codecs_in(encoded.desc) == ["delta", "int8"]
    torch.testing.assert_close(alone, x[:1, :31], atol=1e-4, rtol=1e-3)


def test_text_without_any_token_costs_nothing() -> None:
    kept = mask((31, 0), 64)
    ends = Ends("ragged+delta+int8")
    for _ in range(3):
        y, _ = ends.send(hidden(kept, 24), Facts(ids=(1, 2), kept=kept))
        torch.testing.assert_close(y, only(kept, hidden(kept, 24)), atol=1e-3, rtol=1e-3)
        assert same(*memories(ends))


# Broken tensors and payloads.


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_tensor_that_is_not_finite_is_refused_and_nothing_is_remembered(value: float) -> None:
    encoder = Encoder(parse_chain("delta+int4"), Role.ACTIVATION)
    encoder.encode(values(4, 64), seed=0, facts=Facts(ids=IDS))
    before = encoder.state_dict()
    broken = values(4, 64, seed=1)
    broken[2, 3] = value
    with pytest.raises(NonFiniteTensor):
        encoder.encode(broken, seed=0, facts=Facts(ids=IDS))
    assert same(encoder.state_dict(), before)


def test_peer_with_another_memory_is_found_out() -> None:
    ends = Ends("delta+int4")
    encoded = ends.encoder.encode(values(4, 64), seed=0, facts=Facts(ids=IDS))
    again = ends.encoder.encode(values(4, 64), seed=0, facts=Facts(ids=IDS))
    assert again.desc != encoded.desc
    with pytest.raises(CorruptPayload, match="not agreed on here"):
        ends.decoder.decode(again.desc, bytearray(b"".join(again.buffers)), facts=Facts(ids=IDS))


@pytest.mark.parametrize(
    "facts",
    [Facts(ids=(1, 2, 3)), Facts(ids=()), Facts(ids=(1,) * 65_536), Facts(ids=IDS[:2] * 3, kept=mask())],
)
def test_ids_that_fit_no_sample_are_corrupt(facts: Facts) -> None:
    ends = Ends("delta+int4")
    encoded = ends.encoder.encode(values(4, 64), seed=0, facts=Facts(ids=IDS))
    with pytest.raises(CorruptPayload, match="in such a chunk"):
        ends.decoder.decode(encoded.desc, bytearray(b"".join(encoded.buffers)), facts=facts)


def test_description_that_delta_never_makes_is_corrupt() -> None:
    ends = Ends("delta")
    encoded = ends.encoder.encode(values(4, 64), seed=0, facts=Facts(ids=IDS))
    payload = bytearray(b"".join(encoded.buffers))
    for change in (
        lambda desc: desc.update(meta={"new": 4}),
        lambda desc: desc.update(dtype="int64"),
        lambda desc: desc["parts"].append(desc["parts"][0]),
        lambda desc: desc["parts"].clear(),
        lambda desc: desc["parts"][0].update(dtype="float32", size=1024),
        lambda desc: desc["parts"][0].update(shape=[3, 64], size=384),
    ):
        wrong = copy.deepcopy(encoded.desc)
        change(wrong)
        with pytest.raises(CorruptPayload):
            ends.decoder.decode(wrong, payload, facts=Facts(ids=IDS))
    assert ends.decoder.state_dict() == {}


# Steps.


@pytest.mark.parametrize("chain", ["delta+int4", "ragged+delta+int4", "delta:limit=48K+topk:0.1"])
def test_step_that_is_undone_and_repeated_gives_the_same_bytes(chain: str) -> None:
    kept = mask((31, 3, 64, 17), 64)
    disturbed, plain = Ends(chain), Ends(chain)
    for step, x in enumerate(drifting(5, 4, 64, 12)):
        ids = [IDS, (0, 7, 8, 5), IDS, (8, 3, 9, 10), IDS][step]
        facts = Facts(ids=ids, kept=kept)
        for attempt in range(3 if step % 2 else 1):
            if attempt:
                for end in (disturbed.encoder, disturbed.decoder):
                    end.rollback()
            disturbed.send(x * 3 - attempt, facts)
            disturbed.send(x, Facts(ids=(7, 3, 55, 56), kept=kept))
        for end in (disturbed.encoder, disturbed.decoder):
            end.rollback()
        y, encoded = disturbed.send(x, facts)
        expected, undisturbed = plain.send(x, facts)
        assert encoded.desc == undisturbed.desc
        assert b"".join(encoded.buffers) == b"".join(undisturbed.buffers)
        assert torch.equal(y, expected)
        for end in (disturbed.encoder, disturbed.decoder, plain.encoder, plain.decoder):
            end.commit()
        assert all(same(state, memories(plain)[0]) for state in memories(disturbed))

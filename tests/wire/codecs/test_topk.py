"""topk."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wire.codecs import bits, compiled, positions
from wire.codecs.base import NonFiniteTensor, Role
from wire.codecs.chain import Decoder, Encoder, parse_chain
from wire.codecs.layout import padded
from wire.errors import CorruptPayload, SpecError

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def encoder_of(spec):
    return Encoder(parse_chain(spec), Role.GRADIENT)


def decode(spec, desc, payload):
    return Decoder(parse_chain(spec), Role.GRADIENT).decode(desc, bytearray(payload))[0]


def through(encoder, spec, x):
    encoded = encoder.encode(x, seed=0)
    return decode(spec, encoded.desc, b"".join(encoded.buffers))


def send(spec, x):
    return through(encoder_of(spec), spec, x)


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def without_kernels(patch):
    patch.setattr(compiled, "kernels", lambda module, device: None)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(4, 500), (2, 8, 15, 15), (3, 7, 64), (999,)])
def test_the_largest_of_each_sample_arrive_unchanged_and_the_rest_as_zeros(shape, dtype):
    x = random(*shape).to(dtype)
    y = send("topk:0.1", x)
    rows = (1, -1) if len(shape) == 1 else (shape[0], -1)
    for sent, received in zip(x.reshape(rows), y.reshape(rows), strict=True):
        kept = received != 0
        assert kept.sum() == -(-sent.numel() // 10)
        assert torch.equal(received[kept], sent[kept])
        assert sent[kept].abs().min() >= sent[~kept].abs().max()


def test_of_equal_values_the_first_are_kept():
    x = torch.ones(2, 1000)
    x[:, ::2] = -1
    x[1, 700] = 2.0
    y = send("topk:0.01", x)
    assert y[0].nonzero().view(-1).tolist() == list(range(10))
    assert y[1].nonzero().view(-1).tolist() == [*range(9), 700]


def test_channels_last_samples_are_told_apart():
    x = random(3, 8, 9, 9).contiguous(memory_format=torch.channels_last)
    y = send("topk:0.1", x)
    assert torch.equal((y != 0).flatten(1).sum(1), torch.full((3,), 65))
    assert y.stride() == x.stride()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fraction", [0.001, 0.1, 0.4])
@pytest.mark.parametrize("shape", [(4, 2000), (2, 8, 30, 31), (3001,)])
def test_the_kernels_choose_what_torch_chooses(monkeypatch, shape, fraction, dtype):
    x = random(*shape).round(decimals=1).to(dtype)  # many are equal
    encoded = encoder_of(f"topk:{fraction}").encode(x, seed=0)
    without_kernels(monkeypatch)
    again = encoder_of(f"topk:{fraction}").encode(x, seed=0)
    assert (again.desc, b"".join(again.buffers)) == (encoded.desc, b"".join(encoded.buffers))


@pytest.mark.parametrize("fraction", [0.001, 0.01, 0.1, 0.3, 0.6])
def test_positions_take_little_more_than_they_must(fraction):
    chosen = torch.rand(100_000, generator=torch.Generator().manual_seed(0)) < fraction
    where = chosen.nonzero().view(-1)
    layout, data = positions.write(where, chosen.numel())
    p = torch.tensor([fraction, 1 - fraction])
    entropy = float(-(p * p.log2()).sum()) * chosen.numel() / 8
    assert data.numel() == layout.size < 1.15 * entropy
    assert torch.equal(positions.read(data, layout, where.numel()), where)


def test_at_least_one_value_of_each_sample_is_kept():
    assert torch.equal((send("topk:1e-9", random(4, 500)) != 0).sum(1), torch.ones(4, dtype=torch.int64))


def test_a_bitmap_is_taken_where_it_is_smaller():
    assert encoder_of("topk:0.45").encode(random(4, 2000), seed=0).desc["meta"] == {"index": "bitmap"}
    meta = encoder_of("topk:0.01").encode(random(4, 2000), seed=0).desc["meta"]
    assert meta["index"] == "gaps"


@settings(deadline=None)
@given(st.sets(st.integers(0, 70_000), min_size=1, max_size=60), st.integers(0, 300_000))
def test_positions_are_read_as_they_were_written(chosen, more):
    where = torch.tensor(sorted(chosen))
    length = int(where[-1]) + 1 + more
    layout, data = positions.write(where, length)
    assert data.numel() == layout.size
    assert positions.Layout.parse(layout.meta(), length, where.numel()) == layout
    assert torch.equal(positions.read(data, layout, where.numel()), where)
    with pytest.MonkeyPatch.context() as patch:
        without_kernels(patch)
        again, same = positions.write(where, length)
        assert (again, same.tolist()) == (layout, data.tolist())
        assert torch.equal(positions.read(data, layout, where.numel()), where)


def test_positions_in_clusters_and_far_apart_are_read_as_they_were_written():
    where = torch.cat((torch.arange(5000), torch.tensor([2_000_000, 3_999_999])))
    layout, data = positions.write(where, 4_000_000)
    assert torch.equal(positions.read(data, layout, where.numel()), where)


def test_sizes_are_those_that_the_description_comes_to():
    x = random(4, 2000)
    encoded = encoder_of("topk:0.01").encode(x, seed=0)
    values, index = encoded.desc["parts"]
    meta = encoded.desc["meta"]
    assert values["shape"] == [4, 20]
    assert index["size"] == bits.packed_size(meta["codes"], meta["bits"])
    assert encoded.size == padded(320) + padded(index["size"])


def test_values_and_positions_go_on_through_the_chain():
    x = random(4, 20_000)
    encoded = encoder_of("topk:0.05+int8").encode(x, seed=0)
    assert encoded.desc["parts"][0]["codec"] == "int8"
    y = decode("topk:0.05+int8", encoded.desc, b"".join(encoded.buffers))
    torch.testing.assert_close(y, send("topk:0.05", x), rtol=0, atol=0.05)


@pytest.mark.parametrize(
    "meta",
    [
        {},
        {"index": "bits"},
        {"index": "bitmap", "bits": 3},
        {"index": "gaps"},
        {"index": "gaps", "bits": 1, "codes": 100},
        {"index": "gaps", "bits": 17, "codes": 100},
        {"index": "gaps", "bits": 8.0, "codes": 100},
        {"index": "gaps", "bits": 8, "codes": 79},
        {"index": "gaps", "bits": 8, "codes": 112},
        {"index": "gaps", "bits": 8, "codes": True},
        {"index": "gaps", "bits": 8, "codes": 1 << 40},
        {"index": ["gaps"], "bits": 8, "codes": 100},
    ],
)
def test_a_layout_that_there_is_not_is_corrupt(meta):
    encoded = encoder_of("topk:0.01").encode(random(4, 2000), seed=0)
    with pytest.raises(CorruptPayload, match="are not written as"):
        decode("topk:0.01", {**encoded.desc, "meta": meta}, b"".join(encoded.buffers))


def rewritten(where):
    """topk:0.01 of [4, 2000], with other positions than those that were chosen."""
    encoded = encoder_of("topk:0.01").encode(random(4, 2000), seed=0)
    found, data = positions.write(torch.tensor(where), 8001)
    desc = {**encoded.desc, "meta": found.meta()}
    values, index = desc["parts"]
    desc["parts"] = [values, {**index, "shape": [data.numel()], "size": data.numel()}]
    payload = b"".join(encoded.buffers)[: padded(320)] + bytes(data.tolist())
    return desc, payload.ljust(padded(320) + padded(data.numel()), b"\0")


def test_positions_beside_their_samples_are_corrupt():
    right = [2000 * sample + i for sample in range(4) for i in range(20)]
    decode("topk:0.01", *rewritten(right))
    for wrong in ([*range(21), *right[21:]], [*right[:19], *range(2000, 2021), *right[40:]]):
        with pytest.raises(CorruptPayload, match="in each sample"):
            decode("topk:0.01", *rewritten(wrong))


def test_fewer_more_or_larger_positions_are_corrupt():
    right = [2000 * sample + i for sample in range(4) for i in range(20)]
    for wrong in (right[:-1], [*right, 7999], [*right[:-1], 8000]):
        with pytest.raises(CorruptPayload):
            decode("topk:0.01", *rewritten(wrong))


@settings(deadline=None)
@given(st.data())
def test_any_positions_are_corrupt_or_decode_to_as_many_values(data):
    fraction = data.draw(st.sampled_from(["0.01", "0.2", "0.45"]))
    x = random(2, 300)
    encoded = encoder_of(f"topk:{fraction}").encode(x, seed=0)
    payload = bytearray(b"".join(encoded.buffers))
    index = encoded.desc["parts"][1]["size"]
    start = padded(encoded.desc["parts"][0]["size"])
    for _ in range(data.draw(st.integers(1, 5))):
        payload[start + data.draw(st.integers(0, index - 1))] = data.draw(st.integers(0, 255))
    try:
        y = decode(f"topk:{fraction}", encoded.desc, payload)
    except CorruptPayload:
        return
    assert torch.equal((y != 0).sum(1), (send(f"topk:{fraction}", x) != 0).sum(1))


@pytest.mark.parametrize("spec", ["topk:0.1", "topk:0.1,feedback"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [torch.nan, -torch.nan, torch.inf, -torch.inf])
def test_nan_and_infinity_are_refused_and_leave_the_state_alone(monkeypatch, bad, dtype, spec):
    x = random(4, 500).to(dtype)
    encoder = encoder_of(spec)
    encoder.encode(x, seed=0)
    y = x.clone()
    y[2, 3] = bad
    with pytest.raises(NonFiniteTensor, match="topk"):
        encoder.encode(y, seed=0)
    same, other = encoder_of(spec), encoder.encode(x, seed=0)
    same.encode(x, seed=0)
    assert b"".join(same.encode(x, seed=0).buffers) == b"".join(other.buffers)
    without_kernels(monkeypatch)
    with pytest.raises(NonFiniteTensor):
        encoder.encode(y, seed=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_with_feedback_what_was_left_out_comes_later(dtype):
    x = random(3, 400).to(dtype)
    encoder = encoder_of("topk:0.1,feedback")
    count = 100
    mean = sum(through(encoder, "topk:0.1,feedback", x).double() for _ in range(count)) / count
    # What is left out in the end is bounded; without feedback the error would be x itself.
    assert (mean - x.double()).abs().max() < 0.25
    assert (send("topk:0.1", x).double() - x.double()).abs().max() > 1


def test_feedback_adds_up_exactly():
    spec = "topk:0.1,feedback"
    encoder = encoder_of(spec)
    tensors = [(random(3, 400, seed=seed) * 64).round() for seed in range(5)]
    received = sum(through(encoder, spec, x) for x in tensors)
    (state,) = encoder.state_dict().values()
    assert torch.equal(received + state["left"], sum(tensors))


def test_a_smaller_chunk_leaves_the_other_samples_memory_alone():
    spec = "topk:0.1,feedback"
    encoder = encoder_of(spec)
    encoder.encode(random(4, 400), seed=0)
    (before,) = encoder.state_dict().values()
    encoder.encode(random(2, 400, seed=1), seed=0)
    (after,) = encoder.state_dict().values()
    assert torch.equal(before["left"][2:], after["left"][2:])
    assert not torch.equal(before["left"][:2], after["left"][:2])


def test_samples_of_another_shape_start_over():
    spec = "topk:0.1,feedback"
    encoder = encoder_of(spec)
    encoder.encode(random(4, 400), seed=0)
    x = random(4, 20, 20, seed=1)
    assert torch.equal(through(encoder, spec, x), send(spec, x))


def test_the_state_that_was_given_out_does_not_change():
    encoder = encoder_of("topk:0.1,feedback")
    encoder.encode(random(4, 400), seed=0)
    (state,) = encoder.state_dict().values()
    kept = state["left"].clone()
    encoder.encode(random(4, 400, seed=1), seed=0)
    assert torch.equal(state["left"], kept)


def test_without_feedback_there_is_no_state():
    encoder = encoder_of("topk:0.1")
    encoder.encode(random(4, 400), seed=0)
    assert encoder.state_dict() == {}
    with pytest.raises(ValueError, match="keeps no state"):
        encoder.load_state_dict({":topk:0.1": {"left": 1}})


@pytest.mark.parametrize(
    "state",
    [
        {"left": torch.zeros(2, 3)},
        {"left": torch.zeros(2, 3), "shape": [4], "order": "C"},
        {"left": torch.zeros(6), "shape": [3], "order": "C"},
        {"left": torch.zeros(2, 3).half(), "shape": [3], "order": "C"},
    ],
)
def test_a_state_that_does_not_fit_is_refused(state):
    with pytest.raises(ValueError, match="topk"):
        encoder_of("topk:0.1,feedback").load_state_dict({":topk:0.1,feedback": state})


@pytest.mark.parametrize(
    ("text", "position"),
    [
        ("topk", 0),
        ("fp16+topk", 5),
        ("topk:0", 5),
        ("topk:1", 5),
        ("topk:1.5", 5),
        ("topk:-0.1", 5),
        ("topk:nan", 5),
        ("topk:feedback", 5),
        ("topk:0.1,feedbak", 9),
        ("topk:0.1,feedback,feedback", 18),
    ],
)
def test_wrong_arguments_are_pointed_at(text, position):
    with pytest.raises(SpecError) as caught:
        parse_chain(text)
    assert caught.value.position == position

"""lowrank: how near it comes to the best approximation, what it remembers, and what it leaves alone."""

import pytest
import torch

from wire.codecs.base import NOTHING_KNOWN, Call, NonFiniteTensor, Role
from wire.codecs.chain import Decoder, Encoder, parse_chain
from wire.codecs.layout import TensorType
from wire.codecs.lowrank import _MOST_STARTS, LowRank, orthonormal
from wire.codecs.matrices import Matrices
from wire.errors import CorruptPayload

CALL = Call(0)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def channels_last(x):
    return x.contiguous(memory_format=torch.channels_last)


def codec(rank=4):
    return LowRank(str(rank), Role.ACTIVATION)


def encode(coder, x):
    packed = coder.encode(x, CALL)
    assert packed is not None
    return [part.tensor for part in packed.parts]


def approximation(coder, x):
    return coder.decode(encode(coder, x), TensorType.of(x), {}, NOTHING_KNOWN)


def samples_as_matrices(x):
    return x.flatten(2) if x.dim() == 4 else x


def best_error(x, rank):
    """Of the truncated singular value decomposition, for each sample."""
    values = torch.linalg.svdvals(samples_as_matrices(x).double())
    return values[:, rank:].square().sum(1).sqrt()


def error(y, x):
    return samples_as_matrices(y.double() - x.double()).norm(dim=(1, 2))


def spread(shape, seed=0, decay=0.8):
    """Samples whose singular values fall off as activations' do: fast at first, then slowly."""
    count, *rest = shape
    n, m = rest[0], torch.Size(rest[1:]).numel()
    size = min(n, m)
    u = torch.linalg.qr(torch.randn(count, n, size, generator=generator(seed))).Q
    v = torch.linalg.qr(torch.randn(count, m, size, generator=generator(seed + 1))).Q
    values = decay ** torch.arange(size) + 0.02
    return ((u * values) @ v.transpose(1, 2)).reshape(shape)


@pytest.mark.parametrize("order", [torch.clone, channels_last])
@pytest.mark.parametrize("shape", [(3, 24, 12, 12), (3, 96, 5, 5), (2, 48, 100), (2, 100, 48)])
@pytest.mark.parametrize("rank", [1, 8])
def test_after_warming_up_it_is_within_5_percent_of_the_best(shape, order, rank):
    if len(shape) == 3 and order is channels_last:
        pytest.skip("for maps")
    coder, x = codec(rank), spread(shape)
    for step in range(8):
        x = x + 0.02 * x.std() * torch.randn(shape, generator=generator(step))
        y = approximation(coder, order(x))
    assert torch.all(error(y, x) <= 1.05 * best_error(x, rank))


@pytest.mark.parametrize("shape", [(3, 24, 12, 12), (2, 48, 100)])
def test_the_first_tensor_of_a_stream_comes_out_well_too(shape):
    x = spread(shape)
    assert torch.all(error(approximation(codec(8), x), x) <= 1.2 * best_error(x, 8))


@pytest.mark.parametrize("rank", [2, 3, 8])
def test_other_samples_of_one_kind_come_out_nearly_as_well(rank):
    # As the maps of other images do: their features lie alike, each is strong in one and weak in another.
    features = torch.linalg.qr(torch.randn(24, 24, generator=generator())).Q * 0.8 ** torch.arange(24)
    coder = codec(rank)
    for step in range(8):
        drawn = generator(step)
        strengths = (0.4 * torch.randn(32, 24, 1, generator=drawn)).exp()
        x = features @ (strengths * torch.randn(32, 24, 144, generator=drawn))
        x = x.reshape(32, 24, 12, 12)
        y = approximation(coder, x)
    # With a single step it would be 9 to 12 % above.
    assert error(y, x).square().sum() <= 1.08**2 * best_error(x, rank).square().sum()


def test_what_it_remembers_brings_it_nearer():
    x = spread((2, 48, 100), decay=0.95)
    coder = codec(8)
    errors = [error(approximation(coder, x), x) for _ in range(6)]
    assert torch.all(errors[-1] < errors[0])


@pytest.mark.parametrize("order", [torch.clone, channels_last])
@pytest.mark.parametrize("shape", [(2, 6, 8, 8), (2, 90, 3, 3), (2, 30, 50), (2, 50, 30)])
def test_a_sample_of_that_rank_comes_back(shape, order):
    rank = 3
    left = torch.randn(shape[0], shape[1], rank, generator=generator(1))
    right = torch.randn(shape[0], rank, torch.Size(shape[2:]).numel(), generator=generator(2))
    x = (left @ right).reshape(shape)
    x = order(x) if x.dim() == 4 else x
    y = approximation(codec(rank), x)
    torch.testing.assert_close(y, x, rtol=0, atol=2e-5 * x.abs().max().item())
    assert y.stride() == x.stride()


def test_both_memory_orders_give_the_same_but_for_rounding():
    x = spread((2, 16, 10, 10))
    y, z = approximation(codec(), x), approximation(codec(), channels_last(x))
    assert torch.all((error(y, x) / error(z, x)).log().abs() < 0.1)


def test_each_sample_is_factored_by_itself():
    x = spread((3, 16, 10, 10))
    y = approximation(codec(), x)
    torch.testing.assert_close(approximation(codec(), x[1:2]), y[1:2], rtol=1e-3, atol=1e-4)


def test_the_factors_lie_component_by_component():
    long, short = encode(codec(4), spread((2, 100, 48)))
    assert (long.shape, short.shape) == ((2, 4, 100), (2, 4, 48))
    assert long.is_contiguous()
    assert short.is_contiguous()


@pytest.mark.parametrize(("chain", "size"), [("lowrank:4", 4), ("lowrank:4+int8", 1), ("lowrank:4+fp16", 2)])
def test_both_factors_go_on_through_the_chain(chain, size):
    encoded = Encoder(parse_chain(chain), Role.ACTIVATION).encode(spread((2, 128, 256)), seed=0)
    ranges = 2 * 2 * 2 * 4 * 4 if "int8" in chain else 0
    assert encoded.size == size * 2 * 4 * (128 + 256) + ranges


@pytest.mark.parametrize("role", Role)
def test_quantized_factors_still_make_nearly_the_same(role):
    x = spread((2, 128, 256))
    encoder, decoder = (
        Encoder(parse_chain("lowrank:8+int8"), role),
        Decoder(parse_chain("lowrank:8+int8"), role),
    )
    for seed in range(4):
        encoded = encoder.encode(x, seed=seed)
    y, _ = decoder.decode(encoded.desc, b"".join(encoded.buffers))
    assert torch.all(error(y, x) <= 1.05 * best_error(x, 8))


def test_zeros_come_back_as_zeros_and_do_not_spoil_what_follows():
    coder, x = codec(4), spread((2, 16, 10, 10))
    assert torch.equal(approximation(coder, torch.zeros_like(x)), torch.zeros_like(x))
    for _ in range(6):
        y = approximation(coder, x)
    assert torch.all(error(y, x) <= 1.05 * best_error(x, 4))


def test_channels_that_were_dead_are_found_when_they_come_to_life():
    coder, x = codec(4), spread((2, 16, 10, 10))
    dead = x.clone()
    dead[:, 2:] = 0
    for _ in range(4):
        assert torch.all(error(approximation(coder, dead), dead) < 1e-5)
    for _ in range(6):
        y = approximation(coder, x)
    assert torch.all(error(y, x) <= 1.05 * best_error(x, 4))


@pytest.mark.parametrize("scale", [1e-15, 1e-6, 1e6, 1e15])
def test_the_scale_does_not_matter(scale):
    x = spread((2, 48, 100))
    y = approximation(codec(8), x * scale) / scale
    torch.testing.assert_close(y, approximation(codec(8), x), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "w",
    [
        torch.zeros(2, 3, 5),
        torch.ones(2, 3, 5),
        torch.full((2, 3, 5), 1e-44),
        torch.eye(3, 5).repeat(2, 1, 1) * torch.tensor([1e30, 1.0, 1e-30]).view(3, 1),
        torch.randn(2, 5, 5, generator=torch.Generator().manual_seed(0)),
    ],
    ids=["zero", "rank 1", "subnormal", "of many scales", "square"],
)
def test_a_basis_is_orthonormal_whatever_it_is_made_of(w):
    basis = orthonormal(w)
    torch.testing.assert_close(
        basis @ basis.transpose(1, 2), torch.eye(w.shape[1]).expand(2, -1, -1), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("warm", [False, True])
def test_nan_and_infinity_are_refused_and_leave_no_trace(bad, dtype, warm):
    for x in (spread((2, 16, 10, 10)), channels_last(spread((2, 16, 10, 10))), spread((2, 100, 48))):
        coder, x = codec(), x.to(dtype)
        if warm:
            encode(coder, x)
        before = coder.state_dict()
        spoilt = x.clone()
        spoilt[(1, 3, 5, 7)[: x.dim()]] = bad
        with pytest.raises(NonFiniteTensor, match="lowrank"):
            coder.encode(spoilt, CALL)
        assert same(coder.state_dict(), before)


def same(one, other):
    starts = [state.get("starts", []) for state in (one, other)]
    return len(starts[0]) == len(starts[1]) and all(map(torch.equal, *starts))


@pytest.mark.parametrize(
    ("top", "dtype"), [(3e38, torch.float32), (3e38, torch.bfloat16), (65504, torch.float16)]
)
def test_values_too_large_for_the_products_are_sent_raw(top, dtype):
    x = torch.full((2, 20, 30), top, dtype=dtype)
    coder = codec()
    assert coder.encode(x, CALL) is None
    assert coder.state_dict() == {}


def test_products_beyond_half_precision_become_its_largest():
    rows, columns = torch.full((1, 4, 40), 30_000.0).half(), torch.ones(1, 4, 60).half()
    y = codec().decode([rows, -columns], TensorType(torch.float16, (1, 40, 60)), {}, NOTHING_KNOWN)
    assert torch.equal(y, torch.full((1, 40, 60), -65504.0).half())


@pytest.mark.parametrize(
    ("shape", "rank"),
    [((2, 8, 100), 9), ((2, 8, 100), 8), ((2, 16, 16), 8), ((4, 1280, 1, 1), 1), ((64, 100), 1), ((7,), 1)],
)
def test_what_would_not_be_smaller_is_sent_raw(shape, rank):
    x = torch.randn(shape, generator=generator())
    assert codec(rank).encode(x, CALL) is None


def test_a_rank_above_the_smaller_side_is_known_not_to_fit():
    def misfit(rank, *shape):
        return codec(rank).misfit(TensorType(torch.float32, shape))

    assert misfit(8, 2, 8, 100) is None
    assert misfit(9, 2, 8, 100) == "a sample is a matrix 8x100; ranks up to 7 make it smaller"
    assert misfit(21, 2, 20, 37, 37) == "a sample is a matrix 20x1369; ranks up to 19 make it smaller"
    assert misfit(2, 2, 1280, 1, 1) == "a sample is a matrix 1280x1, which no rank makes smaller"
    assert misfit(1, 64, 100) == "it takes [B,C,H,W] and [B,S,H], not 2 dimensions"


def test_each_shape_of_a_stream_is_remembered():
    coder, whole, last = codec(8), spread((4, 48, 100), decay=0.95), spread((3, 48, 100), seed=7, decay=0.95)
    for _ in range(6):
        approximation(coder, whole)
        errors = error(approximation(coder, last), last)
    assert torch.all(errors < error(approximation(codec(8), last), last))
    assert len(coder.state_dict()["starts"]) == 2


def test_only_the_latest_shapes_are_remembered():
    coder = codec(1)
    for count in range(1, _MOST_STARTS + 4):
        encode(coder, spread((count, 8, 10)))
        encode(coder, spread((1, 8, 10)))
    counts = [start.shape[0] for start in coder.state_dict()["starts"]]
    assert counts == [*range(5, _MOST_STARTS + 4), 1]


def test_what_it_remembers_lies_on_the_side_of_the_features():
    for x, features in (
        (spread((2, 20, 50)), 50),
        (spread((2, 50, 20)), 20),
        (spread((2, 6, 8, 8)), 6),
        (channels_last(spread((2, 6, 8, 8))), 6),
        (spread((2, 90, 3, 3)), 90),
    ):
        coder = codec(2)
        encode(coder, x)
        assert [start.shape for start in coder.state_dict()["starts"]] == [(2, 2, features)]


def test_a_state_taken_is_not_changed_by_later_calls_and_repeats_them():
    coder = codec()
    encode(coder, spread((2, 48, 100)))
    state = coder.state_dict()
    kept = [start.clone() for start in state["starts"]]
    first = encode(coder, spread((2, 48, 100), seed=5))
    encode(coder, spread((2, 48, 100), seed=9))
    assert all(map(torch.equal, state["starts"], kept))
    coder.load_state_dict(state)
    assert all(map(torch.equal, encode(coder, spread((2, 48, 100), seed=5)), first))


def test_bytes_depend_on_the_tensors_before_and_on_no_seed():
    streams = [codec(), codec()]
    for seed, coder in enumerate(streams):
        torch.manual_seed(seed)
        for tensor in range(3):
            packed = coder.encode(spread((2, 48, 100), seed=tensor), Call(seed * 7 + tensor))
    assert same(*(coder.state_dict() for coder in streams))
    assert packed is not None


@pytest.mark.parametrize(
    "state",
    [
        {"q": 1},
        {"starts": 3},
        {"starts": [1]},
        {"starts": [torch.zeros(2, 5, 8)]},
        {"starts": [torch.zeros(2, 4, 8, dtype=torch.float64)]},
        {"starts": [torch.zeros(2, 4)]},
        {"starts": [torch.zeros(2, 4, 8)] * (_MOST_STARTS + 1)},
    ],
)
def test_a_state_of_another_codec_is_refused(state):
    with pytest.raises(ValueError, match="not one of lowrank:4"):
        codec(4).load_state_dict(state)


@pytest.mark.parametrize(
    ("dtype", "shape"),
    [
        (torch.float32, (2, 8, 100)),
        (torch.float64, (2, 80, 100)),
        (torch.uint8, (2, 80, 100)),
        (torch.float32, (80, 100)),
        (torch.float32, (0, 80, 100)),
    ],
)
def test_a_description_that_it_never_makes_is_corrupt(dtype, shape):
    with pytest.raises(CorruptPayload, match="lowrank:9 never takes"):
        codec(9).part_types(TensorType(dtype, shape), {}, NOTHING_KNOWN)
    with pytest.raises(CorruptPayload, match="meta"):
        codec(9).part_types(TensorType(torch.float32, (2, 80, 100)), {"rank": 9}, NOTHING_KNOWN)


def test_matrices_are_the_memory_itself():
    x = channels_last(torch.randn(2, 3, 4, 5))
    matrices = Matrices.of(TensorType.of(x))
    assert matrices is not None
    assert (matrices.rows, matrices.columns, matrices.features) == (20, 3, "columns")
    assert matrices.view(x).data_ptr() == x.data_ptr()


def maps_off_centre(seed=0, shape=(3, 8, 40, 40)):
    """Large maps whose channels have means of their own in each sample, as those after an activation function do."""
    means = torch.randn(*shape[:2], 1, 1, generator=generator(seed + 9))
    return spread(shape, seed) / spread(shape, seed).std() + 3 * means


@pytest.mark.parametrize("order", [torch.clone, channels_last])
@pytest.mark.parametrize("rank", [1, 3])
def test_means_of_large_maps_take_no_rank(order, rank):
    coder, x = codec(rank), maps_off_centre()
    for step in range(8):
        x = x + 0.02 * torch.randn(x.shape, generator=generator(step))
        y = approximation(coder, order(x))
    centred = x - x.mean((2, 3), keepdim=True)
    assert y.stride() == order(x).stride()
    assert torch.all(error(y, x) <= 1.05 * best_error(centred, rank))
    assert torch.all(error(y, x) <= 0.95 * best_error(x, rank))


@pytest.mark.parametrize(("order", "long_first"), [(torch.clone, False), (channels_last, True)])
def test_large_maps_have_a_part_for_their_means(order, long_first):
    x = maps_off_centre()
    *factors, means = encode(codec(2), order(x))
    shapes = [(3, 2, 8), (3, 2, 1600)]
    assert [tuple(factor.shape) for factor in factors] == (shapes[::-1] if long_first else shapes)
    torch.testing.assert_close(means, x.mean((2, 3))[:, None])


@pytest.mark.parametrize(
    ("shape", "rank", "parts"),
    [((2, 8, 40, 20), 1, 3), ((2, 8, 40, 19), 1, 2), ((2, 8, 1600), 2, 2), ((2, 1600, 8), 2, 2)],
)
def test_means_go_apart_where_they_are_a_hundredth_of_a_map_s_factors(shape, rank, parts):
    assert len(encode(codec(rank), torch.randn(shape, generator=generator()))) == parts


@pytest.mark.parametrize("order", [torch.clone, channels_last])
def test_a_large_map_of_that_rank_comes_back_means_and_all(order):
    left, right = (torch.randn(shape, generator=generator(1)) for shape in ((2, 6, 3), (2, 3, 900)))
    x = order((left @ right).reshape(2, 6, 30, 30))
    assert len(encode(codec(3), x)) == 3
    torch.testing.assert_close(approximation(codec(3), x), x, rtol=0, atol=2e-5 * x.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("order", [torch.clone, channels_last])
def test_large_maps_off_centre_are_within_their_bound(dtype, order):
    coder, x = codec(2), order(maps_off_centre()).to(dtype)
    y = approximation(coder, x)
    assert torch.all((y.double() - x.double()).abs() <= coder.error_bound(x).reshape(x.shape))


@pytest.mark.parametrize("order", [torch.clone, channels_last])
def test_means_of_more_channels_than_positions_take_no_rank_either(order):
    x = maps_off_centre(shape=(1, 200, 14, 14))
    coder = codec(60)
    *_, means = encode(coder, order(x))
    assert means.shape == (1, 1, 200)
    y = approximation(coder, order(x))
    assert torch.all(error(y, x) <= 1.05 * best_error(x - x.mean((2, 3), keepdim=True), 60))


@pytest.mark.parametrize("quantizer", ["int8", "int4"])
def test_means_go_through_a_quantizer_with_a_range_of_their_own(quantizer):
    chain, x = f"lowrank:3+{quantizer}", maps_off_centre()
    encoded = Encoder(parse_chain(chain), Role.ACTIVATION).encode(x, seed=0)
    y, _ = Decoder(parse_chain(chain), Role.ACTIVATION).decode(
        encoded.desc, bytearray(b"".join(encoded.buffers)), device=x.device
    )
    assert [part["shape"] for part in encoded.desc["parts"]] == [[3, 3, 8], [3, 3, 1600], [3, 1, 8]]
    assert torch.all(error(y, x) <= 1.1 * best_error(x, 3))


def test_a_rank_that_saves_nothing_for_the_means_is_not_recommended():
    whole = TensorType.of(torch.zeros(8, 11, 5, 23))
    assert "ranks up to 9 make it smaller" in codec(12).misfit(whole)
    x = torch.randn(8, 11, 5, 23, generator=generator())
    assert codec(10).encode(x, CALL) is None
    assert codec(9).encode(x, CALL) is not None


def test_of_a_small_map_the_largest_rank_that_saves_something_is_recommended():
    whole = TensorType.of(torch.zeros(8, 10, 5, 1))
    assert "ranks up to 3 make it smaller" in codec(6).misfit(whole)
    assert codec(3).encode(torch.randn(8, 10, 5, 1, generator=generator()), CALL) is not None


def test_sums_beyond_the_dtype_leave_large_maps_alone():
    x = torch.full((1, 4, 30, 30), torch.finfo(torch.float32).max)
    assert codec(2).encode(x, CALL) is None
    x[0, 1, 2, 3] = float("nan")
    with pytest.raises(NonFiniteTensor):
        codec(2).encode(x, CALL)


@pytest.mark.parametrize("order", [torch.clone, channels_last])
@pytest.mark.parametrize("scale", [0.0, 1e-14, 1e18])
def test_samples_of_other_sizes_beside_one_come_out_as_well(order, scale):
    # Their squares are beyond what fp32 holds, which must not be all that is looked at.
    x = spread((3, 24, 12, 12))
    x[1] *= scale
    y = approximation(codec(8), order(x))
    assert torch.all(error(y, x) <= 1.2 * best_error(x, 8))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_noticed_where_matrices_meet_themselves(value):
    x = spread((2, 16, 12, 12))
    x[1, 3, 4, 5] = value
    with pytest.raises(NonFiniteTensor):
        codec(8).encode(x, CALL)

import copy
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from common.bottleneck import build_pair, parse_bottleneck, with_bottleneck
from common.bottleneck_start import start_from_samples
from common.conv_bottleneck import (
    Pair,
    build_coders,
    narrow_shape,
    parse_pairs,
    principal_basis,
    smooth_basis,
)
from common.errors import UserError
from common.model_spec import ModelSpec
from common.models import build_model
from common.partition import image_input, preset_cuts, split
from common.propagate import TensorInfo
from common.vision import models
from common.weights import merge_states, partition_state, split_bottleneck, state_digest

pytestmark = pytest.mark.usefixtures("one_thread")

LAST = TensorInfo(name="last", shape=(1280, 7, 7))

VALID = re.compile(r"({0}(/{0})*(,{0}(/{0})*)?)?".format(r"[1-9]\d{0,5}x[1-9]\d{0,3}"))


class Small(nn.Module):
    """Ten layers with the cuts of a real one: `[B,32,16,16]` and `[B,64,4,4]` for 32 px."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 32, 3, 2, 1), nn.BatchNorm2d(32))
        self.body = nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(32, 64, 3, 4, 1), nn.BatchNorm2d(64))
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 3))

    def forward(self, x):
        return self.head(self.body(self.stem(x)))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Small()


def insert(model, *texts, size=32, seed=0):
    specs = texts * 2 if len(texts) == 1 else texts
    return with_bottleneck(split(model, ("stem", "body"), image_input(size)), specs, seed=seed)


@pytest.mark.parametrize(
    ("text", "first", "second", "rate"),
    [
        ("conv", (20, 37, 37), (360, 7, 7), 0.097),
        ("conv:20x3,360x1", (20, 37, 37), (360, 7, 7), 0.097),
        ("conv:19x4,360x1", (19, 28, 28), (360, 7, 7), 0.070),
        ("conv2", (16, 28, 28), (100, 7, 7), 0.038),
        ("conv:32x4/16x1,360x1/100x1", (16, 28, 28), (100, 7, 7), 0.038),
    ],
)
def test_the_published_widths_have_the_published_rates(text, first, second, rate):
    maps = (
        TensorInfo(name="features.0.1", shape=(32, 112, 112)),
        TensorInfo(name="features.18", shape=(1280, 7, 7)),
    )
    spec = parse_bottleneck(text)
    crossing = [build_pair(cut, info, spec, seed=0).crossing for cut, info in enumerate(maps, 1)]
    assert [info.shape for info in crossing] == [first, second]
    assert round(sum(i.dense_bytes(1) for i in crossing) / sum(i.dense_bytes(1) for i in maps), 3) == rate


@pytest.mark.parametrize("text", ["conv", "conv2"])
def test_what_crosses_is_what_was_declared_and_the_decoder_restores_the_shape(model, text):
    parts = insert(model, text, size=38)
    (first,) = parts.front(torch.randn(2, 3, 38, 38))
    (second,) = parts.middle(first)
    assert (first.shape, second.shape) == (parts.cut1[0].batched(2), parts.cut2[0].batched(2))
    assert parts.back(second)[0].shape == (2, 3)


def test_the_bottlenecks_weights_are_saved_beside_the_models_own(model):
    parts = insert(model, "conv2")
    states = [partition_state(part) for part in parts.partitions.values()]
    full, bottleneck = merge_states(model.state_dict(), *states)
    assert list(full) == list(model.state_dict())
    assert {name.rpartition(".")[0] for name in bottleneck} == {
        f"bottleneck.cut{cut}.{coder}.{layer}"
        for cut in (1, 2)
        for coder in ("encoder", "decoder")
        for layer in (0, 1)
    }
    assert [
        sorted({name.split(".")[1:3][0] + name.split(".")[2][0] for name in split_bottleneck(state)[1]})
        for state in states
    ] == [
        ["cut1e"],
        ["cut1d", "cut2e"],
        ["cut2d"],
    ]


def test_both_sides_build_the_same_weights_from_the_seed(model):
    torch.manual_seed(5)
    ours = insert(model, "conv", seed=1)
    drawn = torch.rand(1)
    theirs = insert(copy.deepcopy(model), "conv", seed=1)
    other = insert(copy.deepcopy(model), "conv", seed=2)
    digests = [state_digest(partition_state(parts.middle)) for parts in (ours, theirs, other)]
    assert digests[0] == digests[1] != digests[2]
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(1))


def test_a_cut_may_be_left_as_it_is(model):
    parts = insert(model, "", "conv:4x1")
    assert (parts.cut1[0].shape, parts.cut2[0].shape) == ((32, 16, 16), (4, 4, 4))
    assert parts.dense2[0].shape == (64, 4, 4)
    plain = split(model, ("stem", "body"), image_input(32))
    assert with_bottleneck(plain, ("", ""), seed=0) == plain


def test_every_map_that_crosses_gets_its_own_pair():
    model = models.ResNet(models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=2)
    parts = split(model, ("layer1.0.conv1", "layer4"), image_input(64))
    parts = with_bottleneck(parts, ("conv", ""), seed=0)
    assert [info.shape for info in parts.cut1] == [(40, 5, 5)] * 2
    assert [
        name for name in parts.front.state_dict() if name.startswith("bottleneck") and name.endswith("bias")
    ] == [
        "bottleneck.cut1.0.encoder.0.bias",
        "bottleneck.cut1.1.encoder.0.bias",
    ]
    (logits,) = parts.run(torch.randn(2, 3, 64, 64))
    assert logits.shape == (2, 2)


class Skipping(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = (nn.Conv2d(3, 3, 1) for _ in range(3))

    def forward(self, x):
        early = self.first(x)
        return self.third(self.second(early) + early)


def test_what_is_kept_for_the_back_is_not_narrowed():
    model = Skipping()
    parts = with_bottleneck(split(model, ("first", "second"), image_input(6)), ("conv:1x2", ""), seed=0)
    x = torch.randn(2, 3, 6, 6)
    crossing, kept = parts.front(x)
    assert crossing.shape == (2, 1, 3, 3)
    assert torch.equal(kept, model.first(x))


def test_gradients_reach_every_weight_of_the_bottleneck(model):
    parts = insert(model, "conv2")
    parts.run(torch.randn(2, 3, 32, 32))[0].square().sum().backward()
    inserted = {
        name: parameter
        for part in parts.partitions.values()
        for name, parameter in part.named_parameters()
        if name.startswith("bottleneck.")
    }
    assert len(inserted) == 16
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in inserted.values())


def test_a_bottleneck_makes_a_frozen_front_need_gradients(model):
    assert [info.requires_grad for info in insert(model.requires_grad_(False), "conv").cut1] == [True]


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(st.integers(1, 6), st.integers(1, 4)), min_size=1, max_size=3),
    st.integers(1, 4),
    st.integers(1, 30),
    st.integers(1, 30),
)
def test_the_decoder_restores_any_shape_exactly(pairs, channels, height, width):
    shape, rest = (channels, height, width), (height, width)
    usable = []
    count = channels
    for width_out, kernel in pairs:
        if kernel <= min(rest):
            count = min(width_out, count * kernel**2)
            usable.append(Pair(count, kernel))
            rest = (rest[0] // kernel, rest[1] // kernel)
    encoder, decoder = build_coders(usable, shape, torch.Generator().manual_seed(0))
    narrow = encoder(torch.zeros(2, *shape))
    assert narrow.shape == (2, *narrow_shape(usable, shape))
    assert decoder(narrow).shape == (2, *shape)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 6), st.integers(1, 4), st.data())
def test_the_first_patterns_are_orthonormal(channels, kernel, data):
    count = data.draw(st.integers(1, channels * kernel * kernel))
    basis = smooth_basis(count, channels, kernel, torch.Generator().manual_seed(0)).reshape(count, -1)
    assert torch.allclose(basis @ basis.T, torch.eye(count), atol=1e-5)


def test_the_first_weights_reproduce_a_constant_map_when_channels_suffice():
    coders = build_pair(1, TensorInfo(name="map", shape=(8, 6, 6)), parse_bottleneck("conv:8x3"), seed=0)
    flat = torch.randn(2, 8, 1, 1).expand(2, 8, 6, 6)
    assert torch.allclose(coders.decoder(coders.encoder(flat)), flat, atol=1e-5)


def test_defaults_scale_with_the_map():
    assert build_pair(
        1, TensorInfo(name="m", shape=(64, 2, 9)), parse_bottleneck("conv"), 0
    ).crossing.shape == (40, 1, 4)
    assert build_pair(
        2, TensorInfo(name="m", shape=(1, 1, 1)), parse_bottleneck("conv2"), 0
    ).crossing.shape == (1, 1, 1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cnv", "unknown bottleneck 'cnv'; there are conv, conv2"),
        ("conv:", "nothing follows the colon"),
        ("conv:20", "the end at character 8 is not expected; write CHANNELSxKERNEL"),
        ("conv:20y3", "'y' at character 8"),
        ("conv:20x3,", "the end at character 11"),
        ("conv:20x3,360x0", "'0' at character 15"),
        ("conv:20x3;360x1", "';' at character 10"),
        ("conv:20x3,360x1,4x1", "',' at character 16"),
        ("conv:20x3/", "the end at character 11"),
        ("conv2:20x3", "conv2 takes no widths"),
        ("conv:12345678x1", "at character"),
        ("conv:" + "/".join(["8x1"] * 9), "at most 8 pairs"),
    ],
)
def test_a_specification_that_does_not_parse_points_at_the_character(text, message):
    with pytest.raises(UserError, match=message) as caught:
        parse_bottleneck(text)
    assert "\n" not in str(caught.value)


@given(
    st.lists(
        st.lists(st.tuples(st.integers(1, 999999), st.integers(1, 9999)), min_size=1, max_size=8), max_size=2
    )
)
def test_pairs_parse_as_they_are_written(cuts):
    text = ",".join("/".join(f"{channels}x{kernel}" for channels, kernel in cut) for cut in cuts)
    assert parse_pairs("conv", text) == tuple(tuple(Pair(*pair) for pair in cut) for cut in cuts)


@given(st.text(alphabet="0123456789x,/v: ", max_size=12).filter(lambda text: not VALID.fullmatch(text)))
def test_any_other_text_is_refused_with_its_character(text):
    with pytest.raises(UserError, match="at character"):
        parse_pairs("conv", text)


def test_a_cut_without_maps_is_refused():
    model = models.VisionTransformer(32, 8, 1, 2, 16, 32)
    parts = split(model, preset_cuts("vit_b_32"), image_input(32))
    with pytest.raises(UserError, match=r"conv needs a map \[B,C,H,W\], and \[B,17,16\] crosses cut 1"):
        with_bottleneck(parts, ("conv", ""), seed=0)


def test_a_kernel_larger_than_the_map_is_refused():
    with pytest.raises(UserError, match="kernel 8 of conv is larger than the map at cut 2, 7x7"):
        build_pair(2, TensorInfo(name="map", shape=(1280, 7, 7)), parse_bottleneck("conv:4x1,4x8"), seed=0)


@pytest.mark.parametrize("text", ["conv:33x1", "conv:129x2", "conv:999999x112"])
def test_a_bottleneck_wider_than_the_map_is_refused(text):
    shape = (32, 112, 112)
    with pytest.raises(UserError, match="is too wide for the map at cut 1, 32 channels of 112x112"):
        build_pair(1, TensorInfo(name="map", shape=shape), parse_bottleneck(text), seed=0)


# Starting from samples.


def mobilenet(bottlenecks, size=96):
    model = build_model(ModelSpec(name="mobilenet_v2", num_classes=10))
    cuts = preset_cuts("mobilenet_v2")
    return with_bottleneck(split(model, cuts, image_input(size)), bottlenecks, seed=0)


def smooth_images(count, size=96):
    coarse = torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    return torch.nn.functional.interpolate(coarse, size=(size, size), mode="bicubic")


def energy_lost(parts, images):
    """The share of what crosses cut 1 that does not come back from encoder and decoder."""
    front = parts.front.train()
    with torch.no_grad():
        bare = front.run_bare(images)[0]
        decoder = parts.middle.get_submodule(parts.middle.decoders[0])
        back = decoder(front.get_submodule(front.encoders[0])(bare))
    return float((back - bare).square().mean() / bare.square().mean())


@pytest.mark.parametrize("spec", ["conv", "conv2", "conv:32x4/16x1,360x1"])
def test_pairs_started_from_samples_keep_what_a_random_choice_loses(spec):
    parts, images = mobilenet((spec, spec)), smooth_images(16)
    random_loss = energy_lost(parts, images)
    start_from_samples(parts, (spec, spec), (images,), seed=0)
    assert energy_lost(parts, images) < 0.1 * random_loss
    assert energy_lost(parts, smooth_images(24)[16:]) < 0.2 * random_loss  # others than those it started from


def test_starting_from_samples_changes_nothing_but_encoders_and_decoders():
    before, after = mobilenet(("conv", "conv")), mobilenet(("conv", "conv"))
    random_state = torch.get_rng_state()
    start_from_samples(after, ("conv", "conv"), (smooth_images(4),), seed=0)
    assert torch.equal(torch.get_rng_state(), random_state)
    for part, partition in after.partitions.items():
        for name, tensor in partition.state_dict().items():
            same = torch.equal(tensor, before.partitions[part].state_dict()[name])
            assert same is not name.startswith("bottleneck."), name


def test_starting_from_the_same_samples_gives_the_same_start():
    one, other = mobilenet(("conv", "conv2")), mobilenet(("conv", "conv2"))
    for parts in (one, other):
        start_from_samples(parts, ("conv", "conv2"), (smooth_images(4),), seed=3)
    for part, partition in one.partitions.items():
        torch.testing.assert_close(
            partition.state_dict(), other.partitions[part].state_dict(), rtol=0, atol=0
        )


def test_only_the_cut_that_has_a_bottleneck_is_started():
    parts = mobilenet(("", "conv"))
    before = {name: tensor.clone() for name, tensor in parts.front.state_dict().items()}
    start_from_samples(parts, ("", "conv"), (smooth_images(4),), seed=0)
    torch.testing.assert_close(parts.front.state_dict(), before, rtol=0, atol=0)


@settings(deadline=None, max_examples=30)
@given(
    patches=st.integers(1, 40), channels=st.integers(1, 6), kernel=st.integers(1, 3), share=st.floats(0.05, 1)
)
def test_principal_patterns_are_orthonormal_however_few_the_patches(patches, channels, kernel, share):
    size = channels * kernel**2
    count = max(1, round(share * size))
    basis = principal_basis(torch.randn(patches, channels, kernel, kernel), count, kernel)
    assert basis.shape == (count, channels, kernel, kernel)
    flat = basis.reshape(count, size)
    torch.testing.assert_close(flat @ flat.T, torch.eye(count), atol=1e-4, rtol=0)


def test_principal_patterns_are_those_of_the_singular_value_decomposition():
    generator = torch.Generator().manual_seed(0)
    maps = torch.einsum(
        "nr,rc->nc",
        torch.randn(400, 5, generator=generator) * torch.tensor([9.0, 7, 5, 3, 1]),
        torch.linalg.qr(torch.randn(36, 5, generator=generator)).Q.T,
    )
    basis = principal_basis(maps.reshape(400, 4, 3, 3), 3, 3).reshape(3, 36)
    exact = torch.linalg.svd(maps).Vh[:3]
    torch.testing.assert_close(basis.T @ basis, exact.T @ exact, atol=1e-3, rtol=0)

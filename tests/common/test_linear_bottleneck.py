"""The linear bottleneck: how its spec reads, what its first weights keep, and what does not fit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from common.bottleneck import KINDS, build_pair, parse_bottleneck, with_bottleneck
from common.bottleneck_start import start_from_samples
from common.errors import UserError
from common.linear_bottleneck import LinearOptions, parse_linear, principal_axes
from common.partition import image_input, preset_cuts, split
from common.propagate import TensorInfo
from common.vision import models

pytestmark = pytest.mark.usefixtures("one_thread")

TOKENS = TensorInfo(name="tokens", shape=(7, 24))


def transformer():
    torch.manual_seed(0)
    model = models.VisionTransformer(32, 8, 2, 2, 24, 48, num_classes=10)
    nn.init.normal_(model.heads.head.weight)  # torchvision starts it at zero, which stops every gradient
    return model


def inserted(*specs, size=32):
    specs = specs * 2 if len(specs) == 1 else specs
    return with_bottleneck(split(transformer(), preset_cuts("vit_b_32"), image_input(size)), specs, seed=0)


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def spread(count, width=24, seed=0):
    """Tokens [count, 7, width] whose coordinates, rotated, vary by powers of two, about a mean that is not 0."""
    axes = torch.linalg.qr(drawn(width, width)).Q
    return (drawn(count, 7, width, seed=seed) * 2.0 ** -torch.arange(width)) @ axes + 3


# What the text means.


@pytest.mark.parametrize(
    ("text", "first", "second"),
    [
        ("linear", 6, 6),
        ("linear:8", 8, 8),
        ("linear:8,4", 8, 4),
        ("linear:24,start=identity", 24, 24),
        ("linear:start=pca", 6, 6),
    ],
)
def test_widths_are_those_of_the_cut_and_a_quarter_unless_given(text, first, second):
    pairs = [build_pair(cut, TOKENS, parse_bottleneck(text), seed=0) for cut in (1, 2)]
    assert [pair.crossing.shape for pair in pairs] == [(7, first), (7, second)]


@given(
    widths=st.lists(st.integers(1, 9_999_999), max_size=2),
    start=st.sampled_from(("", "start=identity", "start=pca")),
)
def test_options_parse_as_they_are_written(widths, start):
    text = ",".join([*map(str, widths), start][: None if start else -1])
    assert parse_linear(text) == LinearOptions(tuple(widths), start.partition("=")[2] or "pca")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("linear:", "nothing follows the colon"),
        ("linear:0", "'0' at character 8 is not expected; write a width"),
        ("linear:6x", "'x' at character 9"),
        ("linear:64,", "the end at character 11"),
        ("linear:64,,32", "',' at character 11"),
        ("linear:64,32,16", "'1' at character 14"),
        ("linear:64,start=svd", "start is pca or identity, not 'svd', at character 17"),
        ("linear:start=pca,64", "'6' at character 18"),
        ("linear:64,stat=pca", "'s' at character 11"),
        ("linear:start=pca,start=pca", "'s' at character 18"),
        ("linear:12345678", "'8' at character 15"),
    ],
)
def test_a_specification_that_does_not_parse_points_at_the_character(text, message):
    with pytest.raises(UserError, match=message) as caught:
        parse_bottleneck(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("info", "text", "message"),
    [
        (TOKENS, "linear:25", r"linear:25 is wider than the tensor at cut 2, \[B,7,24\]; use a width up to 24"),
        (TensorInfo(name="f", shape=(25088,)), "linear:9999", "250854912 weights at cut 2, .*the most is 67108864"),
    ],
)  # fmt: skip
def test_a_width_that_does_not_fit_is_one_line(info, text, message):
    with pytest.raises(UserError, match=message) as caught:
        build_pair(2, info, parse_bottleneck(text), seed=0)
    assert "\n" not in str(caught.value)


# What gets a pair.


def test_a_vision_transformer_trains_through_pairs_at_both_cuts():
    parts = inserted("linear:8,4")
    assert [info.shape for info in (*parts.cut1, *parts.cut2)] == [(17, 8), (4,)]
    (logits,) = parts.run(drawn(2, 3, 32, 32))
    logits.square().sum().backward()
    weights = {
        name: parameter
        for part in parts.partitions.values()
        for name, parameter in part.named_parameters()
        if name.startswith("bottleneck.")
    }
    assert len(weights) == 8
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in weights.values())


def test_maps_are_not_for_it():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Flatten())
    parts = split(model, ("0", "1"), image_input(4))
    with pytest.raises(
        UserError, match=r"linear needs tokens \[B,S,H\] or features \[B,H\], and \[B,4,4,4\]"
    ):
        with_bottleneck(parts, ("linear", ""), seed=0)


class Two(nn.Module):
    """Tokens, and a float for each of them, cross the first cut."""

    def __init__(self):
        super().__init__()
        self.embed, self.weigh, self.mix = nn.Linear(3, 8), nn.Linear(3, 1), nn.Linear(8, 8)

    def forward(self, x):
        pixels = x.flatten(2).transpose(1, 2)
        weights = self.weigh(pixels).squeeze(-1)
        return self.mix(self.embed(pixels) * weights.unsqueeze(-1)).mean(1)


def test_beside_tokens_a_tensor_of_fewer_dimensions_crosses_as_it_is():
    parts = split(Two(), ("embed", "mix"), image_input(4))
    assert {info.shape for info in parts.cut1} == {(16, 8), (16,)}
    parts = with_bottleneck(parts, ("linear:2", ""), seed=0)
    assert {info.shape for info in parts.cut1} == {(16, 2), (16,)}


# What it starts from.


def test_built_alone_it_passes_the_first_features_on():
    pair = build_pair(1, TOKENS, parse_bottleneck("linear:8"), seed=0)
    tokens = drawn(2, 7, 24)
    assert torch.equal(pair.encoder(tokens), tokens[..., :8])
    assert torch.equal(pair.decoder(pair.encoder(tokens))[..., 8:], torch.zeros(2, 7, 16))


def lost(parts, images):
    """The share of what crosses cut 1 that does not come back."""
    with torch.no_grad():
        bare = parts.front.run_bare(images)[0]
        coded = parts.middle.get_submodule(parts.middle.decoders[0])(
            parts.front.get_submodule(parts.front.encoders[0])(bare)
        )
    return float((coded - bare).square().sum() / bare.square().sum())


def test_principal_components_lose_no_more_than_the_best_choice_would():
    parts, images = inserted("linear:6"), drawn(16, 3, 32, 32)
    start_from_samples(parts, ("linear:6", "linear:6"), (images,), seed=0)
    with torch.no_grad():
        bare = parts.front.run_bare(images)[0].flatten(0, 1).double()
    values = torch.linalg.svdvals(bare - bare.mean(0))
    assert lost(parts, images) == pytest.approx(
        float(values[6:].square().sum() / bare.square().sum()), rel=1e-3
    )


def test_dropout_does_not_blur_what_it_starts_from():
    images, starts = drawn(16, 3, 32, 32), []
    for seed in (0, 1):
        parts = inserted("linear:6")
        dropping = [module for module in parts.front.modules() if isinstance(module, nn.Dropout)]
        assert dropping
        for module in dropping:
            module.p = 0.5
        start_from_samples(parts, ("linear:6", "linear:6"), (images,), seed=seed)
        starts.append(parts.front.get_parameter("bottleneck.cut1.encoder.0.weight"))
    assert torch.equal(*starts)


def test_the_identity_stays_where_it_is_asked_for():
    spec, images = "linear:6,start=identity", drawn(16, 3, 32, 32)
    parts = inserted(spec)
    start_from_samples(parts, (spec, spec), (images,), seed=0)
    assert torch.equal(parts.front.get_parameter("bottleneck.cut1.encoder.0.weight"), torch.eye(6, 24))
    rotated = inserted("linear:6")
    start_from_samples(rotated, ("linear:6", "linear:6"), (images,), seed=0)
    assert lost(rotated, images) < 0.8 * lost(parts, images)


def test_what_crosses_is_centred_and_the_mean_comes_back():
    pair = build_pair(1, TOKENS, parse_bottleneck("linear:4"), seed=0)
    tokens = spread(200)
    KINDS["linear"].start(pair.encoder, pair.decoder, tokens)
    with torch.no_grad():
        narrow = pair.encoder(tokens)
        assert narrow.mean((0, 1)).abs().max() < 1e-5
        torch.testing.assert_close(
            pair.decoder(narrow).mean((0, 1)), tokens.mean((0, 1)), atol=1e-5, rtol=1e-5
        )
        others = spread(50, seed=1)
        error = (pair.decoder(pair.encoder(others)) - others).square().mean()
    assert error / (others - others.mean((0, 1))).square().mean() < 0.01


@settings(deadline=None, max_examples=40)
@given(count=st.integers(1, 40), width=st.integers(1, 20), rank=st.integers(1, 20))
def test_principal_axes_are_orthonormal_however_few_the_vectors_and_in_order(count, width, rank):
    rows = drawn(count, rank) @ drawn(rank, width, seed=1) + 5
    mean, axes = principal_axes(rows.split(7))
    torch.testing.assert_close(axes @ axes.T, torch.eye(width), atol=1e-5, rtol=0)
    torch.testing.assert_close(mean, rows.mean(0), atol=1e-4, rtol=1e-4)
    spreads = ((rows - mean) @ axes.T).square().sum(0)
    assert (spreads.diff() <= 1e-3 * spreads.max().clamp(min=1e-6)).all()

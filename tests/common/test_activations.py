"""Activations that need no copy of what they change: the same values to the bit, and less memory."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from common.activations import Bounded
from common.partition import image_input, preset_cuts, split
from common.vision import models

pytestmark = pytest.mark.usefixtures("one_thread")

IMAGES = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
EDGES = (0.0, -0.0, 6.0, -1.0, 1.0, math.inf, -math.inf, math.nan, 1e-45, -1e-45, 5.9999995, 6.0000005)


@settings(deadline=None)
@given(
    values=st.lists(st.sampled_from(EDGES) | st.floats(width=32), min_size=1, max_size=20),
    bounds=st.sampled_from([(0.0, 6.0), (-1.0, 1.0), (-6.0, 0.0)]),
    inplace=st.booleans(),
    own_gradient=st.booleans(),
)
def test_a_bounded_activation_equals_hardtanh_to_the_bit(values, bounds, inplace, own_gradient) -> None:
    def run(activation):
        leaf = torch.tensor(values, requires_grad=True)
        result = activation(leaf * 1)
        kept = result.detach().clone()
        (result * torch.arange(1, len(values) + 1)).sum().backward()
        return [bits.view(torch.int32).tolist() for bits in (kept, leaf.grad)]

    ours = Bounded(*bounds, inplace=inplace, own_gradient=own_gradient)
    assert run(ours) == run(nn.Hardtanh(*bounds, inplace=inplace))


def test_a_bounded_activation_works_without_a_gradient() -> None:
    ours = Bounded(0.0, 6.0, inplace=True, own_gradient=True)
    tensor = torch.tensor([-1.0, 3.0, 7.0])
    assert ours(tensor) is tensor
    with torch.inference_mode():
        assert ours(torch.tensor([-1.0, 3.0, 7.0])).tolist() == [0.0, 3.0, 6.0]
    assert tensor.tolist() == [0.0, 3.0, 6.0]


class Stem(nn.Module):
    """A convolution, what follows it, and a classifier: `follow` gets the module itself."""

    def __init__(self, follow, **modules):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.act, self.conv, self.last = nn.ReLU6(inplace=True), nn.Conv2d(4, 4, 1), nn.Linear(4, 2)
        for name, module in modules.items():
            self.add_module(name, module)
        self.follow = follow

    def forward(self, x):
        return self.last(self.follow(self, self.norm(self.first(x))).mean((2, 3)))


def plain(m, x):
    return m.conv(m.act(x))


def residual(m, x):
    y = m.act(x)
    return m.conv(y) + y


def added(m, x):
    return m.act(x) + m.conv(x.detach())


def added_late(m, x):
    """An addition hands one and the same gradient to both of its terms."""
    y = m.conv(x)
    return (m.act(y) + y * 1) + x


def twice(m, x):
    return m.conv(m.act(m.conv(m.act(x)))) + m.act(m.conv(x.detach()))


def pooled(m, x):
    return F.avg_pool2d(m.act(x), 2)


def reflected(m, x):
    return m.around(m.act(x))


def seen_before(m, x):
    """The view sees what the activation changes."""
    view = x.flatten(2)
    y = m.act(x)
    return m.conv(y) * view.mean(2)[:, :, None, None]


def seen_after(m, x):
    y = m.act(x)
    return m.conv(y) * x


FOLLOWS = [plain, residual, added, added_late, twice, pooled, reflected, seen_before, seen_after]
KINDS = [nn.ReLU6, nn.Hardtanh, nn.SiLU, nn.Hardswish, nn.Hardsigmoid, nn.Mish, nn.ReLU, nn.ELU]


def grads_of(model, run):
    torch.manual_seed(1)
    result = run(IMAGES)
    result.square().sum().backward()
    return [result, *(p.grad for p in model.parameters())]


def both(model, cuts):
    """Return (results and gradients of the plain model, of the split one), and the split."""
    reference = copy.deepcopy(model).train()
    parts = split(model.train(), cuts, image_input(IMAGES.shape[-1]))
    return grads_of(reference, reference), grads_of(model, lambda x: parts.run(x)[0]), parts


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("inplace", [True, False])
@pytest.mark.parametrize("follow", FOLLOWS)
def test_whatever_follows_an_activation_the_split_model_is_the_whole_one(follow, inplace, kind) -> None:
    around = nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")
    model = Stem(follow, act=kind(inplace=inplace), around=around)
    expected, found, _ = both(model, ("first", "mean"))
    assert all((a is None and b is None) or torch.equal(a, b) for a, b in zip(expected, found, strict=True))


@pytest.mark.parametrize(
    ("follow", "own"), [(plain, True), (residual, False), (added, False), (pooled, False), (reflected, False)]
)
def test_only_a_convolution_s_gradient_is_written_over(follow, own) -> None:
    around = nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")
    *_, parts = both(Stem(follow, around=around), ("first", "mean"))
    assert [m.own_gradient for m in parts.middle.modules() if isinstance(m, Bounded)] == [own]


def test_a_gradient_that_came_over_the_link_is_not_written_over() -> None:
    *_, parts = both(Stem(plain), ("first", "act"))
    assert [m.own_gradient for m in parts.middle.modules() if isinstance(m, Bounded)] == [False]


def copies_in(run) -> int:
    with profile(activities=[ProfilerActivity.CPU]) as found:
        run()
    return sum(event.name == "aten::clone" for event in found.events())


@pytest.mark.parametrize("name", ["mobilenet_v2", "mobilenet_v3_small", "efficientnet_b0"])
def test_no_map_is_copied_on_the_way_forward(name) -> None:
    model = getattr(models, name)(num_classes=2).train()
    assert copies_in(lambda: model(IMAGES)) > 15
    parts = split(model, preset_cuts(name), image_input(IMAGES.shape[-1]))
    assert copies_in(lambda: parts.run(IMAGES)) == 0


def kept_bytes(run) -> int:
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor):
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run()
    return sum(storage.nbytes() for storage in kept.values())


def test_mobilenet_v2_keeps_less_for_its_backward_pass() -> None:
    images = torch.randn(2, 3, 64, 64)
    model = models.mobilenet_v2(num_classes=2).train()
    weights = sum(p.nbytes for p in model.parameters())
    before = kept_bytes(lambda: model(images)) - weights
    parts = split(model, preset_cuts("mobilenet_v2"), image_input(64))
    assert kept_bytes(lambda: parts.run(images)) - weights < 0.75 * before


def test_the_state_of_a_split_model_has_the_model_s_own_names() -> None:
    model = models.mobilenet_v2(num_classes=2)
    parts = split(model, preset_cuts("mobilenet_v2"), image_input(32))
    names = set().union(*(partition.state_dict() for partition in parts.partitions.values()))
    assert names == set(model.state_dict())

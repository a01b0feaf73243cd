"""MACs: against published figures, against counts by hand, and for every family of models."""

import math

import pytest
import torch
from torch import nn

from common.bottleneck import with_bottleneck
from common.flops import Counting, count_parts, profile
from common.graph import trace
from common.model_spec import ModelSpec
from common.models import build_model
from common.partition import image_input, preset_cuts, split
from common.propagate import TensorInfo
from common.vision import models as vision_models

pytestmark = pytest.mark.usefixtures("one_thread")

PUBLISHED = {
    "": (7.45e8, 1.93e10, 8.19e7),
    "conv": (1.25e9, 2.53e10, 1.53e9),
    "conv2": (1.60e9, 3.40e10, 1.65e9),
}
TRUE_MIDDLE = {"": 1.93e10, "conv": 2.12e10, "conv2": 2.17e10}

FAMILIES = {
    "alexnet": 64,
    "convnext_tiny": 32,
    "densenet121": 32,
    "efficientnet_b0": 32,
    "googlenet": 32,
    "inception_v3": 75,
    "mnasnet0_5": 32,
    "mobilenet_v3_small": 32,
    "regnet_y_400mf": 32,
    "resnet18": 32,
    "shufflenet_v2_x0_5": 32,
    "squeezenet1_1": 64,
    "swin_v2_t": 64,
    "vgg11": 32,
    "vit_b_32": 224,
}


class Block(nn.Module):
    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 12, 3, stride=2, padding=1, groups=4)
        self.up = nn.ConvTranspose2d(12, 6, 3, stride=2, padding=1, output_padding=1, groups=2)
        self.head = nn.Linear(6 * 16 * 16, num_classes)

    def forward(self, x):
        x = self.up(self.grouped(self.norm(self.first(x)).relu()))
        return self.head(x.flatten(1))


def counted(model, cuts, inputs, batch, bottlenecks=("", ""), counting=Counting.TRUE):
    parts = with_bottleneck(split(model, cuts, inputs), bottlenecks, seed=0)
    return count_parts(parts, batch, counting)


def mobilenet(bottleneck, counting):
    model = build_model(ModelSpec(name="mobilenet_v2", num_classes=1000))
    costs = counted(
        model, preset_cuts("mobilenet_v2"), image_input(224), 64, (bottleneck, bottleneck), counting
    )
    return [cost.macs for cost in costs]


@pytest.mark.parametrize("bottleneck", PUBLISHED)
def test_the_published_table_comes_out(bottleneck):
    assert mobilenet(bottleneck, Counting.PUBLISHED) == pytest.approx(PUBLISHED[bottleneck], rel=0.01)


@pytest.mark.parametrize("bottleneck", PUBLISHED)
def test_the_true_count_differs_in_the_middle_alone(bottleneck):
    front, _, back = PUBLISHED[bottleneck]
    assert mobilenet(bottleneck, Counting.TRUE) == pytest.approx(
        (front, TRUE_MIDDLE[bottleneck], back), rel=0.01
    )


@pytest.mark.parametrize(("counting", "positions"), [(Counting.TRUE, 8 * 8), (Counting.PUBLISHED, 16 * 16)])
def test_each_layer_counts_as_by_hand(counting, positions):
    costs = counted(Block(), ("norm", "up"), image_input(16), 5, counting=counting)
    front = 16 * 16 * 8 * (3 * 9 + 2)
    middle = 8 * 8 * 12 * 2 * 9 + positions * 6 * 6 * 9
    back = 6 * 16 * 16 * 10
    assert [cost.macs for cost in costs] == [5 * front, 5 * middle, 5 * back]


def test_attention_counts_its_two_products_and_four_projections():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.before, self.after = nn.Linear(16, 16), nn.Linear(16, 3)
            self.attention = nn.MultiheadAttention(16, 4, batch_first=True)

        def forward(self, x):
            x = self.before(x)
            x = self.attention(x, x, x, need_weights=False)[0]
            return self.after(x)

    costs = counted(Attention(), ("before", "attention"), [TensorInfo(name="x", shape=(7, 16))], 2)
    assert costs[1].macs == 2 * (4 * 7 * 16 * 16 + 2 * 7 * 7 * 16)


@pytest.mark.parametrize("name", ["vgg11", "resnet18", "vit_b_32", "swin_t", "convnext_tiny"])
def test_whole_models_agree_with_torchvisions_own_figures(name):
    model = build_model(ModelSpec(name=name, num_classes=1000))
    published = vision_models.get_model_weights(name)["DEFAULT"].meta["_ops"]
    costs = counted(model, preset_cuts(name), image_input(224), 1)
    assert sum(cost.macs for cost in costs) / 1e9 == pytest.approx(published, rel=0.01)


@pytest.mark.parametrize(
    ("name", "size"),
    [*FAMILIES.items(), pytest.param("maxvit_t", 224, marks=pytest.mark.slow)],
)
def test_every_family_is_counted_and_its_parts_add_up(name, size):
    model = build_model(ModelSpec(name=name, num_classes=10, image_size=size))
    inputs = image_input(size)
    params = sum(p.numel() for p in model.parameters())
    operations = profile(model, trace(model, training=False), inputs, 2)
    costs = counted(model, preset_cuts(name), inputs, 2)
    assert sum(cost.params for cost in costs) == params
    assert sum(cost.macs for cost in costs) == sum(operation.macs for operation in operations)
    assert all(cost.macs > 0 for cost in costs if cost.name != "back")


def test_macs_follow_the_batch():
    once = counted(Block(), ("norm", "up"), image_input(16), 1)
    more = counted(Block(), ("norm", "up"), image_input(16), 6)
    assert [cost.macs for cost in more] == [6 * cost.macs for cost in once]


def test_a_profile_has_the_bytes_that_the_cuts_have():
    model = build_model(ModelSpec(name="mobilenet_v2", num_classes=1000))
    operations = {
        op.name: op for op in profile(model, trace(model, training=False), image_input(224), batch=3)
    }
    assert operations["features.0.1"].crossing_bytes == 4 * 3 * 32 * 112 * 112
    assert operations["features.18.2"].crossing_bytes == 4 * 3 * 1280 * 7 * 7
    # Inside a block that adds its input, both cross.
    assert operations["features.3.conv.0.0"].crossing_bytes == 4 * 3 * (24 + 144) * 56 * 56
    assert next(reversed(operations.values())).crossing_bytes == 4 * 3 * 1000


def test_a_profile_leaves_the_model_as_it_was():
    model = Block().train()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    profile(model, trace(model, training=False), image_input(16), 2)
    assert model.training
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_a_part_of_a_tuple_is_carried_once():
    class Halves(nn.Module):
        def __init__(self):
            super().__init__()
            self.before, self.after = nn.Linear(8, 8), nn.Linear(4, 2)

        def forward(self, x):
            left, right = self.before(x).chunk(2, dim=1)
            return self.after(left + right)

    operations = profile(
        Halves(), trace(Halves(), training=False), [TensorInfo(name="x", shape=(8,))], batch=1
    )
    assert [op.crossing_bytes for op in operations] == [32, 32, 32, 32, 16, 8]
    assert math.prod(op.macs or 1 for op in operations) == 64 * 8

import copy
import gc
import weakref
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.errors import UserError
from common.model_spec import ModelSpec
from common.models import build_model
from common.partition import PARTS, Split, image_input, preset_cuts, split
from common.propagate import TensorInfo
from common.vision import models
from common.weights import load_state, merge_states, partition_state, save_model

pytestmark = pytest.mark.usefixtures("one_thread")

# Each family in a size that takes no time, with dropout and stochastic depth where it has any.
SMALL = {
    "convnext": lambda: models.ConvNeXt(
        [models.convnext.CNBlockConfig(8, 16, 2), models.convnext.CNBlockConfig(16, None, 1)], 0.3
    ),
    "densenet": lambda: models.DenseNet(4, (2, 3), 8, drop_rate=0.2),
    "mnasnet": lambda: models.MNASNet(0.1, dropout=0.2),
    "mobilenet_v2": lambda: models.MobileNetV2(width_mult=0.1),
    "resnet18": lambda: models.ResNet(models.resnet.BasicBlock, [1, 1, 1, 1]),
    "shufflenet": lambda: models.ShuffleNetV2([2, 2, 2], [8, 16, 16, 32, 32]),
    "swin": lambda: models.SwinTransformer(
        [4, 4], 12, [2, 2], [2, 2], [4, 4], dropout=0.1, attention_dropout=0.2, stochastic_depth_prob=0.3
    ),
    "vit_": lambda: models.VisionTransformer(32, 8, 2, 2, 16, 32, dropout=0.1, attention_dropout=0.2),
}
LARGE = (
    "alexnet",
    "convnext_tiny",
    "densenet121",
    "efficientnet_b0",
    "mobilenet_v3_small",
    "regnet_y_400mf",
    "resnet50",
    "shufflenet_v2_x0_5",
    "squeezenet1_1",
    "swin_v2_t",
    "vgg11_bn",
    "vit_b_32",
)


@dataclass
class Outcome:
    """What one batch leaves behind."""

    logits: Tensor
    gradients: dict[str, Tensor]
    buffers: dict[str, Tensor]


def outcome_of(modules, logits):
    return Outcome(
        logits.detach(),
        {k: p.grad for m in modules for k, p in m.named_parameters() if p.grad is not None},
        {k: b for m in modules for k, b in m.named_buffers() if not k.startswith("_tensor_constant")},
    )


def leaves(tensors):
    return tuple(t.detach().clone().requires_grad_(t.is_floating_point()) for t in tensors)


def split_step(parts: Split, *inputs, training=True):
    """Runs the parts as two machines would: what crosses is cut from its graph and becomes a leaf."""
    for part in parts.partitions.values():
        part.train(training)
    torch.manual_seed(7)
    made = parts.front(*inputs)
    crossed = leaves(made[: len(parts.cut1)])
    narrowed = parts.middle(*crossed)
    held = leaves(parts.back_inputs(narrowed, made))
    (logits,) = parts.back(*held)
    if training:
        logits.square().mean().backward()
        back = [t.grad for t in held]
        pairs = [(t, g) for t, g in zip(narrowed, back, strict=False) if t.requires_grad]
        torch.autograd.backward(*zip(*pairs, strict=True))
        gradients = parts.front_gradients([t.grad for t in crossed], back)
        pairs = [(t, g) for t, g in zip(made, gradients, strict=True) if t.requires_grad]
        torch.autograd.backward(*zip(*pairs, strict=True))
    return outcome_of(parts.partitions.values(), logits)


def assert_same(plain: Outcome, parts: Outcome):
    assert torch.equal(plain.logits, parts.logits)
    for ours, theirs in ((plain.gradients, parts.gradients), (plain.buffers, parts.buffers)):
        assert ours.keys() == theirs.keys()
        assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def assert_transparent(model, cuts, *inputs, infos=None):
    """Asserts bitwise equality with the unsplit model, in both modes; returns the split."""
    reference = copy.deepcopy(model)
    size = inputs[0].shape[-1]
    parts = split(model, cuts, infos or image_input(size))
    for training in (True, False):
        reference.train(training)
        for module in (reference, model):
            module.zero_grad(set_to_none=True)
        torch.manual_seed(7)
        logits = reference(*inputs)
        if training:
            logits.square().mean().backward()
        assert_same(outcome_of([reference], logits), split_step(parts, *inputs, training=training))
    return parts


def images(size, batch=3):
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


def assert_family_is_transparent(model, name, size=32):
    cuts = ("features.0.1", "features.2") if isinstance(model, models.ConvNeXt) else preset_cuts(name)
    parts = assert_transparent(model, cuts, images(size))
    states = [partition_state(part) for part in parts.partitions.values()]
    assert sum(map(len, states)) == len(model.state_dict())
    assert set().union(*states) == set(model.state_dict())


@pytest.mark.parametrize("name", SMALL)
def test_a_split_model_equals_the_plain_one_bitwise(name):
    torch.manual_seed(0)
    assert_family_is_transparent(SMALL[name](), name)


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE)
def test_a_split_torchvision_model_equals_the_plain_one_bitwise(name):
    size = 64 if name == "alexnet" else 32
    sized = {"image_size": size} if name.startswith("vit_") else {}
    assert_family_is_transparent(build_model(ModelSpec(name=name, num_classes=5, **sized)), name, size)


@pytest.fixture(scope="module")
def mobilenet():
    return build_model(ModelSpec(name="mobilenet_v2", num_classes=5))


@pytest.fixture(scope="module")
def resnet():
    return build_model(ModelSpec(name="resnet18", num_classes=5))


def test_mobilenet_v2_is_cut_before_its_first_activation_and_before_pooling(mobilenet):
    parts = split(mobilenet, preset_cuts("mobilenet_v2"), image_input(224))
    assert [(info.name, info.shape) for info in (*parts.cut1, *parts.cut2)] == [
        ("features.0.1", (32, 112, 112)),
        ("features.18.2", (1280, 7, 7)),
    ]
    assert all(info.requires_grad and info.dtype == torch.float32 for info in (*parts.cut1, *parts.cut2))
    assert parts.dense_bytes(64) == 64 * 4 * (32 * 112 * 112 + 1280 * 7 * 7)
    assert [len(part.state_dict()) for part in parts.partitions.values()] == [6, 306, 2]
    assert parts.kept == ()


def test_two_tensors_cross_a_cut_inside_a_residual_block(resnet):
    parts = assert_transparent(resnet, ("layer1.0.conv1", "layer4.1.bn1"), images(48))
    assert [info.name for info in parts.cut1] == ["maxpool", "layer1.0.conv1"]
    assert [info.name for info in parts.cut2] == ["layer4.0.relu_1", "layer4.1.bn1"]


@pytest.mark.parametrize(
    "cuts",
    [
        ("maxpool", "layer4.1.add"),
        ("bn1", "layer3.0.bn2"),
        ("conv1", "avgpool"),
        ("layer2.0.downsample", "flatten"),
    ],
)
def test_cuts_at_odd_places_change_nothing(resnet, cuts):
    assert_transparent(resnet, cuts, images(48))


def test_cuts_among_a_dense_blocks_concatenations_change_nothing():
    cuts = ("features.denseblock1.denselayer1", "features.denseblock2.denselayer2.norm1")
    parts = assert_transparent(SMALL["densenet"](), cuts, images(32))
    assert (len(parts.cut1), len(parts.cut2)) == (2, 3)


def test_channels_last_stays_channels_last(mobilenet):
    model = copy.deepcopy(mobilenet).to(memory_format=torch.channels_last)
    x = images(32).to(memory_format=torch.channels_last)
    parts = assert_transparent(model, preset_cuts("mobilenet_v2"), x)
    (crossing,) = parts.front(x)
    assert crossing.is_contiguous(memory_format=torch.channels_last)
    assert parts.middle(crossing)[0].is_contiguous(memory_format=torch.channels_last)


def test_a_merged_and_saved_model_loads_into_the_plain_one_strictly(tmp_path, mobilenet):
    model = copy.deepcopy(mobilenet)
    initial = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    parts = split(model, preset_cuts("mobilenet_v2"), image_input(32))
    split_step(parts, images(32))
    full, bottleneck = merge_states(initial, *map(partition_state, parts.partitions.values()))
    save_model(tmp_path / "model.safetensors", full, bottleneck, {})
    plain = build_model(ModelSpec(name="mobilenet_v2", num_classes=5, seed=8))
    plain.load_state_dict(load_state(tmp_path / "model.safetensors"), strict=True)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in plain.state_dict().items())
    assert plain.state_dict()["features.18.1.num_batches_tracked"] == 1


def test_a_freed_partition_keeps_names_and_shapes_but_no_data(mobilenet):
    parts = split(copy.deepcopy(mobilenet), preset_cuts("mobilenet_v2"), image_input(32))
    before = {name: tensor.shape for name, tensor in parts.middle.state_dict().items()}
    parts.middle.free()
    after = parts.middle.state_dict()
    assert {name: tensor.shape for name, tensor in after.items()} == before
    assert all(tensor.is_meta for tensor in after.values())
    assert not any(
        tensor.is_meta for tensor in (*parts.front.state_dict().values(), *parts.back.state_dict().values())
    )


def test_a_freed_partitions_memory_is_released_with_the_model():
    model = Swap()
    parts = split(model, ("first", "mul"), FLAT)
    gone = [weakref.ref(tensor) for tensor in (*parts.middle.parameters(), *parts.back.buffers())]
    assert len(gone) == 5
    parts.middle.free()
    parts.back.free()
    del model
    gc.collect()
    assert [ref() for ref in gone] == [None] * 5


def test_a_loaded_partition_computes_with_what_was_loaded():
    model = Swap()
    parts = split(model, ("first", "second"), FLAT)
    parts.middle.load_state_dict(
        {n: torch.zeros_like(t) for n, t in parts.middle.state_dict().items()}, assign=True
    )
    for training in (True, False):
        parts.middle.train(training)
        assert not parts.middle(torch.ones(2, 4))[0].any()


def test_splitting_leaves_the_model_and_the_random_numbers_alone(mobilenet):
    before = {name: tensor.clone() for name, tensor in mobilenet.state_dict().items()}
    torch.manual_seed(3)
    state = torch.get_rng_state()
    split(mobilenet, preset_cuts("mobilenet_v2"), image_input(32))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in mobilenet.state_dict().items())


@pytest.mark.parametrize(
    ("cuts", "message"),
    [
        (("features.18", "features.0.1"), r"cut 1 \(features.18\) must come before cut 2 \(features.0.1\)"),
        (("features.0.1", "features.0.1"), "must come before"),
        (("features.0.1", "classifier"), "the model's last operation"),
        (
            ("features.0.9", "features.18"),
            r"unknown cut 'features.0.9'; the nearest of \d+ are .*features.0.0",
        ),
    ],
)
def test_cuts_that_cannot_be_are_refused_in_one_line(mobilenet, cuts, message):
    with pytest.raises(UserError, match=message) as caught:
        split(mobilenet, cuts, image_input(32))
    assert "\n" not in str(caught.value)


def test_an_image_too_small_for_the_model_is_refused():
    model = build_model(ModelSpec(name="alexnet", num_classes=2))
    with pytest.raises(UserError, match=r"AlexNet does not run on inputs of shape \(3, 16, 16\)"):
        split(model, preset_cuts("alexnet"), image_input(16))


# ---- small models that hold one difficulty each ----

FLAT = (TensorInfo(name="x", shape=(4,)),)


class Layers(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.third = nn.Linear(4, 4)


class Swap(Layers):
    """Has a buffer that is not saved, a bare parameter, and modes that trace differently."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))
        self.register_buffer("offset", torch.ones(4), persistent=False)
        self.register_buffer("shift", torch.zeros(4))

    def forward(self, x):
        x = F.dropout(self.second(self.first(x)), 0.5, self.training)
        return self.third(x * self.scale + self.offset + self.shift)


def test_a_mode_that_is_baked_into_the_trace_is_followed():
    parts = assert_transparent(Swap(), ("first", "mul"), torch.ones(3, 4), infos=FLAT)
    assert set(parts.middle.state_dict()) == {"second.weight", "second.bias", "scale"}
    assert set(parts.back.state_dict()) == {"third.weight", "third.bias", "shift"}
    assert dict(parts.back.named_buffers()).keys() == {"offset", "shift"}


class Skipping(Layers):
    def forward(self, x):
        early = self.first(x)
        return self.third(self.second(early) + early)


def test_what_goes_from_front_to_back_stays_on_the_edge():
    parts = assert_transparent(Skipping(), ("first", "second"), torch.ones(3, 4), infos=FLAT)
    assert [info.name for info in parts.kept] == ["first"]
    assert (parts.front.output_names, parts.back.input_names) == (("first", "first"), ("second", "first"))


class Changing(Layers):
    """Changes a tensor in place, in a given way, right after the first layer."""

    def __init__(self, change):
        super().__init__()
        self.relu = nn.ReLU(inplace=True)
        self.change = change

    def forward(self, x):
        x = self.first(x)
        return self.third(self.second(self.change(self, x)))


def dropped_result(_model, x):
    x.relu_()
    return x


def by_iadd(_model, x):
    x += 1
    return x


def by_fill(_model, x):
    x.index_fill_(1, torch.tensor([1]), 0.5)
    return x * 2


CHANGES = {
    "module": lambda model, x: model.relu(x),
    "function": lambda _model, x: F.relu(x, inplace=True),
    "functional_": lambda _model, x: torch.relu_(x),
    "method": lambda _model, x: x.mul_(2).add_(1),
    "dropped": dropped_result,
    "iadd": by_iadd,
    "fill": by_fill,
    "twice": lambda model, x: model.relu(x.mul_(3)),
    "view": lambda _model, x: x.view(-1, 2, 2).relu_().flatten(1),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_tensor_that_crossed_is_never_changed_in_place(change):
    parts = assert_transparent(Changing(change), ("first", "second"), torch.randn(3, 4), infos=FLAT)
    crossed = torch.randn(3, 4)
    before = crossed.clone()
    parts.middle(crossed)
    assert torch.equal(crossed, before)


def test_changes_within_a_partition_stay_in_place():
    parts = split(Changing(CHANGES["twice"]), ("first", "second"), FLAT)
    targets = [str(node.target) for node in parts.middle.graphs[True].nodes if node.op.startswith("call")]
    assert targets == ["mul", "relu", "second"]


def seen_elsewhere(_model, x):
    view = x.view(-1, 4)
    view.relu_()
    return x


def test_a_change_seen_through_another_view_across_a_cut_is_refused():
    with pytest.raises(UserError, match="relu_ changes in place what second sees through another view"):
        split(Changing(seen_elsewhere), ("first", "second"), FLAT)


class Sizes(Layers):
    def forward(self, x):
        batch, width = x.shape
        x = self.first(x)
        x = self.second(x.view(batch * 2, width // 2).view(batch, width))
        return self.third(x).view(batch, -1)


@pytest.mark.parametrize("batch", [1, 5])
def test_sizes_are_derived_on_the_other_side(batch):
    parts = assert_transparent(Sizes(), ("first", "second"), torch.ones(batch, 4), infos=FLAT)
    assert [info.name for info in (*parts.cut1, *parts.cut2, *parts.kept)] == ["first", "second"]


class Chunks(Layers):
    def forward(self, x):
        left, right = self.first(x).chunk(2, dim=1)
        return self.third(self.second(torch.cat([right, left], 1)))


def test_a_tuple_crosses_as_its_elements():
    parts = assert_transparent(Chunks(), ("chunk", "second"), torch.ones(3, 4), infos=FLAT)
    assert [info.shape for info in parts.cut1] == [(2,), (2,)]


class Windows(Layers):
    def forward(self, x):
        return self.third(self.second(self.first(x).view(-1, 2)).view(-1, 4))


def test_rows_follow_the_batch_in_their_ratio():
    model = Windows()
    model.second = nn.Linear(2, 2)
    parts = assert_transparent(model, ("view", "second"), torch.ones(3, 4), infos=FLAT)
    assert parts.cut1[0].batched(8) == (16, 2)
    assert parts.cut1[0].dense_bytes(8) == 16 * 2 * 4


class Transposed(Layers):
    def forward(self, x):
        return self.third(self.second(self.first(x).t().contiguous().t()))


def test_a_tensor_whose_batch_is_not_first_cannot_cross():
    with pytest.raises(
        UserError, match=r"t yields a Tensor of shape \(4, 2\) for a batch of 2, which cannot cross"
    ):
        split(Transposed(), ("t", "second"), FLAT)


class Shared(Layers):
    def forward(self, x):
        return self.third(self.first(self.second(self.first(x))))


def test_a_parameter_used_on_both_sides_is_refused():
    with pytest.raises(UserError, match=r"first.weight is used on both sides of a cut \(first, first_1\)"):
        split(Shared(), ("first", "first_1"), FLAT)


class Masked(Layers):
    def forward(self, x, mask):
        return self.third(self.second(self.first(x)).masked_fill(mask == 0, 0.0))


def test_an_integer_input_that_only_the_middle_needs_crosses_as_it_is():
    infos = (*FLAT, TensorInfo(name="mask", shape=(4,), dtype=torch.int64))
    inputs = (torch.ones(3, 4), torch.tensor([[1, 0, 1, 1]] * 3))
    parts = assert_transparent(Masked(), ("first", "masked_fill"), *inputs, infos=infos)
    assert [(i.name, i.dtype, i.requires_grad) for i in parts.cut1] == [
        ("mask", torch.int64, False),
        ("first", torch.float32, True),
    ]


def test_a_frozen_front_needs_no_gradient(resnet):
    model = copy.deepcopy(resnet)
    for parameter in (*model.conv1.parameters(), *model.bn1.parameters()):
        parameter.requires_grad = False
    parts = split(model, preset_cuts("resnet18"), image_input(32))
    assert [info.requires_grad for info in (*parts.cut1, *parts.cut2)] == [False, True]


def test_a_deep_copy_of_a_partition_is_independent(mobilenet):
    parts = split(mobilenet, preset_cuts("mobilenet_v2"), image_input(32))
    twin = copy.deepcopy(parts.front)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert not twin(images(32))[0].any()
    assert parts.front(images(32))[0].any()
    assert list(parts.partitions) == list(PARTS)

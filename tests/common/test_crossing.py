"""What crosses a cut, and what is made local to a partition so that it can."""

import copy
import operator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from common.crossing import cut_in_three
from common.dataflow import OUTPUT_PART, assign
from common.errors import UserError
from common.graph import find_cut, trace
from common.partition import split
from common.propagate import TensorInfo, propagate

pytestmark = pytest.mark.usefixtures("one_thread")

FLAT = (TensorInfo(name="x", shape=(4,)),)


class Layers(nn.Module):
    """Three layers; `between` stands for what a model does with the first one's output."""

    def __init__(self, between=None):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.third = nn.Linear(4, 4)
        self.between = between

    def forward(self, x):
        return self.third(self.second(self.between(self.first(x))))


def thirds(model, cuts, inputs=FLAT):
    return cut_in_three(model, trace(model, True), cuts, inputs, True)


def names(infos):
    return [info.name for info in infos]


def run_apart(parts, x):
    """Run three partitions as three machines: what is handed on is a fresh leaf that must stay as it is.

    Returns the output and the gradients of all parameters.
    """
    made = parts.front(x)
    crossed = [t.detach().requires_grad_(t.is_floating_point()) for t in made[: len(parts.cut1)]]
    copies = [t.detach().clone() for t in crossed]
    narrowed = parts.middle(*crossed)
    held = [t.detach().requires_grad_(t.is_floating_point()) for t in parts.back_inputs(narrowed, made)]
    (out,) = parts.back(*held)
    assert all(torch.equal(before, after) for before, after in zip(copies, crossed, strict=True))
    out.square().sum().backward()
    back = [t.grad for t in held]
    torch.autograd.backward(list(narrowed), back[: len(parts.cut2)])
    front = parts.front_gradients([t.grad for t in crossed], back)
    pairs = [(t, g) for t, g in zip(made, front, strict=True) if t.requires_grad and g is not None]
    torch.autograd.backward([t for t, _ in pairs], [g for _, g in pairs])
    gradients = {n: p.grad for part in parts.partitions.values() for n, p in part.named_parameters()}
    return out.detach(), gradients


def assert_as_unsplit(model, cuts, inputs=FLAT, batch=3):
    plain = copy.deepcopy(model)
    x = torch.randn(inputs[0].batched(batch), generator=torch.Generator().manual_seed(1))
    parts = split(model, cuts, inputs)
    out, gradients = run_apart(parts, x)
    expected = plain(x)
    expected.square().sum().backward()
    assert torch.equal(out, expected)
    wanted = {name: p.grad for name, p in plain.named_parameters()}
    assert gradients.keys() == wanted.keys()
    assert [name for name, grad in wanted.items() if not torch.equal(grad, gradients[name])] == []
    return parts


# ---- which operation belongs to which partition ----


def by_chunks(x):
    left, right = x.chunk(2, dim=1)
    return torch.cat([right, left], dim=1)


def test_operations_up_to_a_cut_belong_before_it():
    model = Layers(torch.tanh)
    traced = trace(model, True)
    part = assign(traced, propagate(model, traced, FLAT, True), (0, 2))
    assert part == {"first": 0, "tanh": 1, "second": 1, "third": 2}


def test_the_elements_of_a_tuple_belong_where_the_tuple_is_made():
    model = Layers(by_chunks)
    traced = trace(model, True)
    places = (find_cut(traced, "chunk"), find_cut(traced, "second"))
    part = assign(traced, propagate(model, traced, FLAT, True), places)
    taken = [n.name for n in traced.operations() if n.target is operator.getitem]
    assert len(taken) == 2
    assert {part[name] for name in taken} == {part["chunk"]} == {0}
    assert part["cat"] == 1
    assert part["third"] == OUTPUT_PART


# ---- which tensors cross ----


def test_each_partition_takes_and_returns_what_the_others_need():
    class Skips(Layers):
        def forward(self, x):
            first = self.first(x)
            second = self.second(first)
            return self.third(second + first), x

    crossing = thirds(Skips(), ("first", "second")).crossing
    assert [names(infos) for infos in crossing.taken()] == [["x"], ["first"], ["second", "x", "first"]]
    assert [names(infos) for infos in crossing.returned()] == [
        ["first", "x", "first"],
        ["second"],
        ["third", "x"],
    ]


def test_a_tensor_that_both_others_use_goes_to_both():
    parts = assert_as_unsplit(_Residual(), ("first", "second"))
    assert (names(parts.cut1), names(parts.cut2), names(parts.kept)) == (["first"], ["second"], ["first"])


class _Residual(Layers):
    def forward(self, x):
        first = self.first(x)
        return self.third(self.second(first) + first)


class _Blocks(nn.Module):
    """Two residual blocks, with operators and activations in place as in torchvision's ResNets."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c, self.d, self.e = (nn.Linear(4, 4) for _ in range(5))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        x = self.a(x)
        for first, second in ((self.b, self.c), (self.d, self.e)):
            out = self.relu(first(x))
            out = second(out)
            out += x
            x = self.relu(out)
        return x


OPERATIONS = ("a", "b", "relu", "c", "add", "relu_1", "d", "relu_2", "e", "add_1")


@settings(deadline=None, max_examples=30)
@given(
    cuts=st.lists(st.sampled_from(range(len(OPERATIONS))), min_size=2, max_size=2, unique=True).map(sorted)
)
def test_residual_blocks_may_be_cut_anywhere(cuts):
    assert_as_unsplit(_Blocks(), (OPERATIONS[cuts[0]], OPERATIONS[cuts[1]]))


@pytest.mark.parametrize(
    ("cuts", "message"),
    [
        (
            ("second", "first"),
            r"cut 1 \(second\) must come before cut 2 \(first\); here it is operation 3 of 4",
        ),
        (("first", "first"), "must come before"),
        (
            ("first", "third"),
            r"cut 2 \(third\) is the model's last operation; leave the classifier behind it",
        ),
        (("first", "thrid"), "unknown cut 'thrid'; the nearest .* third"),
        (("", "third"), "unknown cut ''"),
    ],
)
def test_cuts_in_an_order_that_cannot_be_are_refused(cuts, message):
    with pytest.raises(UserError, match=message):
        thirds(Layers(torch.tanh), cuts)


def test_cuts_that_nothing_crosses_are_refused():
    class Apart(Layers):
        def forward(self, x):
            return self.third(self.first(x) * torch.relu(self.second.bias))

    with pytest.raises(UserError, match="nothing crosses first or relu"):
        thirds(Apart(), ("first", "relu"))


# ---- buffers ----


class _Buffered(Layers):
    def __init__(self):
        super().__init__()
        self.register_buffer("offset", torch.arange(4.0))
        self.norm = nn.BatchNorm1d(4, affine=False)


def test_a_buffer_that_is_only_read_may_be_on_both_sides():
    class Reading(_Buffered):
        def forward(self, x):
            x = self.first(x) + self.offset
            return self.third(self.second(x) * self.offset)

    parts = assert_as_unsplit(Reading(), ("add", "mul"))
    assert ["offset" in part.state_dict() for part in parts.partitions.values()] == [True, True, False]


def test_statistics_that_both_sides_would_gather_are_refused():
    class Twice(_Buffered):
        def forward(self, x):
            return self.third(self.norm(self.second(self.norm(self.first(x)))))

    with pytest.raises(UserError, match=r"norm\.running_mean is used on both sides of a cut"):
        split(Twice(), ("norm", "norm_1"), FLAT)


def test_a_buffer_that_the_model_s_own_code_changes_is_refused():
    class Counting(_Buffered):
        def forward(self, x):
            self.offset.add_(1)
            return self.third(self.second(self.first(x)))

    class Replacing(_Buffered):
        def forward(self, x):
            self.offset = self.offset + 1
            return self.third(self.second(self.first(x)))

    for model in (Counting(), Replacing()):
        with pytest.raises(UserError, match=r"the forward of \w+ changes its buffer offset"):
            split(model, ("first", "second"), FLAT)


# ---- changes in place ----


def by_copy(x):
    x.copy_(x * 2)
    return x


def chained(x):
    x.add_(1)
    y = x * 3
    x.mul_(2)
    return x + y


def on_a_view(x):
    return F.relu(x.view(-1, 2, 2), inplace=True).flatten(1)


def read_before(x):
    y = x * 2
    x += 1
    return x + y


IN_PLACE = {
    "add": lambda x: operator.iadd(x, 1),
    "sub": lambda x: operator.isub(x, 1),
    "mul": lambda x: operator.imul(x, 2),
    "div": lambda x: operator.itruediv(x, 2),
    "clamp": lambda x: x.clamp_(min=0),
    "dropout": lambda x: F.dropout(x, 0.0, inplace=True),
    "hardtanh": lambda x: F.hardtanh(x, inplace=True),
    "chained": chained,
    "view": on_a_view,
    "read_before": read_before,
    "copy": by_copy,
}


@pytest.mark.parametrize("change", IN_PLACE.values(), ids=IN_PLACE)
def test_what_crossed_is_changed_out_of_place(change):
    assert_as_unsplit(Layers(change), ("first", "second"))


def test_a_module_s_copy_is_not_the_model_s_own():
    model = _Blocks()
    flow = thirds(model, ("b", "c"))
    assert list(flow.copies) == ["relu__out_of_place"]
    assert flow.copies["relu__out_of_place"].inplace is False
    assert model.relu.inplace is True


# ---- numbers ----


def test_a_number_that_does_not_follow_the_batch_is_a_constant():
    class Widths(Layers):
        def forward(self, x):
            x = self.first(x)
            width = x.shape[1]
            return self.third(self.second(x) / width)

    parts = assert_as_unsplit(Widths(), ("first", "second"))
    assert names(parts.kept) == []


@pytest.mark.parametrize("batch", [1, 2, 7])
def test_a_number_that_follows_the_batch_is_read_off_what_crosses(batch):
    class Folds(Layers):
        def forward(self, x):
            rows = x.shape[0]
            x = self.second(self.first(x).view(rows * 2, 2).view(rows, 4))
            return self.third(x.reshape(rows * 2, 2).reshape(rows, -1))

    assert_as_unsplit(Folds(), ("first", "second"), batch=batch)


def test_a_number_that_follows_the_batch_in_another_way_is_refused():
    class Squares(Layers):
        def forward(self, x):
            rows = x.shape[0] ** 2
            return self.third(self.second(self.first(x)) * rows)

    with pytest.raises(UserError, match="yields a int, which cannot cross a cut on its way to mul"):
        thirds(Squares(), ("first", "second"))

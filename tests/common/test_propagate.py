"""What a traced model computes, found without computing it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from common.errors import UserError
from common.graph import trace
from common.propagate import BATCHES, TOKENS, Propagated, TensorInfo, meta_copy, propagate, tensors_in

MOST_TOKENS = 128

SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)


@settings(deadline=None)
@given(shape=SHAPES, rows=st.integers(1, 9), batch=st.integers(1, 64))
def test_a_tensor_s_shape_and_bytes_follow_the_batch(shape, rows, batch):
    info = TensorInfo(name="x", shape=shape, dtype=torch.float16, rows=rows)
    assert info.batched(batch) == (rows * batch, *shape)
    assert info.dense_bytes(batch) == torch.empty(info.batched(batch), dtype=torch.float16).nbytes


@settings(deadline=None)
@given(shape=SHAPES, batch=st.integers(1, 64))
def test_a_tensor_without_a_batch_dimension_stays_as_it_is(shape, batch):
    info = TensorInfo(name="x", shape=shape, dtype=torch.int64, rows=0)
    assert info.batched(batch) == shape
    assert info.dense_bytes(batch) == torch.empty(shape, dtype=torch.int64).nbytes


def described(values):
    return Propagated(values={"x": values}, most_tokens=MOST_TOKENS).describe("x", "x")


@settings(deadline=None)
@given(shape=SHAPES, rows=st.integers(0, 9), grad=st.booleans())
def test_what_is_described_is_what_was_made(shape, rows, grad):
    info = TensorInfo(name="x", shape=shape, requires_grad=grad, rows=rows)
    values = [torch.empty(info.batched(batch), requires_grad=grad) for batch in BATCHES]
    assert described(values) == info


@settings(deadline=None)
@given(shape=SHAPES.filter(len), rows=st.integers(0, 9), data=st.data())
def test_dimensions_that_follow_the_tokens_are_described_by_the_most(shape, rows, data):
    dims = tuple(sorted(data.draw(st.sets(st.integers(0, len(shape) - 1), min_size=1))))
    longest = tuple(MOST_TOKENS if dim in dims else size for dim, size in enumerate(shape))
    info = TensorInfo(name="x", shape=longest, rows=rows, token_dims=dims)
    values = [torch.empty(info.batched(*sizes)) for sizes in zip(BATCHES, TOKENS, strict=True)]
    assert described(values) == info
    assert [info.tokens(value.shape) for value in values] == list(TOKENS)
    # Where the number of tokens is fixed, nothing may follow it.
    assert Propagated(values={"x": values}).describe("x", "x") is None


@pytest.mark.parametrize(
    "values",
    [
        (2, 3),
        (None, None),
        (torch.empty(4, 2), torch.empty(4, 3)),  # the batch is last
        (torch.empty(3, 4), torch.empty(4, 4)),  # batch + 1
        (torch.empty(2, 4), torch.empty(3, 5)),  # two dimensions differ
        (torch.empty(4), torch.empty(9)),  # the batch's square
        (torch.empty(2), (torch.empty(3),)),
    ],
    ids=["number", "none", "last", "odd", "two", "square", "mixed"],
)
def test_what_does_not_follow_the_batch_first_has_no_description(values):
    assert described(values) is None


def test_tensors_are_found_in_any_nesting():
    a, b, c = (torch.empty(index) for index in range(3))
    assert tensors_in(a) == [a]
    assert [len(t) for t in tensors_in((a, [b, {"c": c, "n": 1}], "text", None))] == [0, 1, 2]
    assert tensors_in({"n": 1}) == tensors_in("text") == tensors_in(7) == []


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.second.weight = self.first.weight  # tied
        self.norm = nn.BatchNorm1d(4)
        self.relu = nn.ReLU(inplace=True)
        self.frozen = nn.Parameter(torch.ones(4), requires_grad=False)
        self.register_buffer("offset", torch.zeros(4))
        self.plain = torch.ones(4)

    def forward(self, x):
        x = self.norm(self.first(x)) + self.frozen + self.offset + self.plain
        x = self.relu(x)
        return self.second(x.view(-1, 2, 2).flatten(1))


NET_INPUT = (TensorInfo(name="x", shape=(4,)),)


def test_a_copy_of_a_model_s_structure_has_no_data_and_the_same_ties():
    model = Net()
    structure = meta_copy(model)
    tensors = [*structure.parameters(), *structure.buffers(), structure.plain]
    assert all(tensor.is_meta for tensor in tensors)
    assert structure.first.weight is structure.second.weight
    assert {n: p.requires_grad for n, p in structure.named_parameters()} == {
        n: p.requires_grad for n, p in model.named_parameters()
    }
    assert isinstance(structure.frozen, nn.Parameter)
    assert structure.state_dict().keys() == model.state_dict().keys()
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers(), model.plain))


@pytest.mark.parametrize("training", [True, False])
def test_propagating_leaves_the_model_and_the_random_numbers_alone(training):
    model = Net()
    model.norm.eval()
    before, rng = {n: t.clone() for n, t in model.state_dict().items()}, torch.get_rng_state()
    propagate(model, trace(model, training), NET_INPUT, training)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), rng)
    assert (model.training, model.norm.training) == (True, False)


def test_every_node_s_value_is_known_for_both_batches():
    model = Net()
    traced = trace(model, True)
    found = propagate(model, traced, NET_INPUT, True)
    shapes = {
        name: [tuple(v.shape) for v in values]
        for name, values in found.values.items()
        if values[0] is not None
    }
    assert shapes["first"] == [(2, 4), (3, 4)]
    assert shapes["view"] == [(2, 2, 2), (3, 2, 2)]
    assert all(value.is_meta for values in found.values.values() for value in tensors_in(tuple(values)))
    assert found.values["second"][0].requires_grad


def test_changes_in_place_and_shared_memory_are_found():
    model = Net()
    found = propagate(model, trace(model, True), NET_INPUT, True)
    assert found.changes == {"relu": ["add_2"]}
    assert found.storages["relu"] == found.storages["add_2"] == found.storages["view"]
    assert found.storages["first"].isdisjoint(found.storages["norm"])


@pytest.mark.parametrize("affine", [True, False])
def test_a_normalisation_needs_a_gradient_where_its_input_or_weight_does(affine):
    model = nn.Sequential(nn.BatchNorm1d(4, affine=affine))
    found = propagate(model, trace(model, True), NET_INPUT, True)
    assert found.values["_0"][0].requires_grad is affine
    assert found.values["_0"][0].shape == (2, 4)
    assert found.changes == {}


@pytest.mark.parametrize("shape", [(5,), (4, 4, 4), ()])
def test_inputs_that_do_not_fit_are_refused_with_their_shape_in_one_line(shape):
    model = Net()
    with pytest.raises(UserError, match="Net does not run on inputs of shape") as caught:
        propagate(model, trace(model, True), (TensorInfo(name="x", shape=shape),), True)
    assert str(shape) in str(caught.value)
    assert "\n" not in str(caught.value)

"""Nested state taken apart for a file and put together again is what it was: keys, types, values, memory order."""

import copy
import json
import math
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from common.optim import OptimSpec, build_optimizer
from common.safetensors_file import _DTYPES, data_of
from common.snapshot import detached, flatten, unflatten

pytestmark = pytest.mark.usefixtures("one_thread")


def assert_same(ours, theirs, where="state"):
    assert type(ours) is type(theirs), where
    if isinstance(ours, torch.Tensor):
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape), where
        assert not ours.numel() or ours.stride() == theirs.stride(), where
        assert bytes_of(ours) == bytes_of(theirs), where
    elif isinstance(ours, dict):
        assert [*ours] == [*theirs], where
        for key, other in zip(ours, theirs, strict=True):
            assert type(key) is type(other), where
            assert_same(ours[key], theirs[key], f"{where}.{key}")
    elif isinstance(ours, list | tuple):
        assert len(ours) == len(theirs), where
        for index, pair in enumerate(zip(ours, theirs, strict=True)):
            assert_same(*pair, f"{where}[{index}]")
    elif isinstance(ours, float):
        assert struct.pack("d", ours) == struct.pack("d", theirs) or (math.isnan(ours) and math.isnan(theirs))
    else:
        assert ours == theirs, where


def bytes_of(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def through_json(state):
    tensors, plain = flatten(state)
    return unflatten(tensors, json.loads(json.dumps(plain)))


@st.composite
def tensors(draw):
    """Of any dtype and shape, their dimensions in any order in memory."""
    dtype = draw(st.sampled_from(list(_DTYPES)))
    shape = draw(st.lists(st.integers(0, 4), max_size=4))
    order = draw(st.permutations(range(len(shape))))
    count = math.prod(shape)
    data = draw(st.binary(min_size=count, max_size=count)) if dtype != torch.bool else bytes(count)
    values = torch.tensor(list(data), dtype=torch.uint8).repeat_interleave(dtype.itemsize).view(dtype)
    return values.view([shape[dim] for dim in order]).permute([order.index(dim) for dim in range(len(shape))])


states = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary() | tensors(),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(st.text(max_size=3) | st.integers(-3, 3), inner, max_size=4)
    ),
    max_leaves=12,
)


@settings(deadline=None, max_examples=200)
@given(state=states)
def test_any_state_comes_back_as_it_was(state):
    assert_same(through_json(state), state)


@settings(deadline=None, max_examples=100)
@given(state=states)
def test_a_detached_state_is_equal_and_shares_nothing(state):
    copied = detached(state)
    assert_same(copied, state)
    theirs = {tensor.data_ptr() for tensor in flatten(state)[0].values() if tensor.numel()}
    assert not any(tensor.data_ptr() in theirs for tensor in flatten(copied)[0].values() if tensor.numel())


def test_names_tell_the_place_of_a_tensor_and_differ():
    one = torch.zeros(1)
    state = {
        "state": {0: {"momentum_buffer": one}},
        "a": {"b": one},
        "a.b": one,
        "__metadata__": one,
        1: one,
        "1": one,
    }
    names = list(flatten(state)[0])
    assert names == ["state.0.momentum_buffer", "a.b", "a.b'", "__metadata__'", "1", "1'"]
    assert_same(through_json(state), state)


def test_text_that_is_no_unicode_does_no_harm():
    state = {"\ud800": [torch.ones(1), "\udfff"]}
    assert_same(through_json(state), state)
    next(iter(flatten(state)[0])).encode()


@pytest.mark.parametrize("size", [(4, 3, 5, 5), (4, 1, 5, 5), (1, 3, 1, 1), (4, 3, 1, 1), (0, 3, 2, 2)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_strides_come_back_where_a_size_is_one_too(size, memory_format):
    tensor = torch.empty(size, memory_format=memory_format).zero_()
    back = through_json(tensor)
    assert back.is_contiguous(memory_format=memory_format)
    assert back.stride() == tensor.stride() or not tensor.numel()


def test_views_with_gaps_and_shared_memory_become_tensors_of_their_own():
    whole = torch.arange(24.0).view(4, 6)
    state = [whole, whole[:, ::2], whole[1:3], whole.T, torch.ones(1).expand(3, 2), whole]
    back = unflatten(*map(copy.deepcopy, flatten(detached(state))))
    for ours, theirs in zip(back, state, strict=True):
        assert torch.equal(ours, theirs)
    assert back[3].stride() == whole.T.stride()


def test_parameters_and_what_needs_gradients_come_back_as_plain_tensors():
    parameter = nn.Parameter(torch.ones(2))
    for back in (through_json(parameter), detached(parameter * 2)):
        assert type(back) is torch.Tensor
        assert not back.requires_grad


def test_a_conjugate_view_is_kept_by_its_values():
    conjugate = torch.tensor([1 + 2j, 3 - 4j]).conj()
    assert bytes(data_of(conjugate)) == bytes_of(conjugate.resolve_conj())


@pytest.mark.parametrize(
    ("state", "says"),
    [
        ({"a": [1, {2}]}, r"a set cannot be kept, at a\.1"),
        ({"a": {1.5: 0}}, r"a key must be text or a whole number, not 1\.5, at a"),
        ({True: 0}, "a key must be text or a whole number, not True"),
        (object(), "a object cannot be kept"),
        ({"net": nn.Linear(1, 1)}, "a Linear cannot be kept, at net"),
    ],
)
@pytest.mark.parametrize("take", [flatten, detached])
def test_what_no_file_can_hold_is_refused_with_its_place(take, state, says):
    with pytest.raises(TypeError, match=says):
        take(state)


@pytest.mark.parametrize(
    "plain",
    [
        {"tensor": "gone"},
        {"tensor": "t", "strides": [1]},
        {"tensor": "t", "strides": [1 << 40, 1]},
        {"tensor": "t", "strides": [-3, 1]},
        {"tensor": "t", "strides": [1, 1]},
        {"tensor": "t", "strides": ["x", None]},
        {"tensor": 3},
        {"map": [[1]]},
        {"map": [[[], 1]]},
        {"map": 3},
        {"float": "one"},
        {"bytes": "0g"},
        {"else": 1},
        {},
        object(),
    ],
)
def test_plain_values_that_flatten_did_not_make_are_refused(plain):
    with pytest.raises(ValueError, match="do not belong together"):
        unflatten({"t": torch.zeros(2, 3)}, [plain])


# Optimizers.


def trained(spec, memory_format, steps, start=None):
    """A layer and its optimizer after some steps, from a state or from the beginning."""
    torch.manual_seed(0)
    net = nn.Conv2d(3, 8, 3).to(memory_format=memory_format)
    optimizer, scheduler = build_optimizer(spec, net.parameters())
    if start is not None:
        net.load_state_dict(start["net"])
        optimizer.load_state_dict(start["optimizer"])
        scheduler.load_state_dict(start["scheduler"])
    for step in steps:
        x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        net(x.contiguous(memory_format=memory_format)).square().sum().backward()
        optimizer.step()
        scheduler.step()
    return {
        "net": net.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
    }


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    "spec",
    [
        OptimSpec(name="sgd", lr=0.01),
        OptimSpec(name="sgd", lr=0.01, momentum=0.9, weight_decay=0.1),
        OptimSpec(name="adamw", lr=0.01, schedule="cosine", warmup_steps=2, total_steps=9),
    ],
    ids=["sgd", "momentum", "adamw"],
)
def test_an_optimizer_goes_on_from_a_state_that_came_back(spec, memory_format):
    middle = trained(spec, memory_format, range(3))
    back = through_json(detached(middle))
    back["net"] = torch.nn.Module.state_dict(nn.Conv2d(3, 8, 3)) | back["net"]
    assert all(type(key) is int for key in back["optimizer"]["state"])
    assert_same(back["optimizer"], middle["optimizer"])
    assert_same(back["scheduler"], middle["scheduler"])
    there, straight = trained(spec, memory_format, range(3, 6), back), trained(spec, memory_format, range(6))
    assert_same({**there, "net": dict(there["net"])}, {**straight, "net": dict(straight["net"])})

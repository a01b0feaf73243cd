"""What differs between two runs is named so that a person can act on it."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.differences import check_same, differences
from common.errors import UserError

OURS = {
    "model": {"name": "mobilenet_v2", "classes": 10},
    "cuts": ["a", "b"],
    "optim": {"lr": 0.1, "betas": (0.9, 0.999), "clip_norm": None},
    "codecs": {"cut1.act": "int8", "cut2.act": ""},
}


def changed(**changes):
    return {
        key: {**value, **changes.get(key, {})} if isinstance(value, dict) else changes.get(key, value)
        for key, value in OURS.items()
    }


@pytest.mark.parametrize(
    ("theirs", "lines"),
    [
        (changed(), []),
        (changed(optim={"betas": [0.9, 0.999]}), []),
        (changed(optim={"lr": 0.02}), ["optim.lr: 0.1 here, 0.02 in the checkpoint"]),
        (changed(optim={"betas": [0.9, 0.99]}), ["optim.betas[1]: 0.999 here, 0.99 in the checkpoint"]),
        (changed(optim={"clip_norm": 1.0}), ["optim.clip_norm: null here, 1.0 in the checkpoint"]),
        (changed(codecs={"cut2.act": "int4"}), ['codecs.cut2.act: "" here, int4 in the checkpoint']),
        (changed(cuts=["a"]), ['cuts: ["a", "b"] here, ["a"] in the checkpoint']),
        (changed(cuts={"a": 1}), ['cuts: ["a", "b"] here, {"a": 1} in the checkpoint']),
        (changed(model={"classes": True}), ["model.classes: 10 here, true in the checkpoint"]),
        (changed(model={"size": 32}), ["model.size: nothing here, 32 in the checkpoint"]),
        (changed() | {"amp": "bf16"}, ["amp: nothing here, bf16 in the checkpoint"]),
        (
            changed(model={"name": "resnet"}, optim={"lr": 1.0}),
            [
                "model.name: mobilenet_v2 here, resnet in the checkpoint",
                "optim.lr: 0.1 here, 1.0 in the checkpoint",
            ],
        ),
    ],
)
def test_each_difference_is_a_line_of_its_own(theirs, lines):
    assert differences(OURS, theirs) == lines


def test_what_the_checkpoint_lacks_is_named_too():
    assert differences({"a": {"b": 1}}, {"a": {}}) == ["a.b: 1 here, nothing in the checkpoint"]
    assert differences({"a": {"b": 1}}, {}) == ['a: {"b": 1} here, nothing in the checkpoint']


def test_values_are_shown_in_one_line_and_no_longer_than_one_reads():
    (line,) = differences({"a": "x\ny"}, {"a": "z" * 1000})
    assert line == f"a: x y here, {'z' * 57}... in the checkpoint"


def test_other_places_can_be_named():
    assert differences({"a": 1}, {"a": 2}, here="on the edge", there="on the cloud") == [
        "a: 1 on the edge, 2 on the cloud"
    ]


@given(
    value=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    )
)
def test_anything_equals_itself_and_nan_too(value):
    assert differences({"a": value, "b": math.nan}, {"b": math.nan, "a": value}) == []


def test_a_run_of_the_same_settings_may_go_on():
    check_same(OURS, changed(), "the checkpoint in here")


def test_a_run_of_others_is_refused_with_the_first_three():
    with pytest.raises(UserError) as refused:
        check_same({"a": 1, "b": 2, "c": 3, "d": 4, "e": 5}, {}, "the checkpoint in /runs")
    assert str(refused.value) == (
        "the checkpoint in /runs is of another run: a: 1 here, nothing in the checkpoint; b: 2 here, nothing in "
        "the checkpoint; c: 3 here, nothing in the checkpoint; and 2 more"
    )
    with pytest.raises(UserError, match=r"is of another run: a: 1 here, 2 in the checkpoint$"):
        check_same({"a": 1}, {"a": 2}, "the checkpoint")

"""Of the errors in a group, the one that somebody can act on."""

from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import IsthmusError, UserError
from common.groups import first_error


def test_a_preferred_error_goes_before_earlier_ones():
    wanted = UserError("no such model")
    assert first_error(ExceptionGroup("", [ValueError(), KeyError(), wanted]), UserError) is wanted


def test_without_a_preference_or_without_one_of_them_the_first_counts():
    first = ValueError("first")
    group = ExceptionGroup("", [first, KeyError("second")])
    assert first_error(group) is first
    assert first_error(group, UserError) is first


def test_any_of_several_preferred_kinds_counts_in_the_group_s_order():
    early, late = KeyError(), UserError("later")
    assert first_error(ExceptionGroup("", [ValueError(), early, late]), UserError, KeyError) is early


def test_a_subclass_of_what_is_preferred_is_preferred():
    wanted = UserError("deep")
    nested = ExceptionGroup("", [ValueError(), ExceptionGroup("", [KeyError(), wanted])])
    assert first_error(nested, IsthmusError) is wanted


def test_an_interrupt_can_be_the_first():
    interrupt = KeyboardInterrupt()
    assert first_error(BaseExceptionGroup("", [BaseExceptionGroup("", [interrupt])])) is interrupt


def nested(groups):
    return st.lists(groups, min_size=1, max_size=3).map(lambda errors: ExceptionGroup("", errors))


@settings(deadline=None)
@given(group=nested(st.recursive(st.integers(0, 9).map(ValueError), nested, max_leaves=12)))
def test_however_deep_the_groups_the_first_leaf_is_found(group):
    leaf = group
    while isinstance(leaf, ExceptionGroup):
        leaf = leaf.exceptions[0]
    assert first_error(group, UserError) is leaf

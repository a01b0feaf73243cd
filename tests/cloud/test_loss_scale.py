"""Loss scaling goes by the rule of torch's own GradScaler."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cloud import loss_scale
from cloud.loss_scale import GROWTH_INTERVAL, LARGEST, LossScale


def test_without_scaling_the_scale_is_one_whatever_happens():
    scale = LossScale(enabled=False)
    for _ in range(GROWTH_INTERVAL + 1):
        scale.stepped()
    scale.overflowed()
    assert scale.value == 1.0


def test_it_starts_where_torch_s_does_and_grows_after_as_many_steps():
    scaler = torch.amp.GradScaler("cpu")
    scale = LossScale(enabled=True)
    assert scale.value == scaler.get_scale()
    assert scaler.get_growth_interval() == GROWTH_INTERVAL
    for _ in range(GROWTH_INTERVAL - 1):
        scale.stepped()
    assert scale.value == scaler.get_scale()
    scale.stepped()
    assert scale.value == scaler.get_scale() * scaler.get_growth_factor()


@settings(deadline=None)
@given(steps=st.lists(st.booleans(), max_size=60), interval=st.integers(1, 5))
def test_any_run_of_steps_and_overflows_is_as_torch_s(steps, interval):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss_scale, "GROWTH_INTERVAL", interval)
        ours = LossScale(enabled=True)
        theirs, tracker = torch.tensor(2.0**16), torch.tensor(0, dtype=torch.int32)
        for is_good in steps:
            if is_good:
                ours.stepped()
            else:
                ours.overflowed()
            torch._amp_update_scale_(theirs, tracker, torch.tensor(float(not is_good)), 2.0, 0.5, interval)
            # Torch's scale has no bounds; ours stays where fp32 and gradients are still of use.
            theirs.clamp_(1.0, LARGEST)
            assert ours.value == theirs.item()


def test_the_scale_has_bounds():
    scale = LossScale(enabled=True)
    for _ in range(40):
        scale.overflowed()
    assert scale.value == 1.0
    for _ in range(40 * GROWTH_INTERVAL):
        scale.stepped()
    assert scale.value == LARGEST


@settings(deadline=None)
@given(steps=st.lists(st.booleans(), max_size=40))
def test_the_scale_is_a_power_of_two_so_that_undoing_it_is_exact(steps):
    scale = LossScale(enabled=True)
    for is_good in steps:
        if is_good:
            scale.stepped()
        else:
            scale.overflowed()
    assert scale.value.hex().startswith("0x1.0000000000000p")


@settings(deadline=None)
@given(
    before=st.lists(st.booleans(), max_size=20),
    after=st.lists(st.booleans(), max_size=20),
    enabled=st.booleans(),
)
def test_a_scale_that_is_brought_back_goes_on_alike(before, after, enabled):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss_scale, "GROWTH_INTERVAL", 3)
        scale, back = LossScale(enabled=enabled), LossScale(enabled=enabled)
        for is_good in before:
            scale.stepped() if is_good else scale.overflowed()
        back.load_state_dict(json.loads(json.dumps(scale.state_dict())))
        for is_good in after:
            for one in (scale, back):
                one.stepped() if is_good else one.overflowed()
            assert scale.state_dict() == back.state_dict()

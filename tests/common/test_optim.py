"""One spec, the same optimizer on both sides: three partitions equal the whole bitwise, clipped or not."""

import copy
import json
import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from common.errors import UserError
from common.optim import (
    OPTIMIZERS,
    SCHEDULES,
    OptimSpec,
    apply_scale,
    build_optimizer,
    clip_scale,
    grad_norm_sq,
    learning_rate_factor,
)

SPECS = [
    OptimSpec(lr=0.1),
    OptimSpec(lr=0.1, momentum=0.9, weight_decay=1e-2, schedule="linear", total_steps=6),
    OptimSpec(name="adamw", lr=0.01, weight_decay=0.1, schedule="cosine", warmup_steps=2, total_steps=6),
    OptimSpec(name="adamw", lr=0.01, betas=(0.8, 0.99), schedule="polynomial", total_steps=6, power=2.0),
]
CLIPPED = [OptimSpec(lr=0.1, momentum=0.9, clip_norm=0.05), OptimSpec(name="adamw", lr=0.01, clip_norm=0.05)]


def make_model() -> nn.Sequential:
    """A model whose middle partition has no parameters in its first layer, and odd sizes elsewhere."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 33), nn.BatchNorm1d(33), nn.Linear(33, 3, bias=False)
    )


def set_gradients(model: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for param in model.parameters():
        param.grad = torch.randn(param.shape, generator=generator)


def plain_optimizer(spec: OptimSpec, model: nn.Module) -> torch.optim.Optimizer:
    if spec.name == "sgd":
        return torch.optim.SGD(
            model.parameters(), lr=spec.lr, momentum=spec.momentum, weight_decay=spec.weight_decay
        )
    return torch.optim.AdamW(
        model.parameters(), lr=spec.lr, betas=spec.betas, eps=spec.eps, weight_decay=spec.weight_decay
    )


def train_split(spec: OptimSpec, model: nn.Sequential, steps: int) -> None:
    """Train three partitions as two machines do: squared norms added, one scale for all."""
    partitions = [list(model[a:b].parameters()) for a, b in ((0, 1), (1, 4), (4, 5))]
    built = [build_optimizer(spec, params) for params in partitions]
    for step in range(steps):
        set_gradients(model, step)
        scale = clip_scale(sum(grad_norm_sq(params) for params in partitions), spec.clip_norm)
        for params, (optimizer, scheduler) in zip(partitions, built, strict=True):
            apply_scale(params, scale)
            optimizer.step()
            scheduler.step()


def assert_bitwise_equal(model: nn.Module, other: nn.Module) -> None:
    for (name, value), expected in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(value, expected), name


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: f"{spec.name}-{spec.schedule}")
@pytest.mark.parametrize("foreach", [True, False])
def test_three_partitions_equal_plain_torch_on_the_whole(spec: OptimSpec, foreach: bool) -> None:
    model = make_model()
    whole = copy.deepcopy(model)
    plain = plain_optimizer(spec, whole)
    plain.param_groups[0]["foreach"] = foreach
    for step in range(8):
        plain.param_groups[0]["lr"] = spec.lr * learning_rate_factor(spec)(step)
        set_gradients(whole, step)
        plain.step()
    train_split(spec, model, steps=8)
    assert_bitwise_equal(model, whole)


@pytest.mark.parametrize("spec", CLIPPED, ids=lambda spec: spec.name)
def test_clipping_three_partitions_equals_torch_s_clipping_of_the_whole(spec: OptimSpec) -> None:
    model = make_model()
    whole = copy.deepcopy(model)
    plain = plain_optimizer(spec, whole)
    for step in range(5):
        set_gradients(whole, step)
        assert nn.utils.clip_grad_norm_(whole.parameters(), spec.clip_norm or 0.0) > (spec.clip_norm or 0.0)
        plain.step()
    train_split(spec, model, steps=5)
    for param, expected in zip(model.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(param, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("spec", CLIPPED, ids=lambda spec: spec.name)
def test_clipping_three_partitions_equals_one_process_bitwise(spec: OptimSpec) -> None:
    model = make_model()
    whole = copy.deepcopy(model)
    partitions = [list(whole[a:b].parameters()) for a, b in ((0, 1), (1, 4), (4, 5))]
    optimizer, scheduler = build_optimizer(spec, whole.parameters())
    for step in range(5):
        set_gradients(whole, step)
        apply_scale(whole.parameters(), clip_scale(sum(map(grad_norm_sq, partitions)), spec.clip_norm))
        optimizer.step()
        scheduler.step()
    train_split(spec, model, steps=5)
    assert_bitwise_equal(model, whole)


def test_where_a_model_is_cut_hardly_moves_the_norm() -> None:
    model = make_model()
    set_gradients(model, 0)
    params = list(model.parameters())
    whole = grad_norm_sq(params)
    for cut in range(len(params) + 1):
        assert math.isclose(grad_norm_sq(params[:cut]) + grad_norm_sq(params[cut:]), whole, rel_tol=1e-14)


def test_gradients_within_the_norm_are_left_as_they_are() -> None:
    assert clip_scale(0.25, 1.0) is None
    assert clip_scale(100.0, None) is None
    param = nn.Parameter(torch.ones(3))
    param.grad = torch.full((3,), 0.1)
    apply_scale([param], None)
    assert torch.equal(param.grad, torch.full((3,), 0.1))


@pytest.mark.parametrize("norm_sq", [math.inf, math.nan])
def test_a_norm_that_is_no_number_shows_in_the_scale(norm_sq: float) -> None:
    assert math.isnan(clip_scale(norm_sq, 1.0) or 0.0)


@given(st.floats(0, 1e30), st.floats(1e-6, 1e6))
def test_a_scale_never_enlarges_and_brings_the_norm_down(norm_sq: float, max_norm: float) -> None:
    scale = clip_scale(norm_sq, max_norm)
    if scale is None:
        assert math.sqrt(norm_sq) <= max_norm
    else:
        assert 0 < scale < 1
        assert scale * math.sqrt(norm_sq) <= max_norm * (1 + 1e-15)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_partition_without_parameters_trains(name: str) -> None:
    optimizer, scheduler = build_optimizer(OptimSpec(name=name), [])
    optimizer.zero_grad()
    optimizer.step()
    scheduler.step()
    assert optimizer.param_groups[0]["params"] == []
    assert grad_norm_sq([]) == 0.0


def test_parameters_without_a_gradient_are_passed_over() -> None:
    param = nn.Parameter(torch.ones(3))
    apply_scale([param], 0.5)
    assert param.grad is None
    assert grad_norm_sq([param]) == 0.0


def test_optimizer_and_schedule_continue_from_their_state() -> None:
    spec = SPECS[2]
    model = make_model()
    reference = copy.deepcopy(model)
    optimizer, scheduler = build_optimizer(spec, model.parameters())
    reference_optimizer, reference_scheduler = build_optimizer(spec, reference.parameters())
    for step in range(6):
        if step == 3:
            states = copy.deepcopy((optimizer.state_dict(), scheduler.state_dict()))
            optimizer, scheduler = build_optimizer(spec, model.parameters())
            optimizer.load_state_dict(states[0])
            scheduler.load_state_dict(states[1])
        set_gradients(model, step)
        set_gradients(reference, step)
        for stepped in (optimizer, reference_optimizer, scheduler, reference_scheduler):
            stepped.step()
    assert_bitwise_equal(model, reference)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_schedule_warms_up_peaks_and_ends_where_it_says(schedule: str) -> None:
    spec = OptimSpec(lr=2.0, schedule=schedule, warmup_steps=4, total_steps=10, end_lr=0.5, power=3)
    rates = [spec.lr * learning_rate_factor(spec)(step) for step in range(13)]
    assert rates[:5] == [0.5, 1.0, 1.5, 2.0, 2.0]
    assert all(later <= earlier for earlier, later in pairwise(rates[4:]))
    assert rates[10:] == pytest.approx([2.0 if schedule == "constant" else 0.5] * 3)


def test_linear_and_cosine_meet_in_the_middle() -> None:
    factors = {
        name: learning_rate_factor(OptimSpec(schedule=name, total_steps=8))(4)
        for name in ("linear", "cosine")
    }
    assert factors == {"linear": pytest.approx(0.5), "cosine": pytest.approx(0.5)}


@pytest.mark.parametrize("spec", SPECS + CLIPPED)
def test_a_spec_comes_back_from_plain_values(spec: OptimSpec) -> None:
    assert OptimSpec.from_map(json.loads(json.dumps(spec.to_map()))) == spec


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"name": "adam"}, "there is no optimizer 'adam': use sgd, adamw"),
        ({"schedule": "step"}, "there is no schedule 'step': use constant, linear, cosine, polynomial"),
        ({"lr": 0.0}, "learning rate must be above 0, not 0.0"),
        ({"lr": math.inf}, "learning rate must be above 0, not inf"),
        ({"lr": math.nan}, "learning rate must be above 0, not nan"),
        ({"momentum": 1.0}, "momentum must be from 0 to below 1"),
        ({"weight_decay": -1.0}, "weight decay must be 0 or more"),
        ({"betas": [0.9, 1.0]}, "second beta must be from 0 to below 1"),
        ({"eps": 0.0}, "eps must be above 0"),
        ({"clip_norm": 0.0}, "norm to clip to must be above 0"),
        ({"end_lr": 1.0}, "last learning rate must be from 0 to the learning rate"),
        ({"warmup_steps": -1}, "warm-up steps must be 0 or more"),
        ({"schedule": "cosine", "warmup_steps": 3, "total_steps": 3}, "steps in all must be 4 or more"),
        ({"lr": "fast"}, "lr must be a number, not 'fast'"),
        ({"lr": True}, "lr must be a number, not 'True'"),
        ({"lr": 10**400}, "lr must be a number"),
        ({"betas": 0.9}, "betas must be two numbers"),
        ({"warmup_steps": 1.5}, "warmup_steps must be a whole number"),
        ({"warmup_steps": 10**400}, "warmup_steps must be a whole number"),
        ({"name": 3}, "name must be text"),
        ({"nesterov": True}, "missing or unknown fields: nesterov"),
    ],
)
def test_a_wrong_spec_is_refused_in_one_line(change: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UserError) as caught:
        OptimSpec.from_map(OptimSpec().to_map() | change)
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3),
)


@given(st.sampled_from(sorted(OptimSpec().to_map())), PLAIN)
def test_any_value_of_any_field_builds_or_is_refused(field: str, value: object) -> None:
    try:
        spec = OptimSpec.from_map(OptimSpec().to_map() | {field: value})
    except UserError:
        return
    assert learning_rate_factor(spec)(0) > 0


@pytest.mark.parametrize("values", [None, [], {}, {"name": "sgd"}])
def test_settings_that_are_no_whole_map_are_refused(values: object) -> None:
    with pytest.raises(UserError, match=r"map|missing"):
        OptimSpec.from_map(values)

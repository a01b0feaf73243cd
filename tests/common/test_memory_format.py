"""Choosing the memory format: by measurement, by name, and without a trace on what training sees."""

import copy

import pytest
import torch
from torch import Tensor, nn

from common import memory_format
from common.memory_format import FORMATS, choose_memory_format, faster_format


class Clock:
    """A clock that runs only when told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 0.0
        monkeypatch.setattr(memory_format.time, "perf_counter", lambda: self.now_s)


@pytest.mark.parametrize("faster", list(FORMATS))
def test_the_faster_format_is_chosen(faster: str, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)

    def run(given: torch.memory_format) -> None:
        clock.now_s += 0.1 if given is FORMATS[faster] else 0.2

    choice = faster_format(run)
    assert choice.name == faster
    assert choice.format is FORMATS[faster]
    assert choice.seconds[faster] == pytest.approx(0.1)


def test_one_slow_moment_does_not_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    calls: list[torch.memory_format] = []

    def run(given: torch.memory_format) -> None:
        calls.append(given)
        disturbed = len(calls) in (2, 4)
        clock.now_s += 5.0 if disturbed else 0.1 if given is torch.channels_last else 0.2

    assert faster_format(run, budget_s=20.0).name == "channels_last"


def test_the_budget_ends_the_measurement_after_one_round_at_least(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    calls: list[torch.memory_format] = []

    def run(given: torch.memory_format) -> None:
        calls.append(given)
        clock.now_s += 10.0

    faster_format(run, budget_s=1.0)
    assert calls == [*FORMATS.values()] * 2


class Tail(nn.Module):
    """A stage with convolution, BatchNorm and dropout, that takes and returns a tuple and a mask beside."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.drop = nn.Dropout()

    def forward(self, image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        return self.drop(self.norm(self.conv(image))), mask


def test_measuring_leaves_no_trace() -> None:
    torch.manual_seed(0)
    stage = Tail().eval()
    before = copy.deepcopy(stage.state_dict())
    image, mask = torch.randn(6, 3, 8, 8), torch.ones(6, dtype=torch.int64)
    random_state = torch.get_rng_state()
    choice = choose_memory_format(stage, [image, mask], budget_s=0.0)
    assert choice.name in FORMATS
    assert set(choice.seconds) == set(FORMATS)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert not stage.training
    assert all(torch.equal(value, before[name]) for name, value in stage.state_dict().items())
    assert all(param.grad is None for param in stage.parameters())
    assert not image.requires_grad
    assert stage.conv.weight.is_contiguous()


def test_a_format_asked_for_is_not_measured() -> None:
    class Untouched(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise AssertionError("must not run")

    for name in FORMATS:
        choice = choose_memory_format(Untouched(), [torch.ones(1, 3, 4, 4)], option=name)
        assert (choice.name, dict(choice.seconds)) == (name, {})


def test_text_has_nothing_to_choose() -> None:
    assert choose_memory_format(nn.Linear(3, 3), [torch.ones(2, 5, 3)]).name == "contiguous"


def test_an_unknown_format_is_refused_with_those_that_exist() -> None:
    with pytest.raises(ValueError, match="use auto, contiguous, channels_last"):
        choose_memory_format(nn.Identity(), [torch.ones(1, 3, 4, 4)], option="nhwc")


def test_a_stage_without_parameters_can_be_measured() -> None:
    choice = choose_memory_format(nn.ReLU(), [torch.ones(2, 3, 4, 4)], budget_s=0.0)
    assert set(choice.seconds) == set(FORMATS)


def test_measuring_under_autocast_computes_in_its_type() -> None:
    seen = set()

    class Spy(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            out = super().forward(x)
            seen.add(out.dtype)
            return out

    choose_memory_format(Spy(3, 4, 1), [torch.ones(2, 3, 4, 4)], autocast=torch.bfloat16, budget_s=0.0)
    assert seen == {torch.bfloat16}

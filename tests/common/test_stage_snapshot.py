"""A stage that is brought back, in this process or another, goes on as if nothing had been."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from common.bottleneck import build_pair, parse_bottleneck
from common.checkpoints import CheckpointFolder
from common.errors import UserError
from common.narrowing import narrowing_layers
from common.optim import OptimSpec
from common.propagate import TensorInfo
from common.snapshot import detached
from common.stage import Stage
from tests.common.test_stage import assert_same, made

pytestmark = pytest.mark.usefixtures("one_thread")

SGD = OptimSpec(name="sgd", lr=0.05, momentum=0.9, weight_decay=0.01, clip_norm=1.0)
ADAMW = OptimSpec(name="adamw", lr=0.01, schedule="linear", warmup_steps=2, total_steps=20)
DECAY = "decay:rate=0.8,steps=2,iterations=3,l1=0.01"  # 20, 16, 12, 9 from steps 0, 2, 4, 6
BOTH = "decay:rate=0.8,rate2=0.5,steps=2,iterations=2"
CHUNKS = 3


class Normed(nn.Module):
    """Convolution, normalisation, dropout, a frozen weight, one that nothing uses, and a passing buffer."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.dropout = nn.Dropout(0.3)
        self.frozen = nn.Parameter(torch.ones(4, 1, 1), requires_grad=False)
        self.unused = nn.Parameter(torch.ones(3))
        self.register_buffer("calls", torch.zeros(()), persistent=False)

    def forward(self, x):
        if self.training:
            self.calls += 1
        return (self.dropout(self.norm(self.conv(x))) * self.frozen * (1 + self.calls / 8),)


class Narrow(nn.Module):
    """Narrowing layers, down and up again."""

    def __init__(self, text):
        super().__init__()
        pair = build_pair(1, TensorInfo(name="tokens", shape=(10, 20)), parse_bottleneck(text), seed=0)
        self.down, self.up = pair.encoder, pair.decoder

    def forward(self, x):
        return (self.up(torch.tanh(self.down(x))),)


CASES = {
    "norm": (Normed, (2, 5, 5), (4, 5, 5)),
    "decay": (lambda: Narrow(DECAY), (10, 20), (10, 20)),
    "both axes": (lambda: Narrow(BOTH), (10, 20), (10, 20)),
}
OPTIMS = {"sgd": SGD, "adamw": ADAMW}
every_case = pytest.mark.parametrize("case", CASES)
every_optim = pytest.mark.parametrize("optim", OPTIMS.values(), ids=OPTIMS)
every_format = pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])


def fresh(case, optim, memory_format=torch.contiguous_format):
    return Stage(
        made(CASES[case][0]), "middle", seed=11, needs_grad=(True,), optim=optim, memory_format=memory_format
    )


def run_chunks(stage, case, step, chunks=CHUNKS):
    """A step's chunks, forward and backward; returns what came out."""
    _, inputs, outputs = CASES[case]
    drawn = torch.Generator().manual_seed(step)
    stage.begin_step()
    out = []
    for chunk in range(chunks):
        out.append(stage.forward(step, chunk, (torch.randn(2, *inputs, generator=drawn),)))
        out.append(stage.backward(chunk, (torch.randn(2, *outputs, generator=drawn),)))
    return out


def run_steps(stage, case, steps):
    out = []
    for step in steps:
        out.append((run_chunks(stage, case, step), stage.grad_norm_sq(), stage.learning_rate))
        stage.commit(0.5)
    return out


def through_file(folder, state):
    """A state after its way through a file."""
    CheckpointFolder(folder).write(1, detached(state), {})
    return CheckpointFolder(folder).read(1)[0]


def everything(stage):
    """All that a stage holds, copied."""
    gradients = {name: p.grad for name, p in stage.partition.named_parameters()}
    return detached([stage.snapshot(), gradients])


@every_case
@every_optim
@every_format
def test_training_goes_on_from_a_checkpoint_as_without_it(tmp_path, case, optim, memory_format):
    straight = fresh(case, optim, memory_format)
    run_steps(straight, case, range(3))
    kept = through_file(tmp_path, straight.snapshot())
    assert_same(kept, detached(straight.snapshot()))
    back = fresh(case, optim, memory_format)
    back.restore(kept)
    assert_same(everything(back), everything(straight))
    for ours, theirs in zip(back.partition.parameters(), straight.partition.parameters(), strict=True):
        assert ours.stride() == theirs.stride()
    assert_same(run_steps(back, case, range(3, 8)), run_steps(straight, case, range(3, 8)))
    assert_same(everything(back), everything(straight))


@settings(deadline=None, max_examples=25)
@given(
    case=st.sampled_from(list(CASES)),
    optim=st.sampled_from(list(OPTIMS.values())),
    kept_at=st.integers(0, 7),
    left_at=st.integers(0, 7),
    chunks_under_way=st.integers(0, CHUNKS),
)
def test_a_stage_goes_back_and_forth_whatever_its_width_is_and_what_is_under_way(
    case, optim, kept_at, left_at, chunks_under_way
):
    straight, other = fresh(case, optim), fresh(case, optim)
    run_steps(straight, case, range(kept_at))
    kept = detached(straight.snapshot())
    run_steps(other, case, range(left_at))
    run_chunks(other, case, left_at, chunks_under_way)
    if chunks_under_way:
        other.forward(left_at, chunks_under_way, (torch.ones(2, *CASES[case][1]),))
    known = list(other.partition.parameters())
    other.restore(kept)
    assert all(ours is before for ours, before in zip(other.partition.parameters(), known, strict=True))
    assert other.chunks_in_flight == 0
    assert_same(everything(other), everything(straight))
    other.rollback()
    assert_same(run_steps(other, case, range(kept_at, 8)), run_steps(straight, case, range(kept_at, 8)))
    assert_same(everything(other), everything(straight))


@every_case
def test_a_state_can_be_restored_twice_for_it_is_copied(case):
    stage = fresh(case, ADAMW)
    run_steps(stage, case, range(3))
    kept = detached(stage.snapshot())
    untouched = detached(kept)
    first = run_steps(stage, case, range(3, 6))
    stage.restore(kept)
    second = run_steps(stage, case, range(3, 6))
    stage.restore(kept)
    assert_same(kept, untouched)
    assert_same(run_steps(stage, case, range(3, 6)), second)
    assert_same(first, second)


@every_case
@every_optim
def test_a_snapshot_during_a_step_is_that_of_its_beginning(case, optim):
    stage = fresh(case, optim)
    run_steps(stage, case, range(2))
    before = detached(stage.snapshot())
    run_chunks(stage, case, 2)
    assert_same(detached(stage.snapshot()), before)
    stage.rollback()
    assert_same(detached(stage.snapshot()), before)


def test_a_layer_that_is_used_under_two_names_comes_back_as_one():
    def shared():
        norm = nn.BatchNorm2d(2)
        module = nn.Sequential(nn.Conv2d(2, 2, 1), norm, nn.Conv2d(2, 2, 1), norm)
        module.forward = lambda x: (nn.Sequential.forward(module, x),)
        return Stage(made(lambda: module), "middle", seed=1, needs_grad=(True,), optim=SGD)

    stage, back = shared(), shared()
    for step in range(2):
        before = everything(stage)
        stage.begin_step()
        stage.forward(step, 0, (torch.arange(16.0).view(2, 2, 2, 2),))
        stage.backward(0, (torch.arange(16.0).view(2, 2, 2, 2).square(),))
        kept = detached(stage.snapshot())
        back.restore(kept)
        assert_same(everything(back), before)
        back.restore_pending(detached(stage.pending()))
        for one in (stage, back):
            one.commit()
        assert_same(everything(back), everything(stage))


def test_the_narrow_side_comes_back_in_the_checkpoint_s_width():
    widths = []
    narrow, wide = fresh("decay", SGD), fresh("decay", SGD)
    run_steps(narrow, "decay", range(5))
    kept = [detached(stage.snapshot()) for stage in (wide, narrow, wide)]
    for state in kept:
        wide.restore(state)
        widths.append([layer.width for layer in narrowing_layers(wide.partition)])
        assert wide.optimizer.state_dict()["state"].keys() == state["optimizer"]["state"].keys()
    assert widths == [[20, 20], [12, 12], [20, 20]]


def test_buffers_that_no_state_dict_has_are_kept_too():
    stage, back = fresh("norm", SGD), fresh("norm", SGD)
    run_steps(stage, "norm", range(2))
    assert "calls" not in stage.partition.state_dict()
    back.restore(detached(stage.snapshot()))
    assert back.partition.calls == 2 * CHUNKS


# A step that has run and is not committed yet.


@every_case
@every_optim
@every_format
@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("scale", [None, 0.25])
def test_a_step_can_be_committed_where_it_did_not_run(tmp_path, case, optim, memory_format, steps, scale):
    straight = fresh(case, optim, memory_format)
    run_steps(straight, case, range(steps))
    run_chunks(straight, case, steps)
    kept = through_file(tmp_path, {"before": straight.snapshot(), "pending": straight.pending()})
    back = fresh(case, optim, memory_format)
    back.restore(kept["before"])
    back.restore_pending(kept["pending"])
    assert back.grad_norm_sq() == straight.grad_norm_sq()
    assert_same(everything(back), everything(straight))
    for stage in (straight, back):
        stage.commit(scale)
    assert_same(everything(back), everything(straight))
    later = range(steps + 1, steps + 5)
    assert_same(run_steps(back, case, later), run_steps(straight, case, later))
    assert_same(everything(back), everything(straight))


@every_case
def test_a_step_can_be_undone_where_it_did_not_run(case):
    straight = fresh(case, SGD)
    run_steps(straight, case, range(3))
    before = everything(straight)
    run_chunks(straight, case, 3)
    kept = detached([straight.snapshot(), straight.pending()])
    back = fresh(case, SGD)
    back.restore(kept[0])
    back.restore_pending(kept[1])
    back.rollback()
    assert_same(everything(back), before)


def test_a_pending_step_can_be_restored_twice_for_it_is_copied():
    stage = fresh("norm", SGD)
    before = detached(stage.snapshot())
    run_chunks(stage, "norm", 0)
    pending = detached(stage.pending())
    results = []
    for _ in range(2):
        stage.restore(before)
        stage.restore_pending(pending)
        stage.commit(0.5)
        results.append(everything(stage))
    assert_same(*results)


def test_a_step_with_chunks_in_flight_is_not_pending():
    stage = fresh("norm", SGD)
    stage.begin_step()
    stage.forward(0, 0, (torch.ones(2, 2, 5, 5),))
    with pytest.raises(AssertionError, match="1 chunks are still in flight"):
        stage.pending()


# What does not fit.


def other_optim(state):
    state["optimizer"]["param_groups"][0]["params"].append(99)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda state: state.pop("optimizer"),
        lambda state: state.update(partition=3),
        lambda state: state["partition"].pop("conv.weight"),
        lambda state: state["partition"].pop("calls"),
        lambda state: state["partition"].update(more=torch.ones(1)),
        lambda state: state["partition"].update({"conv.weight": torch.ones(1)}),
        lambda state: state["partition"].update({"norm.running_mean": torch.ones(5)}),
        other_optim,
    ],
)
def test_the_state_of_another_partition_is_refused_in_a_line(spoil):
    stage = fresh("norm", SGD)
    run_steps(stage, "norm", range(1))
    good = detached(stage.snapshot())
    state = detached(good)
    spoil(state)
    with pytest.raises(UserError, match="what was kept of the middle does not fit it: ") as refused:
        stage.restore(state)
    assert "\n" not in str(refused.value)
    stage.restore(good)
    assert_same(detached(stage.snapshot()), good)


@pytest.mark.parametrize(
    "pending",
    [
        {},
        {"buffers": {"else": torch.ones(1)}, "gradients": {}},
        {"buffers": {}, "gradients": {"else": torch.ones(1)}},
        {"buffers": {}, "gradients": {"conv.weight": torch.ones(1)}},
    ],
)
def test_the_pending_step_of_another_partition_is_refused_in_a_line(pending):
    stage = fresh("norm", SGD)
    with pytest.raises(UserError, match="what was kept of the middle does not fit it: "):
        stage.restore_pending(pending)

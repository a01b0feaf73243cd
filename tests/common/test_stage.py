"""A stage: chunks in any interleaving equal a plain loop bitwise, and a step is applied or undone as a whole."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from common.optim import OptimSpec
from common.seeding import derive_seed
from common.stage import Stage, seeded

pytestmark = pytest.mark.usefixtures("one_thread")

SGD = OptimSpec(name="sgd", lr=0.1, momentum=0.9, weight_decay=0.01)
ADAMW = OptimSpec(name="adamw", lr=0.01, schedule="linear", warmup_steps=2, total_steps=10)
CHUNKS = 4


class Part(nn.Module):
    """Convolution, normalisation and dropout; also passes a mask on, as text models do."""

    def __init__(self, dropout=0.5):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, mask):
        return self.dropout(self.norm(self.conv(x))) * mask.view(-1, 1, 1, 1), mask


class Linear(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x):
        return (self.layer(x),)


def generator(seed=1):
    return torch.Generator().manual_seed(seed)


def made(module, *arguments):
    with seeded(5, torch.device("cpu")):
        return module(*arguments)


def stage_of(module, part="middle", optim=SGD, needs_grad=(True, False), **options):
    return Stage(module, part, seed=11, needs_grad=needs_grad, optim=optim, **options)


def chunks(step=0):
    """Inputs of the chunks of a step, the last one smaller, and gradients of their outputs."""
    drawn = generator(step)
    sizes = [3] * (CHUNKS - 1) + [2]
    return [
        (
            (torch.randn(size, 2, 5, 5, generator=drawn), torch.arange(size) % 2 + 1),
            (torch.randn(size, 4, 5, 5, generator=drawn), None),
        )
        for size in sizes
    ]


def run_step(stage, step, order="F0 B0 F1 B1 F2 B2 F3 B3"):
    """Run one step's chunks in an order; returns outputs and input gradients by chunk."""
    given_to = chunks(step)
    outputs, gradients = {}, {}
    for word in order.split():
        chunk = int(word[1:])
        inputs, back = given_to[chunk]
        if word[0] == "F":
            outputs[chunk] = stage.forward(step, chunk, inputs)
        else:
            gradients[chunk] = stage.backward(chunk, back)
    return outputs, gradients


def state_of(stage):
    """Everything that a step may change, copied."""
    return copy.deepcopy(
        {
            "weights": stage.partition.state_dict(),
            "gradients": {name: p.grad for name, p in stage.partition.named_parameters()},
            "optimizer": stage.optimizer.state_dict(),
            "scheduler": stage.scheduler.state_dict(),
        }
    )


def assert_same(ours, theirs, where="state"):
    assert type(ours) is type(theirs), where
    if isinstance(ours, torch.Tensor):
        assert torch.equal(ours, theirs), where
    elif isinstance(ours, dict):
        assert ours.keys() == theirs.keys(), where
        for key in ours:
            assert_same(ours[key], theirs[key], f"{where}.{key}")
    elif isinstance(ours, list | tuple):
        assert len(ours) == len(theirs), where
        for index, pair in enumerate(zip(ours, theirs, strict=True)):
            assert_same(*pair, f"{where}[{index}]")
    else:
        assert ours == theirs, where


@st.composite
def interleavings(draw):
    """Any order in which forwards and backwards each keep chunk order, and a backward follows its forward."""
    order, forwards, backwards = [], 0, 0
    while backwards < CHUNKS:
        can_go_forward = forwards < CHUNKS
        if can_go_forward and (backwards == forwards or draw(st.booleans())):
            order.append(f"F{forwards}")
            forwards += 1
        else:
            order.append(f"B{backwards}")
            backwards += 1
    return " ".join(order)


@settings(deadline=None, max_examples=25)
@given(order=interleavings(), optim=st.sampled_from([SGD, ADAMW]))
def test_any_interleaving_of_chunks_equals_a_plain_loop_bitwise(order, optim):
    results = []
    for in_order in ("F0 B0 F1 B1 F2 B2 F3 B3", order):
        stage, steps = stage_of(made(Part), optim=optim), []
        for step in (1, 2):
            stage.begin_step()
            steps.append((run_step(stage, step, in_order), stage.grad_norm_sq()))
            stage.commit(0.5)
        results.append((steps, state_of(stage)))
    plain, interleaved = results
    assert_same(plain, interleaved)


@pytest.mark.parametrize("optim", [SGD, ADAMW], ids=["sgd", "adamw"])
def test_a_stage_trains_as_plain_torch_does(optim):
    module = made(Part, 0.0)
    reference = copy.deepcopy(module)
    stage = stage_of(module, optim=optim)
    plain = (
        torch.optim.SGD(reference.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
        if optim is SGD
        else torch.optim.AdamW(reference.parameters(), lr=0.01, weight_decay=0)
    )
    for step in (1, 2, 3):
        if optim is ADAMW:  # half of the rate, then all of it
            plain.param_groups[0]["lr"] = 0.01 * (0.5, 1.0, 1.0)[step - 1]
        assert stage.learning_rate == plain.param_groups[0]["lr"]
        stage.begin_step()
        outputs, gradients = run_step(stage, step)
        plain.zero_grad()
        for chunk, ((x, mask), (back, _)) in enumerate(chunks(step)):
            x.requires_grad_()
            out, same_mask = reference(x, mask)
            out.backward(back)
            assert torch.equal(outputs[chunk][0], out)
            assert torch.equal(outputs[chunk][1], same_mask)
            assert torch.equal(gradients[chunk][0], x.grad)
            assert gradients[chunk][1] is None
        stage.commit()
        plain.step()
        assert_same(stage.partition.state_dict(), reference.state_dict())


@settings(deadline=None, max_examples=20)
@given(order=interleavings(), ends_at=st.integers(0, 2 * CHUNKS), optim=st.sampled_from([SGD, ADAMW]))
def test_a_step_undone_anywhere_leaves_everything_as_it_was(order, ends_at, optim):
    stage, undisturbed = (stage_of(made(Part), optim=optim) for _ in range(2))
    for one in (stage, undisturbed):
        one.begin_step()
        run_step(one, 1)
        one.commit()
    before = state_of(stage)
    stage.begin_step()
    run_step(stage, 2, " ".join(order.split()[:ends_at]))
    stage.rollback()
    assert stage.chunks_in_flight == 0
    assert_same(state_of(stage), before)
    # And the step made again, or the next one, is that of a run in which nothing happened.
    for one in (stage, undisturbed):
        one.begin_step()
        run_step(one, 2)
        one.commit()
    assert_same(state_of(stage), state_of(undisturbed))


def test_running_statistics_move_with_the_step_and_go_back_with_it():
    stage = stage_of(made(Part))
    norm = stage.partition.norm
    stage.begin_step()
    run_step(stage, 1)
    assert norm.num_batches_tracked == CHUNKS
    assert norm.running_mean.abs().sum() > 0
    stage.rollback()
    assert norm.num_batches_tracked == 0
    assert norm.running_mean.abs().sum() == 0
    assert (norm.running_var == 1).all()


class Masked(Part):
    """Keeps an infinity, as models with attention masks do."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mask", torch.tensor([0.0, -torch.inf]))


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_statistics_that_overflow_show_in_the_norm_and_go_back(value):
    stage = stage_of(made(Masked))
    before = state_of(stage)
    stage.begin_step()
    run_step(stage, 1)
    assert math.isfinite(stage.grad_norm_sq())
    stage.partition.norm.running_var[1] = value
    assert math.isnan(stage.grad_norm_sq())
    stage.rollback()
    assert_same(state_of(stage), before)


def test_a_committed_step_cannot_be_undone():
    stage = stage_of(made(Part))
    stage.begin_step()
    run_step(stage, 1)
    stage.commit()
    after = state_of(stage)
    stage.rollback()
    assert_same(state_of(stage), after)


def test_a_rollback_outside_a_step_is_harmless_and_can_be_repeated():
    stage = stage_of(made(Part))
    before = state_of(stage)
    stage.rollback()
    stage.rollback()
    assert_same(state_of(stage), before)


def test_a_step_needs_an_end_of_its_chunks():
    stage = stage_of(made(Part))
    stage.begin_step()
    run_step(stage, 1, "F0 F1 B0")
    assert stage.chunks_in_flight == 1
    with pytest.raises(AssertionError, match="1 chunks are still in flight"):
        stage.commit()
    with pytest.raises(AssertionError, match="1 chunks are still in flight"):
        stage.begin_step()


def test_a_chunk_goes_backward_once_and_only_after_its_forward():
    stage = stage_of(made(Part))
    stage.begin_step()
    with pytest.raises(KeyError):
        run_step(stage, 1, "B0")
    with pytest.raises(KeyError):
        run_step(stage, 1, "F0 B0 B0")


# ---- random numbers ----


def dropped(stage, step, chunk):
    """Which values a dropout of the stage drops."""
    (out,) = stage.forward(step, chunk, (torch.ones(64),))
    return out == 0


class Dropping(nn.Module):
    def __init__(self):
        super().__init__()
        self.dropout = nn.Dropout(0.5)

    def forward(self, x):
        return (self.dropout(x),)


def dropping(part="middle", seed=11):
    stage = Stage(Dropping(), part, seed=seed, needs_grad=(False,), optim=SGD)
    stage.begin_step()
    return stage


@settings(deadline=None, max_examples=30)
@given(
    before=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=4),
    drawn_elsewhere=st.integers(0, 5),
)
def test_dropout_depends_on_step_and_chunk_and_not_on_what_ran_before(before, drawn_elsewhere):
    fresh, used = dropping(), dropping()
    for step, chunk in before:
        dropped(used, step, chunk)
    with torch.random.fork_rng():
        torch.rand(drawn_elsewhere)
        assert torch.equal(dropped(fresh, 2, 1), dropped(used, 2, 1))


def test_seed_step_chunk_and_part_each_draw_other_numbers():
    masks = [
        dropped(dropping(), 1, 1),
        dropped(dropping(seed=12), 1, 1),
        dropped(dropping(), 2, 1),
        dropped(dropping(), 1, 2),
        dropped(dropping("front"), 1, 1),
        dropped(dropping("back"), 1, 1),
    ]
    assert len({tuple(mask.tolist()) for mask in masks}) == len(masks)
    assert all(0 < mask.sum() < 64 for mask in masks)


def test_dropout_draws_what_torch_does_with_the_derived_seed():
    with seeded(derive_seed(11, 3, 2, "middle"), torch.device("cpu")):
        expected = nn.functional.dropout(torch.ones(64), 0.5)
    assert torch.equal(dropping().forward(3, 2, (torch.ones(64),))[0], expected)


def test_the_default_generator_is_left_as_it_was():
    before = torch.get_rng_state()
    dropped(dropping(), 1, 1)
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(RuntimeError, match="size"), seeded(1, torch.device("cpu")):
        torch.rand(3) + torch.rand(4)
    assert torch.equal(torch.get_rng_state(), before)


# ---- evaluation ----


def test_an_evaluation_changes_nothing_and_does_not_drop():
    stage = stage_of(made(Part))
    stage.begin_step()
    run_step(stage, 1)
    stage.commit()
    before, rng = state_of(stage), torch.get_rng_state()
    inputs = chunks()[0][0]
    first, second = stage.evaluate(inputs), stage.evaluate(inputs)
    assert_same(first, second)
    assert not first[0].requires_grad
    assert stage.chunks_in_flight == 0
    assert_same(state_of(stage), before)
    assert torch.equal(torch.get_rng_state(), rng)
    reference = copy.deepcopy(stage.partition).eval()
    assert torch.equal(first[0], reference(*inputs)[0])


def test_a_step_after_an_evaluation_trains_again():
    evaluated, plain = stage_of(made(Part)), stage_of(made(Part))
    evaluated.evaluate(chunks()[0][0])
    for stage in (evaluated, plain):
        stage.begin_step()
        run_step(stage, 1)
        stage.commit()
    assert_same(state_of(evaluated), state_of(plain))


def test_a_stage_that_only_evaluates_needs_no_optimizer():
    stage = stage_of(made(Part), optim=None)
    assert stage.evaluate(chunks()[0][0])[0].shape == (3, 4, 5, 5)


# ---- gradients ----


def test_outputs_are_detached_and_inputs_are_left_alone():
    stage = stage_of(made(Part))
    stage.begin_step()
    x, mask = chunks()[0][0]
    outputs = stage.forward(1, 0, (x, mask))
    assert not any(out.requires_grad for out in outputs)
    assert not x.requires_grad


class Ignoring(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x, _ignored):
        return (self.layer(x),)


def test_an_input_whose_path_to_the_loss_is_cut_has_a_gradient_of_zeros():
    stage = stage_of(made(Ignoring), needs_grad=(True, True))
    stage.begin_step()
    stage.forward(1, 0, (torch.ones(2, 3), torch.ones(2, 5)))
    _, ignored = stage.backward(0, (torch.ones(2, 3),))
    assert torch.equal(ignored, torch.zeros(2, 5))


def test_a_front_needs_no_gradient_of_its_images_and_still_trains():
    stage = stage_of(made(Linear), "front", needs_grad=(False,))
    stage.begin_step()
    stage.forward(1, 0, (torch.ones(2, 3),))
    assert stage.backward(0, (torch.ones(2, 3),)) == (None,)
    assert stage.grad_norm_sq() > 0


def test_gradients_of_chunks_add_up():
    stage = stage_of(made(Linear), needs_grad=(True,))
    stage.begin_step()
    for chunk in range(3):
        stage.forward(1, chunk, (torch.ones(2, 3),))
        stage.backward(chunk, (torch.ones(2, 3),))
    assert torch.equal(stage.partition.layer.bias.grad, torch.full((3,), 6.0))
    assert stage.grad_norm_sq() == 3 * 36 + 9 * 36


@pytest.mark.parametrize("scale", [0.25, 1.0, None])
def test_a_commit_scales_the_gradients_that_it_applies(scale):
    stage = stage_of(made(Linear), needs_grad=(True,), optim=OptimSpec(name="sgd", lr=1.0))
    before = stage.partition.layer.bias.detach().clone()
    stage.begin_step()
    stage.forward(1, 0, (torch.ones(2, 3),))
    stage.backward(0, (torch.ones(2, 3),))
    stage.commit(scale)
    moved = before - stage.partition.layer.bias
    assert torch.allclose(moved, torch.full((3,), 2.0 * (1.0 if scale is None else scale)))
    assert stage.partition.layer.bias.grad is None


def test_gradients_can_be_scaled_before_the_step_ends():
    stage = stage_of(made(Linear), needs_grad=(True,))
    stage.begin_step()
    stage.forward(1, 0, (torch.ones(2, 3),))
    stage.backward(0, (torch.ones(2, 3),))
    whole = stage.grad_norm_sq()
    stage.scale_gradients(0.5)
    assert stage.grad_norm_sq() == whole / 4


class Permuted(nn.Module):
    """Its gradient comes in channels-last order even where its input is not."""

    def forward(self, x):
        return (x.permute(0, 2, 3, 1).contiguous(),)


def test_a_gradient_keeps_the_order_in_which_it_was_made():
    stage = stage_of(Permuted(), needs_grad=(True,))
    stage.begin_step()
    stage.forward(1, 0, (torch.ones(2, 3, 4, 5),))
    (gradient,) = stage.backward(0, (torch.ones(2, 4, 5, 3),))
    assert gradient.shape == (2, 3, 4, 5)
    assert gradient.is_contiguous(memory_format=torch.channels_last)
    assert not gradient.is_contiguous()


@pytest.mark.parametrize(("part", "laid_out_anew"), [("front", True), ("middle", False), ("back", False)])
def test_only_what_enters_the_model_is_laid_out_anew(part, laid_out_anew):
    seen = []

    class Looking(nn.Module):
        def forward(self, x):
            seen.append(x.is_contiguous(memory_format=torch.channels_last))
            return (x * 1,)

    stage = stage_of(Looking(), part, needs_grad=(False,), memory_format=torch.channels_last)
    stage.begin_step()
    stage.forward(1, 0, (torch.ones(2, 3, 4, 5),))
    assert seen == [laid_out_anew]


def test_weights_are_laid_out_in_the_memory_format():
    stage = stage_of(made(Part), memory_format=torch.channels_last)
    assert stage.partition.conv.weight.is_contiguous(memory_format=torch.channels_last)


# ---- mixed precision ----


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_mixed_precision_computes_small_and_sends_fp32(amp):
    stage = stage_of(made(Linear), needs_grad=(True,), amp=amp)
    stage.begin_step()
    x = torch.randn(4, 3, generator=generator())
    (out,) = stage.forward(1, 0, (x,))
    (gradient,) = stage.backward(0, (torch.ones(4, 3),))
    assert out.dtype == gradient.dtype == stage.partition.layer.weight.grad.dtype == torch.float32
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[amp]
    reference = copy.deepcopy(stage.partition)
    with torch.autocast("cpu", dtype):
        expected = reference(x)[0].float()
    assert torch.equal(out, expected)
    assert not torch.equal(out, reference(x)[0])
    assert stage.evaluate((x,))[0].dtype == torch.float32


def test_a_frozen_partition_commits_and_gives_gradients_through():
    module = made(Linear)
    module.requires_grad_(False)
    stage = stage_of(module, needs_grad=(True,))
    stage.begin_step()
    stage.forward(1, 0, (torch.ones(2, 3),))
    (gradient,) = stage.backward(0, (torch.ones(2, 3),))
    assert torch.equal(gradient, torch.ones(2, 3) @ module.layer.weight)
    assert stage.grad_norm_sq() == 0
    stage.commit(0.5)

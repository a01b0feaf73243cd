"""The middle of a job on a CPU computes what the plain module does, and takes only what fits."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from cloud.device import Device
from cloud.middle import Middle
from common.errors import UserError
from common.model_spec import ModelSpec
from common.models import build_model, register_model
from common.optim import OptimSpec
from common.partition import image_input, split
from common.spec import JobSpec
from common.text_models import PRETRAINED, read_config
from common.weights import partition_state, state_digest
from tests.tiny_text import write_model
from wire.errors import CorruptPayload

pytestmark = pytest.mark.usefixtures("one_thread")

SIZE = 8


class Tiny(nn.Module):
    """A middle with a normalisation; a mask of the front's crosses beside the map."""

    def __init__(self, num_classes):
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.conv = nn.Conv2d(4, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.last = nn.Linear(6, num_classes)

    def forward(self, x):
        x = self.first(x)
        x = torch.relu(self.norm(self.conv(x)))
        return self.last(x.mean((2, 3)))


class Masked(Tiny):
    def forward(self, x):
        mask = x.amax(1, keepdim=True) > 0
        x = self.first(x)
        x = torch.relu(self.norm(self.conv(x * mask)))
        return self.last(x.mean((2, 3)))


register_model("tiny_of_test_middle", Tiny)
register_model("masked_of_test_middle", Masked)


def spec_of(**changes):
    settings = {
        "model": ModelSpec(name="tiny_of_test_middle", num_classes=5, image_size=SIZE),
        "cuts": ("first", "relu"),
        "optim": OptimSpec(name="sgd", lr=0.1, momentum=0.9),
        "chunks": 2,
        "chunk_size": 4,
        "memory_format": "contiguous",
    }
    return JobSpec(**{**settings, **changes})


def middle_of(**changes):
    return Middle(spec_of(**changes), Device(None))


def plain_middle():
    """The same partition, built by hand."""
    model = build_model(spec_of().model)
    return split(model, ("first", "relu"), image_input(SIZE)).middle


def drawn(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def run_step(middle, step, scale=None):
    """A step of two chunks; returns outputs, input gradients and the norm."""
    middle.stage.begin_step()
    outputs, gradients = [], []
    for chunk in (0, 1):
        outputs += middle.stage.forward(step, chunk, (drawn(4, 4, SIZE, SIZE, seed=chunk),))
    for chunk in (0, 1):
        gradients += middle.backward(chunk, (drawn(4, 6, SIZE, SIZE, seed=chunk + 2) / 100,))
    norm_sq = middle.finish_gradients()
    middle.commit(scale)
    return outputs, gradients, norm_sq


def test_it_computes_and_trains_as_the_plain_module_bitwise():
    middle, plain = middle_of(), plain_middle()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    for step, scale in ((1, None), (2, 0.5)):
        outputs, gradients, norm_sq = run_step(middle, step, scale)
        optimizer.zero_grad()
        for chunk in (0, 1):
            x = drawn(4, 4, SIZE, SIZE, seed=chunk).requires_grad_()
            (out,) = plain(x)
            out.backward(drawn(4, 6, SIZE, SIZE, seed=chunk + 2) / 100)
            assert torch.equal(outputs[chunk], out)
            assert torch.equal(gradients[chunk], x.grad)
        squares = [p.grad.double().square().sum() for p in plain.parameters()]
        assert norm_sq == pytest.approx(float(sum(squares)), rel=1e-12)
        if scale is not None:
            for parameter in plain.parameters():
                parameter.grad *= scale
        optimizer.step()
        state = middle.state()
        assert state.keys() == plain.state_dict().keys()
        assert [name for name, t in plain.state_dict().items() if not torch.equal(t, state[name])] == []


def test_a_step_undone_leaves_the_middle_as_it_was():
    middle, undisturbed = middle_of(), middle_of()
    run_step(middle, 1)
    run_step(undisturbed, 1)
    middle.stage.begin_step()
    middle.stage.forward(2, 0, (drawn(4, 4, SIZE, SIZE),))
    middle.backward(0, (drawn(4, 6, SIZE, SIZE),))
    middle.drop()
    before = undisturbed.state()
    assert all(torch.equal(tensor, before[name]) for name, tensor in middle.state().items())
    run_step(middle, 2)
    run_step(undisturbed, 2)
    after = undisturbed.state()
    assert all(torch.equal(tensor, after[name]) for name, tensor in middle.state().items())


# ---- weights ----


def test_weights_are_asked_for_where_the_digest_differs():
    digest = state_digest(partition_state(plain_middle()))
    assert not middle_of(digest=digest).needs_weights
    assert middle_of(digest="0" * 64).needs_weights
    assert middle_of().needs_weights


def test_loaded_weights_are_those_it_computes_with():
    middle, plain = middle_of(), plain_middle()
    state = {name: torch.full_like(tensor, 0.5) for name, tensor in plain.state_dict().items()}
    middle.load(copy.deepcopy(state))
    assert not middle.needs_weights
    plain.load_state_dict(state)
    x = drawn(2, 4, SIZE, SIZE)
    assert torch.equal(middle.stage.evaluate((x,))[0], plain.eval()(x)[0])
    assert all(torch.equal(tensor, state[name]) for name, tensor in middle.state().items())


def test_pretrained_weights_that_cannot_be_had_here_are_awaited_from_the_client(monkeypatch):
    def cannot_fetch(spec, **options):
        if spec.weights is not None:
            raise UserError("the weights could not be fetched")
        return build_model(spec, **options)

    monkeypatch.setattr("cloud.middle.build_model", cannot_fetch)
    model = replace(spec_of().model, weights="IMAGENET1K_V1")
    assert middle_of(model=model).needs_weights


def test_a_folder_of_the_servers_is_not_the_clients_to_name(tmp_path):
    name = write_model(tmp_path, weights=True)
    cuts = ("bert.encoder.layer.0.attention", "bert.encoder.layer")
    model = ModelSpec(name=name, num_classes=2, config=read_config(name), weights=PRETRAINED, tokens=16)
    state = middle_of(model=model, cuts=cuts).state()
    secret = load_file(tmp_path / "model.safetensors")
    weights = [key for key in state if key.endswith("dense.weight")]
    assert weights
    assert not any(torch.equal(state[key], secret[key]) for key in weights)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": ModelSpec(name="resnet5", num_classes=5)}, "unknown model 'resnet5'"),
        ({"cuts": ("first", "reluu")}, "unknown cut 'reluu'"),
        ({"cuts": ("relu", "first")}, "must come before"),
        ({"bottlenecks": ("conv:9999x1", "")}, "too wide"),
        ({"bottlenecks": ("", "lin")}, "unknown bottleneck 'lin'"),
    ],
)
def test_a_job_that_cannot_be_done_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        middle_of(**changes)


# ---- what crosses ----


def test_what_crosses_is_named_with_and_without_a_gradient():
    middle = middle_of(model=replace(spec_of().model, name="masked_of_test_middle"))
    for gradients, shapes in ((False, {(4, 8, 8), (1, 8, 8)}), (True, {(4, 8, 8)})):
        assert {info.shape for info in middle.crossing(1, gradients=gradients)} == shapes
        assert [info.shape for info in middle.crossing(2, gradients=gradients)] == [(6, 8, 8)]


def test_an_input_without_a_gradient_has_none():
    middle = middle_of(model=replace(spec_of().model, name="masked_of_test_middle"))
    infos = middle.crossing(1, gradients=False)
    given = [
        torch.ones(info.batched(2), dtype=info.dtype) if info.dtype == torch.bool else drawn(*info.batched(2))
        for info in infos
    ]
    middle.stage.begin_step()
    middle.stage.forward(1, 0, given)
    results = middle.backward(0, (drawn(2, 6, SIZE, SIZE),))
    assert [result is None for result in results] == [info.dtype == torch.bool for info in infos]


class Tokens(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.embed, self.mix, self.last = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, num_classes)

    def forward(self, x):
        return self.last(self.mix(self.embed(x.flatten(1, 2))).mean(1))


register_model("tokens_of_test_middle", Tokens)


def narrowing_middle(**changes):
    model = replace(spec_of().model, name="tokens_of_test_middle")
    decay = "decay:rate=0.5,steps=1,iterations=2"
    return middle_of(model=model, cuts=("embed", "mix"), bottlenecks=(decay, decay), **changes)


def test_what_crosses_narrows_with_the_steps_committed_and_never_past_the_largest():
    middle = narrowing_middle()
    assert middle.max_bytes() == 4 * 24 * 8 * 4
    for step, width in ((1, 8), (2, 4), (3, 2), (4, 2)):
        for cut in (1, 2):
            (info,) = middle.crossing(cut, gradients=True, committed=step - 1)
            assert info.shape == (24, width)
        middle.check(info, torch.zeros(4, 24, width))
        with pytest.raises(CorruptPayload, match=rf"\[4, 24, {width}\]"):
            middle.check(info, torch.zeros(4, 24, width + 1))
        middle.stage.begin_step()
        (out,) = middle.stage.forward(step, 0, (drawn(4, 24, width),))
        assert out.shape == (4, 24, width)
        middle.backward(0, (drawn(4, 24, width),))
        middle.finish_gradients()
        middle.commit(None)
        assert middle.committed == step


@pytest.mark.parametrize("amp", ["none", "fp16", "bf16"])
def test_a_middle_undone_keeps_its_width(amp):
    middle = narrowing_middle(amp=amp)
    for step in (1, 2):
        middle.stage.begin_step()
        middle.stage.forward(step, 0, (drawn(4, 24, 8),))
        middle.backward(0, (drawn(4, 24, 8),))
        middle.drop()
        assert middle.committed == 0


def test_weights_of_another_width_than_their_steps_are_refused():
    middle = narrowing_middle()
    state = {**middle.state(), "bottleneck.cut1.decoder.0.steps": torch.tensor(1)}
    with pytest.raises(CorruptPayload, match=r"the weights do not fit: .*size mismatch") as caught:
        middle.load(state)
    assert "\n" not in str(caught.value)


def test_a_job_that_begins_after_steps_begins_in_their_width():
    trained = narrowing_middle()
    trained.stage.begin_step()
    trained.stage.forward(1, 0, (drawn(4, 24, 8),))
    trained.backward(0, (drawn(4, 24, 8),))
    trained.finish_gradients()
    trained.commit(None)
    middle = narrowing_middle(committed=1)
    middle.load(trained.state())
    assert middle.committed == 1
    middle.stage.begin_step()
    assert middle.stage.forward(1, 0, (drawn(4, 24, 4),))[0].shape == (4, 24, 4)


@pytest.mark.parametrize(("committed", "after"), [(0, 1), (1, 0), (2, 3)])
def test_weights_of_other_steps_than_the_job_begins_after_are_refused(committed, after):
    state = narrowing_middle(committed=after).state()
    with pytest.raises(CorruptPayload, match="the weights "):
        narrowing_middle(committed=committed).load(state)


@pytest.mark.parametrize("batch", [1, 3, 4])
def test_any_part_of_a_chunk_fits(batch):
    middle = middle_of()
    (info,) = middle.crossing(1, gradients=False)
    middle.check(info, torch.zeros(batch, 4, SIZE, SIZE))


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(5, 4, SIZE, SIZE),  # more than a chunk
        torch.zeros(0, 4, SIZE, SIZE),
        torch.zeros(4, 4, SIZE, SIZE + 1),
        torch.zeros(4, 5, SIZE, SIZE),
        torch.zeros(4, 4, SIZE * SIZE),
        torch.zeros(4, 4, SIZE, SIZE, 1),
        torch.zeros(()),
        torch.zeros(4),
        torch.zeros(4, 4, SIZE, SIZE, dtype=torch.float16),
        torch.zeros(4, 4, SIZE, SIZE, dtype=torch.int32),
    ],
    ids=lambda tensor: f"{tensor.dtype}{list(tensor.shape)}",
)
def test_what_does_not_fit_a_chunk_is_refused_with_what_would(tensor):
    middle = middle_of()
    (info,) = middle.crossing(1, gradients=False)
    with pytest.raises(CorruptPayload) as caught:
        middle.check(info, tensor)
    assert str(list(tensor.shape)) in str(caught.value)
    assert f"torch.float32 [4, 4, {SIZE}, {SIZE}]" in str(caught.value)


def test_the_largest_tensor_of_a_chunk_is_the_larger_cut_s():
    assert middle_of().max_bytes() == 4 * 6 * SIZE * SIZE * 4


# ---- memory format and mixed precision ----


@pytest.mark.parametrize("option", ["contiguous", "channels_last", "auto"])
def test_the_memory_format_changes_neither_weights_nor_random_numbers(option):
    before = torch.get_rng_state()
    middle = middle_of(memory_format=option)
    assert middle.memory_format in (("contiguous", "channels_last") if option == "auto" else (option,))
    assert torch.equal(torch.get_rng_state(), before)
    state = middle.state()
    assert all(torch.equal(state[name], tensor) for name, tensor in plain_middle().state_dict().items())


def test_fp16_scales_the_loss_inside_and_nobody_outside_sees_it():
    """Same sums as by hand: gradients times the scale through an fp16 backward, and divided by it after."""
    middle, plain = middle_of(amp="fp16"), plain_middle()
    outputs, gradients, norm_sq = run_step(middle, 1)
    start = {name: p.detach().clone() for name, p in plain.named_parameters()}
    for chunk in (0, 1):
        x = drawn(4, 4, SIZE, SIZE, seed=chunk).requires_grad_()
        with torch.autocast("cpu", torch.float16):
            (out,) = plain(x)
        out = out.float()
        out.backward(drawn(4, 6, SIZE, SIZE, seed=chunk + 2) / 100 * 65536)
        assert torch.equal(outputs[chunk], out)
        assert torch.equal(gradients[chunk], x.grad / 65536)
    for parameter in plain.parameters():
        parameter.grad /= 65536
    assert norm_sq == pytest.approx(float(sum(p.grad.double().square().sum() for p in plain.parameters())))
    state = middle.state()
    for name, parameter in plain.named_parameters():
        assert torch.allclose(state[name], start[name] - 0.1 * parameter.grad, rtol=1e-6, atol=1e-7)


def test_fp16_keeps_gradients_that_would_underflow():
    tiny = drawn(4, 6, SIZE, SIZE) * 1e-7  # below fp16's least number, nearly all of it
    found = {}
    for amp in ("none", "fp16"):
        middle = middle_of(amp=amp)
        middle.stage.begin_step()
        middle.stage.forward(1, 0, (drawn(4, 4, SIZE, SIZE),))
        (found[amp],) = middle.backward(0, (tiny,))
    difference = (found["fp16"] - found["none"]).norm() / found["none"].norm()
    assert difference < 0.01


def test_an_fp16_overflow_shows_in_the_norm_and_halves_the_scale():
    middle = middle_of(amp="fp16")
    before = middle.state()
    gradient = torch.full((4, 6, SIZE, SIZE), 1.5)  # times 65536 is beyond fp16's greatest number
    finite = []
    while not any(finite):
        step = len(finite) + 1
        assert step <= 16, "the scale does not shrink"
        middle.stage.begin_step()
        middle.stage.forward(step, 0, (drawn(4, 4, SIZE, SIZE),))
        middle.backward(0, (gradient,))
        finite.append(math.isfinite(middle.finish_gradients()))
        if not finite[-1]:
            middle.drop()
            assert all(torch.equal(tensor, before[name]) for name, tensor in middle.state().items())
    assert not finite[0]


@pytest.mark.parametrize("amp", ["none", "bf16"])
def test_only_fp16_scales(amp):
    middle = middle_of(amp=amp)
    middle.stage.begin_step()
    middle.stage.forward(1, 0, (drawn(4, 4, SIZE, SIZE),))
    middle.backward(0, (torch.full((4, 6, SIZE, SIZE), 1e30),))
    assert math.isfinite(middle.finish_gradients())

"""The decaying pair: its width is a function of the committed steps, and so are weights, momenta and what crosses."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from common.bottleneck import KINDS, build_pair, parse_bottleneck, with_bottleneck
from common.bottleneck_start import start_from_samples
from common.decay_bottleneck import parse_decay
from common.errors import UserError
from common.narrowing import LAST, Decay, Narrowing, narrow_to, narrowing_layers
from common.optim import OptimSpec
from common.partition import image_input, split
from common.propagate import TensorInfo
from common.stage import Stage
from common.weights import partition_state

pytestmark = pytest.mark.usefixtures("one_thread")

TOKENS = TensorInfo(name="tokens", shape=(10, 20))
HIDDEN = "decay:rate=0.8,steps=2,iterations=3"  # 20, 16, 12, 9
SEQUENCE = "decay:rate=1,rate2=0.5,steps=2,iterations=2"  # 10, 5, 2
BOTH = "decay:rate=0.8,rate2=0.5,steps=2,iterations=2"
SGD = OptimSpec(name="sgd", lr=0.1, momentum=0.9)
ADAMW = OptimSpec(name="adamw", lr=0.01)


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pair_of(text, info=TOKENS):
    return build_pair(1, info, parse_bottleneck(text), seed=0)


# The width.


@pytest.mark.parametrize(
    ("rate", "iterations", "chain"),
    [
        (0.9, 9, [768, 691, 621, 558, 502, 451, 405, 364, 327, 294]),
        (0.83, 5, [768, 637, 528, 438, 363, 301]),
    ],
)
def test_width_falls_to_the_whole_part_every_so_many_steps(rate, iterations, chain):
    decay = Decay(rate=rate, steps=300, iterations=iterations)
    for times, width in enumerate(chain):
        assert {decay.width(768, 300 * times + extra) for extra in (0, 1, 299)} == {width}
    assert decay.width(768, LAST) == chain[-1]


@pytest.mark.parametrize(
    ("rates", "iterations", "published"),
    [((0.9,), 9, 0.387), ((0.83,), 5, 0.394), ((0.9, 0.95), 9, 0.244)],
)
def test_published_rates_are_those_of_the_widths_but_for_their_whole_parts(rates, iterations, published):
    """The published ones are powers; whole widths are smaller, by less than one feature for each narrowing."""
    exact, least, share = 1.0, 1.0, 1.0
    for rate, full in zip(rates, (768, 128), strict=False):
        exact *= rate**iterations
        least *= rate**iterations - sum(rate**i for i in range(iterations)) / full
        share *= Decay(rate=rate, steps=1, iterations=iterations).width(full, LAST) / full
    assert round(exact, 3) == published
    assert least < share <= exact


def test_the_last_published_rate_is_not_that_of_its_settings():
    """0.9 and 0.96, eight times, are 0.311, and 0.296 in whole widths; 0.285 is what was published."""
    assert round(0.9**8 * 0.96**8, 3) == 0.311
    widths = [Decay(rate=r, steps=1, iterations=8).width(full, LAST) for r, full in ((0.9, 768), (0.96, 128))]
    assert widths == [327, 89]


@given(
    full=st.integers(1, 5000),
    rate=st.floats(0.01, 1),
    steps=st.integers(1, 1000),
    iterations=st.integers(1, 40),
    committed=st.integers(0, 50_000),
)
def test_width_never_grows_and_the_next_one_is_the_next(full, rate, steps, iterations, committed):
    decay = Decay(rate=rate, steps=steps, iterations=iterations)
    width = decay.width(full, committed)
    times = min(committed // steps, iterations)
    assert width <= full * rate**times + 1e-9 * full
    if rate < 1:
        assert width >= full * rate**times - times
    assert decay.width(full, committed + 1) in (width, decay.next_width(full, committed))
    assert decay.width(full, committed + steps) == decay.next_width(full, committed) <= width


# What the text means.


def test_settings_are_the_published_ones_unless_given():
    options = parse_decay("")
    assert options == parse_decay("rate=0.9,steps=300,iterations=9,l1=0,rate2=1,start=identity")
    assert options.narrow_shape((128, 768), 600) == (128, 621)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("decay:0.9", "'0' at character 7 is not expected; write rate="),
        ("decay:rate=", "the end at character 12"),
        ("decay:rate=.9", "'.' at character 12"),
        ("decay:rate=0.9x,steps=3", "'x' at character 15"),
        ("decay:rate=1.5", "rate must be above 0 and at most 1, at character 12"),
        ("decay:steps=3,rate2=0", "rate2 must be above 0 and at most 1, at character 21"),
        ("decay:rate=1", "a rate of 1 narrows nothing without a rate2 below 1, at character 12"),
        ("decay:steps=0", "'0' at character 13"),
        ("decay:iterations=2.5", "'.' at character 19"),
        ("decay:l1=1e5", "'e' at character 11"),
        ("decay:lambda=1", "'l' at character 7"),
        ("decay:rate=0.9,,steps=3", "',' at character 16"),
        ("decay:start=zero", "start is identity or pca, not 'zero', at character 13"),
    ],
)
def test_a_specification_that_does_not_parse_points_at_the_character(text, message):
    with pytest.raises(UserError) as caught:
        parse_bottleneck(text)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "shape", "message"),
    [
        (HIDDEN, (3, 2), "decay leaves nothing of the tensor at cut 1, [B,3,2]; use fewer iterations"),
        (BOTH, (3, 20), "decay leaves nothing"),
        (BOTH, (20,), "a fixed length S of [B,S,H]; at cut 1 there is [B,20]"),
        (BOTH, (-1, 20), "pad all samples to one length"),
        (HIDDEN, (10, 9000), "81000000 weights"),
    ],
)
def test_a_tensor_that_it_does_not_fit_is_one_line(text, shape, message):
    with pytest.raises(UserError) as caught:
        pair_of(text, TensorInfo(name="t", shape=shape))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


# The pair.


@pytest.mark.parametrize("text", [HIDDEN, SEQUENCE, BOTH])
def test_it_starts_as_the_identity(text):
    pair, tokens = pair_of(text), drawn(3, 10, 20)
    assert pair.crossing.shape == (10, 20)
    assert torch.equal(pair.encoder(tokens), tokens)
    assert torch.equal(pair.decoder(tokens), tokens)


@pytest.mark.parametrize(
    ("text", "shapes"),
    [
        (HIDDEN, [(10, 20), (10, 16), (10, 12), (10, 9), (10, 9)]),
        (SEQUENCE, [(10, 20), (5, 20), (2, 20), (2, 20)]),
        (BOTH, [(10, 20), (5, 16), (2, 12), (2, 12)]),
    ],
)
def test_what_is_computed_between_them_narrows_and_is_what_was_announced(text, shapes):
    pair, tokens = pair_of(text), drawn(3, 10, 20)
    for times, shape in enumerate(shapes):
        for committed in (2 * times, 2 * times + 1):
            narrow_to(committed, pair.encoder, pair.decoder)
            assert pair.encoder(tokens).shape == (3, *shape) == (3, *pair.shape_after(committed))
            assert pair.encoder(tokens).is_contiguous()
            assert pair.decoder(pair.encoder(tokens)).shape == (3, 10, 20)


@pytest.mark.parametrize("text", [HIDDEN, SEQUENCE, BOTH])
def test_narrowing_is_the_same_as_dropping_the_last_of_what_crosses(text):
    pair, tokens = pair_of(text), drawn(3, 10, 20)
    for index, layer in enumerate(narrowing_layers(pair.encoder, pair.decoder)):
        layer.weight.data = drawn(*layer.weight.shape, seed=index)
        if len(layer.bias) == 20:  # that of a sequence layer also feeds the features that go
            layer.bias.data = drawn(20, seed=index)
    with torch.no_grad():
        kept = torch.zeros(3, 10, 20)
        rows, columns = pair.shape_after(3)
        kept[:, :rows, :columns] = pair.encoder(tokens)[:, :rows, :columns]
        expected = pair.decoder(kept)
        narrow_to(3, pair.encoder, pair.decoder)
        torch.testing.assert_close(pair.encoder(tokens), kept[:, :rows, :columns], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(pair.decoder(pair.encoder(tokens)), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("text", [HIDDEN, SEQUENCE, "decay:rate=0.8,rate2=0.5,steps=2,iterations=1"])
def test_turned_onto_principal_axes_it_passes_all_on_and_loses_least_when_it_narrows(text):
    """Of tokens whose spread lies in few directions, all the others go first."""
    assert KINDS["decay"].from_samples(parse_bottleneck(f"{text},start=pca"))
    tokens = drawn(400, 10, 2) @ drawn(2, 20, seed=1) + (drawn(20, seed=2) if text is HIDDEN else 0)
    tokens = torch.einsum("bsh,st->bth", tokens[:, :2], drawn(2, 10, seed=3))
    turned, plain = pair_of(f"{text},start=pca"), pair_of(text)
    KINDS["decay"].start(turned.encoder, turned.decoder, tokens)
    with torch.no_grad():
        assert not torch.allclose(turned.encoder(tokens), tokens, atol=0.1)
        torch.testing.assert_close(turned.decoder(turned.encoder(tokens)), tokens, atol=1e-3, rtol=1e-3)
        for pair in (turned, plain):
            narrow_to(LAST, pair.encoder, pair.decoder)
        torch.testing.assert_close(turned.decoder(turned.encoder(tokens)), tokens, atol=1e-3, rtol=1e-3)
        assert (plain.decoder(plain.encoder(tokens)) - tokens).abs().max() > 0.1


# In a stage.


class Middle(nn.Module):
    """A decoder, some work, an encoder."""

    def __init__(self, text):
        super().__init__()
        self.decoder, self.encoder = pair_of(text).decoder, pair_of(text).encoder
        torch.manual_seed(0)
        self.work = nn.Linear(20, 20)

    def forward(self, x):
        return (self.encoder(torch.tanh(self.work(self.decoder(x)))),)


def stage_of(text, optim=SGD):
    return Stage(Middle(text), "middle", seed=1, needs_grad=[True], optim=optim)


def shape_at(text, committed):
    return pair_of(text).shape_after(committed)


def run_chunks(stage, text, step):
    shape = shape_at(text, step - 1)
    stage.begin_step()
    for chunk in (0, 1):
        stage.forward(step, chunk, (drawn(3, *shape, seed=2 * step + chunk),))
        stage.backward(chunk, (drawn(3, *shape, seed=9 * step + chunk) / 10,))


def memory_of(stage):
    """The optimizer's tensors, by parameter name."""
    names = {parameter: name for name, parameter in stage.partition.named_parameters()}
    return {
        (names[parameter], key): value
        for parameter, entries in stage.optimizer.state.items()
        for key, value in entries.items()
        if isinstance(value, torch.Tensor) and value.dim()
    }


@pytest.mark.parametrize("text", [HIDDEN, BOTH])
@pytest.mark.parametrize("optim", [SGD, ADAMW], ids=["sgd", "adamw"])
def test_weights_and_the_optimizers_memory_of_them_narrow_together(text, optim):
    stage, untouched = stage_of(text, optim), stage_of(text, optim)
    for each in (stage, untouched):
        run_chunks(each, text, 1)
        each.commit()
        run_chunks(each, text, 2)
    untouched.optimizer.step()  # what the commit below does before it narrows
    parameters = dict(stage.partition.named_parameters())
    stage.commit()
    assert {id(p) for p in stage.partition.parameters()} == {id(p) for p in parameters.values()}
    assert stage.partition.decoder[-1].weight.shape == (20, 16)
    assert stage.partition.encoder[0].weight.shape == (16, 20)
    assert stage.partition.encoder[0].bias.shape == (16,)
    before, after = dict(untouched.partition.named_parameters()), dict(stage.partition.named_parameters())
    pairs = [(before[name], after[name]) for name in before]
    pairs += [(value, memory_of(stage)[key]) for key, value in memory_of(untouched).items()]
    assert len(pairs) > len(before)
    for wide, narrow in pairs:
        assert torch.equal(narrow, wide[tuple(slice(0, size) for size in narrow.shape)])
        assert narrow.untyped_storage().nbytes() == narrow.nbytes
    run_chunks(stage, text, 3)
    stage.commit()


@pytest.mark.parametrize("text", [HIDDEN, SEQUENCE, BOTH])
def test_a_step_undone_narrows_nothing_and_leaves_no_trace(text):
    disturbed, undisturbed = stage_of(text), stage_of(text)
    for step in range(1, 7):
        run_chunks(disturbed, text, step)
        disturbed.rollback()
        assert {layer.committed for layer in narrowing_layers(disturbed.partition)} == {step - 1}
        for stage in (disturbed, undisturbed):
            run_chunks(stage, text, step)
            stage.commit()
    assert disturbed.partition.encoder(drawn(1, 10, 20)).shape == (1, *shape_at(text, LAST))
    for name, tensor in undisturbed.partition.state_dict().items():
        assert torch.equal(tensor, disturbed.partition.state_dict()[name]), name


def test_evaluating_between_steps_takes_the_width_of_the_steps_so_far():
    stage = stage_of(HIDDEN)
    for step in range(1, 7):
        (out,) = stage.evaluate((drawn(2, *shape_at(HIDDEN, step - 1)),))
        assert out.shape == (2, *shape_at(HIDDEN, step - 1))
        run_chunks(stage, HIDDEN, step)
        stage.commit()


@pytest.mark.parametrize("optim", [SGD, ADAMW], ids=["sgd", "adamw"])
def test_a_run_that_goes_on_from_a_state_ends_as_if_it_had_never_stopped(optim):
    undisturbed = stage_of(BOTH, optim)
    for step in range(1, 4):
        run_chunks(undisturbed, BOTH, step)
        undisturbed.commit()
    resumed = stage_of(BOTH, optim)
    resumed.partition.load_state_dict(copy.deepcopy(partition_state(undisturbed.partition)), strict=True)
    resumed.optimizer.load_state_dict(copy.deepcopy(undisturbed.optimizer.state_dict()))
    for step in range(4, 7):
        for stage in (undisturbed, resumed):
            run_chunks(stage, BOTH, step)
            stage.commit()
    assert resumed.partition.encoder[0].weight.shape == (12, 20)
    for name, tensor in undisturbed.partition.state_dict().items():
        assert torch.equal(tensor, resumed.partition.state_dict()[name]), name


def test_states_load_strictly_whichever_side_is_the_narrower():
    fresh, narrow = Middle(BOTH), Middle(BOTH)
    narrow_to(3, narrow)
    states = [copy.deepcopy(module.state_dict()) for module in (fresh, narrow)]
    assert [state["encoder.0.steps"].item() for state in states] == [0, 3]
    for module, state in ((fresh, states[1]), (narrow, states[0])):
        module.load_state_dict(state, strict=True)
        for name, tensor in module.state_dict().items():
            assert torch.equal(tensor, state[name]), name
    assert fresh.encoder(drawn(1, 10, 20)).shape == (1, 5, 16)
    assert narrow.encoder(drawn(1, 10, 20)).shape == (1, 10, 20)


def test_a_state_whose_width_is_not_that_of_its_steps_is_refused():
    state = Middle(HIDDEN).state_dict()
    state["encoder.0.steps"] = torch.tensor(4)
    with pytest.raises(RuntimeError, match=r"size mismatch for encoder\.0\.weight"):
        Middle(HIDDEN).load_state_dict(state)


# The penalty.


def gradients_of(text, scale=None):
    """Step 1 with plain SGD: the change of the decoder's and the encoder's weights over the learning rate."""
    stage = stage_of(text, OptimSpec(name="sgd", lr=0.5))
    layers = {"decoder": stage.partition.decoder[0], "encoder": stage.partition.encoder[0]}
    for index, layer in enumerate(layers.values()):
        layer.weight.data = drawn(20, 20, seed=index)
    before = {name: layer.weight.detach().clone() for name, layer in layers.items()}
    run_chunks(stage, text, 1)
    norm_sq = stage.grad_norm_sq()
    stage.commit(scale)
    return {name: (before[name] - layers[name].weight.detach()) / 0.5 for name in layers}, before, norm_sq


@pytest.mark.parametrize("scale", [None, 0.25])
def test_what_goes_next_is_pulled_by_the_sign_of_its_weights_after_clipping(scale):
    plain, weights, norm_sq = gradients_of(HIDDEN, scale)
    pulled, _, norm_sq_with = gradients_of(f"{HIDDEN},l1=0.03", scale)
    assert norm_sq == norm_sq_with
    expected = {name: torch.zeros(20, 20) for name in plain}
    expected["encoder"][16:] = 0.03 * weights["encoder"][16:].sign()  # rows, of which 16 remain
    expected["decoder"][:, 16:] = 0.03 * weights["decoder"][:, 16:].sign()
    for name in plain:
        torch.testing.assert_close(pulled[name] - plain[name], expected[name], atol=1e-5, rtol=0)


def test_nothing_is_pulled_once_nothing_goes_any_more():
    layer = Narrowing(20, Decay(rate=0.8, steps=2, iterations=3), 0.1, encodes=True, along_sequence=False)
    pulled = []
    for committed in range(8):
        layer.set_committed(committed)
        layer.weight.grad = torch.zeros_like(layer.weight)
        layer.weight.data.fill_(-1)
        layer.penalize()
        rows = layer.weight.grad.unique(dim=1).squeeze(1)
        pulled.append((int((rows == 0).sum()), int((rows == -torch.tensor(0.1)).sum())))
    assert pulled == [(16, 4)] * 2 + [(12, 4)] * 2 + [(9, 3)] * 2 + [(9, 0)] * 2


# In a model.


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.patch, self.mix, self.out = nn.Conv2d(3, 20, 4, 4), nn.Linear(20, 20), nn.Linear(20, 3)

    def forward(self, x):
        return self.out(torch.tanh(self.mix(self.patch(x).flatten(2).transpose(1, 2))).mean(1))


def parts_of(text):
    torch.manual_seed(0)
    parts = split(Tokens(), ("transpose", "tanh"), image_input(16))
    return with_bottleneck(parts, (text, text), seed=0)


@settings(deadline=None, max_examples=20)
@given(committed=st.integers(0, 12), batch=st.integers(1, 3))
def test_a_split_says_what_crosses_after_any_number_of_steps(committed, batch):
    parts = parts_of(BOTH)
    narrow_to(committed, *parts.partitions.values())
    (first,) = parts.front(torch.zeros(batch, 3, 16, 16))
    (second,) = parts.middle(first)
    assert first.shape == parts.crossing(1, committed)[0].batched(batch)
    assert second.shape == parts.crossing(2, committed)[0].batched(batch)
    assert parts.crossing(1, 0) == parts.cut1
    assert parts.crossing(2, 0) == parts.cut2


def test_at_full_width_the_model_computes_what_it_did_before():
    images, spec = drawn(8, 3, 16, 16), f"{BOTH},start=pca"
    turned = parts_of(spec)
    start_from_samples(turned, (spec, spec), (images,), seed=0)
    plain = Tokens()
    plain.load_state_dict(
        {
            name: tensor
            for part in turned.partitions.values()
            for name, tensor in part.state_dict().items()
            if not name.startswith("bottleneck.")
        }
    )
    assert not torch.equal(
        turned.front.get_parameter("bottleneck.cut1.encoder.0.weight").detach(), torch.eye(20)
    )
    torch.testing.assert_close(turned.run(images)[0], plain(images), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(parts_of(BOTH).run(images)[0], plain(images), atol=1e-6, rtol=1e-5)

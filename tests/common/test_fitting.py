"""Fitting a pair to recorded tensors: the error falls, never rises, and square pairs stay lossless at first."""

import pytest
import torch

from common.bottleneck import build_pair, parse_bottleneck
from common.conv_bottleneck import start_from_maps
from common.fitting import fit_pair, relative_error
from common.narrowing import LAST, narrow_to
from common.propagate import TensorInfo

pytestmark = pytest.mark.usefixtures("one_thread")


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def maps(count):
    """Batches of maps [8, 6, 8, 8] of few patterns, about a mean."""
    basis = drawn(5, 6, 2, 2)
    return [
        torch.einsum("brhw,rcij->bchiwj", drawn(8, 5, 4, 4, seed=seed), basis).reshape(8, 6, 8, 8) + 1
        for seed in range(count)
    ]


def tokens(count):
    """Batches of tokens [8, 10, 20] whose directions vary by powers."""
    axes = torch.linalg.qr(drawn(20, 20)).Q
    return [
        (drawn(8, 10, 20, seed=seed) * 1.5 ** -torch.arange(20)) @ axes + 2 for seed in range(1, count + 1)
    ]


def pair_for(text, batches):
    return build_pair(
        1, TensorInfo(name="t", shape=tuple(batches[0].shape[1:])), parse_bottleneck(text), seed=0
    )


def fitted(text, batches, steps=40, **options):
    pair = pair_for(text, batches)
    fit = fit_pair(pair.encoder, pair.decoder, batches, **{"steps": steps, "lr": 1e-2, "seed": 0, **options})
    return pair, fit


@pytest.mark.parametrize(
    ("text", "batches"),
    [("conv:4x2", maps(9)), ("conv:6x2/5x1", maps(9)), ("conv2", maps(9)), ("linear:6", tokens(9))],
    ids=["conv", "nested", "conv2", "linear"],
)  # fmt: skip
def test_error_falls_on_batches_that_were_not_fitted_to(text, batches):
    pair, fit = fitted(text, batches)
    assert fit.after < 0.98 * fit.before
    assert not fit.undone
    assert fit.steps == (0 if text.startswith("linear") else 40)
    assert fit.after == pytest.approx(relative_error(pair.encoder, pair.decoder, batches[7::8]))


def test_maps_that_a_pair_can_hold_come_back():
    _, fit = fitted("conv:5x2", maps(9), steps=200)
    assert fit.after < 0.1


def test_linear_pair_loses_no_more_than_the_best_one_would():
    batches = tokens(16)
    _, fit = fitted("linear:6", batches)
    held_out = torch.cat([batch.flatten(0, 1) for batch in batches[7::8]]).double()
    values = torch.linalg.svdvals(held_out - held_out.mean(0))
    best = float((values[6:].square().sum() / held_out.square().sum()).sqrt())
    assert best <= fit.after < 1.1 * best


@pytest.mark.parametrize("rates", ["rate=0.8", "rate=1,rate2=0.8", "rate=0.8,rate2=0.9"])
def test_narrowing_pair_loses_nothing_at_first_and_less_in_the_end(rates):
    batches = tokens(9)
    pair, fit = fitted(f"decay:{rates},steps=5,iterations=4", batches)
    assert fit.after < 0.9 * fit.before
    with torch.no_grad():
        torch.testing.assert_close(pair.decoder(pair.encoder(batches[0])), batches[0], atol=1e-4, rtol=1e-4)
        assert fit.after == pytest.approx(relative_error(pair.encoder, pair.decoder, batches[7::8]))
        narrow_to(LAST, pair.encoder, pair.decoder)
        assert pair.encoder(batches[0]).shape == (8, *pair.shape_after(LAST))
        # The width that it is judged at is the one that it ends with.
        assert fit.after == pytest.approx(relative_error(pair.encoder, pair.decoder, batches[7::8]), rel=1e-4)


def test_a_fit_that_makes_it_worse_is_undone():
    batches = maps(9)
    pair = pair_for("conv:5x2", batches)
    start_from_maps(pair.encoder, pair.decoder, torch.cat(batches))
    before = {name: t.clone() for name, t in pair.encoder.state_dict().items()}
    fit = fit_pair(pair.encoder, pair.decoder, batches, steps=3, lr=1e6, seed=0)
    assert fit.undone
    assert fit.after == fit.before
    assert all(torch.equal(t, before[name]) for name, t in pair.encoder.state_dict().items())
    assert relative_error(pair.encoder, pair.decoder, batches[7::8]) == fit.before


def test_the_same_seed_gives_the_same_pair_and_another_one_another():
    states = [fitted("conv:4x2", maps(5), seed=seed)[0].encoder.state_dict() for seed in (1, 1, 2)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not all(torch.equal(states[0][name], states[2][name]) for name in states[0])


def test_a_single_batch_is_both_fitted_to_and_judged_by():
    _, fit = fitted("conv:4x2", maps(1))
    assert fit.after < fit.before


def test_each_step_is_told_with_its_error():
    told = []
    _, fit = fitted("conv:4x2", maps(3), steps=4, on_step=lambda *words: told.append(words))
    assert [words[:2] for words in told] == [(step, 4) for step in (1, 2, 3, 4)]
    assert told[0][2] == pytest.approx(fit.before, rel=0.3)


def test_tensors_of_zeros_have_no_error():
    pair = pair_for("linear:6", tokens(1))
    assert relative_error(pair.encoder, pair.decoder, [torch.zeros(2, 10, 20)]) == 0

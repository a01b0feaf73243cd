from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from common.errors import UserError
from common.exported import export_modes
from common.graph import cut_names, find_cut, mode, trace, trace_modes
from common.model_spec import ModelSpec
from common.models import build_model
from common.partition import text_input


@pytest.fixture(scope="module")
def mobilenet():
    return build_model(ModelSpec(name="mobilenet_v2", num_classes=2))


def names(traced):
    return [traced.names[node.name] for node in traced.operations()]


def test_a_trace_goes_inside_a_convolution_with_its_activation(mobilenet):
    assert names(trace(mobilenet, True))[:4] == [
        "features.0.0",
        "features.0.1",
        "features.0.2",
        "features.1.conv.0.0",
    ]


def test_a_cut_is_named_by_an_operation_or_by_a_module_that_ends_there(mobilenet):
    traced = trace(mobilenet, True)
    at = names(traced)
    assert at[find_cut(traced, "features.0.1")] == "features.0.1"
    assert at[find_cut(traced, "features.0")] == "features.0.2"
    assert at[find_cut(traced, "features")] == "features.18.2"
    assert at[find_cut(traced, "features.3.add")] == "features.3.add"
    assert {"features", "features.0", "features.0.1", "classifier.1", "flatten"} <= set(cut_names(traced))


@pytest.mark.parametrize("cut", ["feature.0.1", "", "zzz", "features.0.", "features.99"])
def test_an_unknown_cut_gets_the_nearest_names_and_their_number(mobilenet, cut):
    with pytest.raises(UserError, match=rf"unknown cut '{cut}'; the nearest of \d+ are \w"):
        find_cut(trace(mobilenet, True), cut)


def test_one_trace_serves_both_modes_where_they_do_not_differ(mobilenet):
    traces = trace_modes(mobilenet)
    assert traces[True] is traces[False]


class Functional(nn.Module):
    def forward(self, x):
        return nn.functional.dropout(x, 0.5, training=self.training)


def test_modes_that_differ_are_traced_apart():
    traces = trace_modes(Functional())
    assert traces[True] is not traces[False]


def test_tracing_leaves_every_modules_mode_alone():
    model = nn.Sequential(nn.BatchNorm2d(1), nn.Dropout()).train()
    model[0].eval()
    trace_modes(model)
    with mode(model, training=False):
        assert not model[1].training
    assert [module.training for module in model.modules()] == [True, False, True]


class DataDependent(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


def test_a_model_that_looks_at_values_is_refused_in_one_line():
    with pytest.raises(
        UserError, match=r"DataDependent cannot be traced by torch\.fx, and so not split"
    ) as caught:
        trace(DataDependent(), True)
    assert "\n" not in str(caught.value)


def test_tracing_draws_no_random_numbers():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    trace_modes(Functional())
    assert torch.equal(torch.get_rng_state(), before)


def other_thread_runs(module):
    """What a module that has nothing to do with the traced one gives, called from another thread."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(lambda: module(torch.ones(2, 3)).detach()).result()


def test_other_threads_compute_as_ever_while_a_model_is_traced():
    """Another session's modules failed with "module is not installed as a submodule"."""
    other, seen = nn.Sequential(nn.Linear(3, 3), nn.ReLU()), []

    class Waits(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x):
            seen.append(other_thread_runs(other))
            return self.layer(x)

    traced = trace(Waits(), training=True)
    assert [node.target for node in traced.operations()] == ["layer"]
    assert torch.equal(seen[0], other(torch.ones(2, 3)))


def test_other_threads_compute_as_ever_while_a_model_is_exported():
    other, seen = nn.Sequential(nn.Linear(3, 3), nn.ReLU()), []

    class Waits(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Embedding(5, 3)

        def forward(self, input_ids, attention_mask):
            seen.append(other_thread_runs(other))
            return self.layer(input_ids) * attention_mask[..., None]

    traced = export_modes(Waits(), text_input(8))[True]
    assert "layer" in [traced.names[node.name] for node in traced.operations()]
    assert torch.equal(seen[0], other(torch.ones(2, 3)))

"""What training takes, told beforehand: against what it really takes, and for jobs that no machine could do."""

import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensor

from common.errors import UserError
from common.memory import model_bytes, training_bytes
from common.model_spec import ModelSpec
from common.models import build_model, register_model
from common.optim import OptimSpec
from common.propagate import TensorInfo, meta_copy
from common.runtime import rss_bytes

ROOT = Path(__file__).resolve().parents[2]
SGD = OptimSpec(name="sgd", momentum=0.9)
MIB = 1 << 20
X = (TensorInfo(name="x", shape=(16,), requires_grad=True),)
BERT = {
    "model_type": "bert",
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "vocab_size": 1000,
    "max_position_embeddings": 128,
}


class Two(nn.Module):
    """Two layers and an activation in place; what is kept can be added up by hand."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(16, 32, bias=False), nn.Linear(32, 8, bias=False)
        self.register_buffer("table", torch.zeros(100))

    def forward(self, x):
        return (self.two(torch.relu_(self.one(x))),)


def estimate(partition=None, inputs=X, **changes):
    settings = {"chunk_size": 4, "in_flight": 3, "optim": SGD}
    return training_bytes(partition or Two(), inputs, **{**settings, **changes})


def test_it_adds_up_what_can_be_added_up_by_hand():
    found = estimate()
    weights = (16 * 32 + 32 * 8) * 4
    assert (found.parameters, found.gradients, found.optimizer) == (weights, weights, weights)
    assert found.buffers == 2 * 400
    # Input, activation (in place: one), output.
    assert found.activations == 3 * 4 * (16 + 32 + 8) * 4
    assert found.queues == 3 * 4 * (16 + 8) * 4
    assert found.working == 3 * 4 * 32 * 4
    parts = weights * 3 + 800 + found.activations + found.queues + found.working
    assert found.total == parts + found.overhead


@pytest.mark.parametrize(
    ("optim", "times"), [(OptimSpec(name="sgd"), 0), (SGD, 1), (OptimSpec(name="adamw"), 2 + 2 / 3)]
)
def test_each_optimizer_takes_its_own(optim, times):
    found = estimate(optim=optim)
    assert found.optimizer == pytest.approx(times * found.parameters)


def test_frozen_weights_have_neither_gradients_nor_momenta():
    partition = Two()
    partition.one.requires_grad_(False)
    found = estimate(partition)
    assert found.gradients == found.optimizer == 32 * 8 * 4
    assert found.parameters == (16 * 32 + 32 * 8) * 4


def test_what_is_used_twice_counts_once():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = nn.Linear(16, 16, bias=False)
            self.two = nn.Linear(16, 16, bias=False)
            self.two.weight = self.one.weight

        def forward(self, x):
            x = self.one(x)
            return (self.two(x), x.view(-1, 4, 4))

    found = estimate(Tied())
    assert found.parameters == found.gradients == 16 * 16 * 4
    assert found.activations == 3 * 4 * (16 + 16 + 16) * 4


def test_half_precision_keeps_half():
    wide = (TensorInfo(name="x", shape=(512, 16), requires_grad=True),)
    whole, half = estimate(inputs=wide), estimate(inputs=wide, amp=torch.bfloat16)
    assert half.activations < whole.activations * 0.95
    assert half.parameters == whole.parameters


def test_fewer_tokens_take_less():
    texts = (TensorInfo(name="x", shape=(64, 16), requires_grad=True, token_dims=(0,)),)
    assert estimate(inputs=texts, tokens=16).activations * 4 == estimate(inputs=texts).activations


def test_nothing_of_the_partition_changes_and_its_tensors_need_no_data():
    partition = Two().eval()
    before = {name: tensor.clone() for name, tensor in partition.state_dict().items()}
    threads, rng = torch.get_num_threads(), torch.get_rng_state()
    real = estimate(partition)
    assert not partition.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in partition.state_dict().items())
    assert (threads, rng.tolist()) == (torch.get_num_threads(), torch.get_rng_state().tolist())
    assert estimate(meta_copy(partition)) == real


# ---- what no machine could do ----


def test_terabytes_are_told_without_taking_any():
    before = rss_bytes()
    with torch.device("meta"):
        partition = nn.Sequential(nn.Linear(16, 10**9, bias=False), nn.ReLU(), nn.Linear(10**9, 16))

    class Giant(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = partition

        def forward(self, x):
            return (self.layers(x),)

    found = estimate(Giant(), chunk_size=1 << 16, in_flight=4096)
    assert found.total > 1 << 58
    assert rss_bytes() - before < 64 * MIB


def test_more_than_numbers_can_say_is_refused():
    large = (TensorInfo(name="x", shape=(1 << 40, 16), requires_grad=True),)
    with pytest.raises(UserError, match="cannot be told"):
        estimate(inputs=large, chunk_size=1 << 16)


def test_inputs_that_do_not_fit_are_refused_in_a_line():
    with pytest.raises(UserError, match="cannot be told") as caught:
        estimate(inputs=(TensorInfo(name="x", shape=(17,), requires_grad=True),))
    assert "\n" not in str(caught.value)


# ---- whole models ----


@pytest.mark.parametrize("name", ["mobilenet_v2", "vit_b_16", "swin_t"])
def test_a_model_s_size_is_known_before_it_is_built(name):
    spec = ModelSpec(name=name, num_classes=10)
    model = build_model(spec)
    built = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    assert model_bytes(spec) == built


def test_a_text_model_s_size_is_known_before_it_is_built():
    spec = ModelSpec(name="hf:any", num_classes=2, config=BERT)
    model = build_model(spec)
    assert model_bytes(spec) == sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def test_large_text_models_are_told_without_taking_memory():
    before = rss_bytes()
    large = {**BERT, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 48}
    assert model_bytes(ModelSpec(name="hf:any", num_classes=2, config=large)) > 9_000 * MIB
    assert rss_bytes() - before < 200 * MIB


def test_some_models_are_only_known_once_they_are_built():
    register_model("two_of_test_memory", lambda num_classes: Two())
    for name in ("regnet_y_400mf", "two_of_test_memory"):
        assert model_bytes(ModelSpec(name=name, num_classes=10)) is None


def test_a_model_that_does_not_exist_is_refused():
    with pytest.raises(UserError, match="unknown model"):
        model_bytes(ModelSpec(name="mobilenet_v22", num_classes=10))


# ---- against what training really takes ----


def measured(case):
    """Train in a process of its own; return (estimated without queues, measured) bytes."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.common.memory_of_training", json.dumps(case)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    "case",
    [
        {"model": "mobilenet_v2", "image_size": 96, "in_flight": 8},
        {"model": "mobilenet_v2", "image_size": 224, "in_flight": 2},
        {"model": "hf:any", "config": BERT, "in_flight": 4},
        {"model": "hf:any", "config": BERT, "in_flight": 4, "amp": "bf16"},
    ],
    ids=["mobilenet-96", "mobilenet-224", "bert", "bert-bf16"],
)
def test_the_estimate_is_within_30_percent_of_the_truth(case):
    estimated, truth = measured(case)
    assert 0.7 < estimated / truth < 1.3, (estimated / MIB, truth / MIB)


def test_nothing_is_left_of_an_estimate() -> None:
    """A server makes one for every job."""

    def left() -> int:
        # A sigmoid keeps its own output for the way back.
        model = nn.Sequential(nn.Linear(16, 16), nn.Sigmoid(), nn.Linear(16, 2))
        estimate = training_bytes(model, X, chunk_size=2, in_flight=1, optim=SGD)
        assert estimate.activations > 0
        gc.collect()
        return sum(type(one) is FakeTensor for one in gc.get_objects())

    first = left()  # of other tests, and what a first time makes once
    assert left() <= first

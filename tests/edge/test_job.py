"""What a run starts from: the data, the model in three, and a job that the server can build the same from."""

import dataclasses

import pytest
import torch
from torch import nn

from common.bottleneck import with_bottleneck
from common.errors import UserError
from common.models import build_model, register_model
from common.partition import image_input, split
from common.spec import STREAMS, JobSpec
from common.weights import merge_states, partition_state, save_model, split_bottleneck, state_digest
from edge import bottleneck_start
from edge.config import TrainConfig
from edge.job import describe, prepare
from tests.wire.pair import SAMPLES
from wire.errors import SpecError


class Tiny(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, 2, 1)
        self.middle = nn.Sequential(nn.Conv2d(4, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.last = nn.Linear(8, num_classes)
        self.unused = nn.Linear(2, 2)

    def forward(self, x):
        return self.last(self.middle(self.first(x)).mean((2, 3)))


register_model("tiny_of_test_job", Tiny)


def config(**changes):
    settings = {
        "model": "tiny_of_test_job",
        "cuts": ("first", "middle"),
        "image_size": 16,
        "train_limit": 40,
        "test_limit": 20,
    }
    return TrainConfig(server="127.0.0.1", **{**settings, **changes})


@pytest.fixture(scope="module")
def mobilenet():
    return prepare(
        TrainConfig(server="127.0.0.1", image_size=32, compress="conv+int8", train_limit=128, test_limit=20)
    )


def test_mobilenet_v2_with_a_bottleneck_asks_for_its_preset(mobilenet):
    spec = mobilenet.spec
    assert (spec.model.name, spec.model.num_classes, spec.model.image_size) == ("mobilenet_v2", 10, 32)
    assert spec.cuts == ("features.0.1", "features.18")
    assert spec.bottlenecks == ("conv", "conv")
    assert spec.codecs == dict.fromkeys(STREAMS, "int8")
    assert (spec.chunks, spec.chunk_size, spec.in_flight) == (8, 8, 8)
    assert (spec.optim.name, spec.optim.lr, spec.optim.momentum) == ("sgd", 0.02, 0.9)
    assert spec.trace is False


def test_mobilenet_v2_s_crossings_are_a_tenth_of_the_dense_ones(mobilenet):
    parts = mobilenet.parts
    assert [info.shape for info in (*parts.cut1, *parts.cut2)] == [(20, 5, 5), (360, 1, 1)]
    assert [info.shape for info in (*parts.dense1, *parts.dense2)] == [(32, 16, 16), (1280, 1, 1)]
    names = [name for name in mobilenet.middle_state() if name.startswith("bottleneck.")]
    assert names == [
        "bottleneck.cut1.decoder.0.weight",
        "bottleneck.cut1.decoder.0.bias",
        "bottleneck.cut2.encoder.0.weight",
        "bottleneck.cut2.encoder.0.bias",
    ]


def built_by_the_server(job):
    spec = JobSpec.from_map(job.spec.to_map())
    assert spec == job.spec
    return with_bottleneck(
        split(build_model(spec.model), spec.cuts, image_input(spec.model.image_size)),
        spec.bottlenecks,
        seed=spec.seed,
    )


def test_the_server_builds_the_same_middle_from_the_job_alone():
    job = prepare(config(compress="int8"))
    middle = built_by_the_server(job).middle
    assert state_digest(partition_state(middle)) == job.spec.digest == state_digest(job.middle_state())


@pytest.mark.parametrize("compress", ["conv+int8", "cut2=conv2"])
def test_the_server_builds_a_middle_that_takes_the_weights_of_a_bottleneck_started_from_data(compress):
    job = prepare(config(compress=compress))
    middle = built_by_the_server(job).middle
    assert state_digest(partition_state(middle)) != job.spec.digest  # so it asks for them
    middle.load_state_dict(job.middle_state(), strict=True)
    assert state_digest(partition_state(middle)) == job.spec.digest


class Tokens(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.embed, self.mix, self.last = nn.Linear(48, 12), nn.Linear(12, 12), nn.Linear(12, num_classes)

    def forward(self, x):
        return self.last(torch.tanh(self.mix(self.embed(x.reshape(-1, 16, 48)))).mean(1))


register_model("tokens_of_test_job", Tokens)
TOKENS = {"model": "tokens_of_test_job", "cuts": ("embed", "mix")}


@pytest.mark.parametrize(
    ("compress", "same"),
    [("linear:4", False), ("linear:4,start=identity", True), ("decay", True), ("decay:start=pca", False)],
)
def test_only_a_bottleneck_that_is_started_from_data_has_weights_to_send(compress, same):
    job = prepare(config(**TOKENS, compress=compress, image_size=16))
    middle = built_by_the_server(job).middle
    assert (state_digest(partition_state(middle)) == job.spec.digest) is same
    middle.load_state_dict(job.middle_state(), strict=True)
    assert state_digest(partition_state(middle)) == job.spec.digest


def test_another_seed_is_another_middle():
    assert prepare(config(seed=1)).spec.digest != prepare(config(seed=2)).spec.digest


def test_the_three_states_and_the_initial_one_make_the_whole_model():
    job = prepare(config(compress="conv"))
    whole, bottleneck = merge_states(
        job.initial_state, *(partition_state(part) for part in job.parts.partitions.values())
    )
    plain = build_model(job.model)
    assert list(whole) == list(plain.state_dict())
    assert all(torch.equal(tensor, whole[name]) for name, tensor in plain.state_dict().items())
    assert {name.split(".")[1] for name in bottleneck} == {"cut1", "cut2"}
    # Of what a partition holds there is no second copy; what none uses is kept.
    kept = {name for name, tensor in job.initial_state.items() if not tensor.is_meta}
    assert kept == {"unused.weight", "unused.bias"}


@pytest.mark.parametrize(
    ("batch_size", "chunks", "chunk_size"), [(64, 8, 8), (10, 4, 3), (7, 7, 1), (5, 1, 5), (9, 2, 5)]
)
def test_the_largest_chunk_is_as_torch_cuts_it(batch_size, chunks, chunk_size):
    job = prepare(config(batch_size=batch_size, chunks=chunks))
    assert job.spec.chunk_size == chunk_size == max(map(len, torch.arange(batch_size).chunk(chunks)))


@pytest.mark.parametrize(
    ("changes", "total", "per_epoch"),
    [
        ({"batch_size": 16, "epochs": 3}, 9, 3),
        ({"batch_size": 40, "epochs": 2}, 2, 1),
        ({"batch_size": 16, "epochs": 3, "steps": 5}, 5, 3),
    ],
)
def test_steps_are_as_given_or_those_of_the_epochs(changes, total, per_epoch):
    job = prepare(config(**changes))
    assert (job.total_steps, job.steps_per_epoch) == (total, per_epoch)
    assert job.spec.optim.total_steps == total


@pytest.mark.parametrize(
    ("changes", "field", "value"),
    [
        ({"optimizer": "adamw"}, "lr", 1e-3),
        ({"optimizer": "adamw", "lr": 0.5}, "lr", 0.5),
        ({"momentum": 0.25}, "momentum", 0.25),
        ({"weight_decay": 0.01}, "weight_decay", 0.01),
        ({"schedule": "cosine", "warmup_steps": 1, "epochs": 9}, "schedule", "cosine"),
        ({"clip_norm": 2.0}, "clip_norm", 2.0),
        ({"schedule": "polynomial", "power": 2.0}, "power", 2.0),
    ],
)
def test_settings_of_the_optimizer_are_passed_on(changes, field, value):
    assert getattr(prepare(config(**changes)).spec.optim, field) == value


@pytest.mark.parametrize(
    ("changes", "field", "value"),
    [
        ({"seed": 5}, "seed", 5),
        ({"amp": "bf16"}, "amp", "bf16"),
        ({"memory_format": "contiguous"}, "memory_format", "contiguous"),
    ],
)
def test_settings_of_the_job_are_passed_on(changes, field, value):
    assert getattr(prepare(config(**changes)).spec, field) == value


def test_a_timeline_is_asked_for_where_one_is_to_be_written(tmp_path):
    assert prepare(config(trace=tmp_path / "trace.json")).spec.trace


def test_a_file_of_weights_stays_here_and_the_digest_tells_the_server_so(tmp_path):
    plain = prepare(config())
    other = Tiny(10)
    path = tmp_path / "weights.safetensors"
    save_model(path, other.state_dict(), {}, {})
    job = prepare(config(weights=str(path)))
    assert job.model.weights == str(path)
    assert job.spec.model.weights is None
    assert job.spec.digest != plain.spec.digest
    own, _ = split_bottleneck(job.middle_state())
    assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in own.items())


def test_more_classes_than_the_data_has_are_fine_and_fewer_are_refused():
    assert prepare(config(num_classes=12)).spec.model.num_classes == 12
    with pytest.raises(UserError, match="--num-classes 9 is too few: digits has 10 classes"):
        prepare(config(num_classes=9))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "resnet5"}, "unknown model 'resnet5'"),
        ({"data": "digit"}, "there is no data set 'digit'"),
        ({"cuts": ("first", "midle")}, "unknown cut 'midle'"),
        ({"compress": "conv:99999x1"}, "too wide"),
        ({"compress": "cut1=conv:4x999"}, "larger than the map"),
        ({**TOKENS, "compress": "linear:13"}, "use a width up to 12"),
        ({**TOKENS, "compress": "decay:rate=0.5,iterations=4"}, "leaves nothing"),
        ({"schedule": "cosine", "warmup_steps": 9}, "steps in all must be"),
        ({"optimizer": "lion"}, "--optimizer must be one of sgd, adamw, not 'lion'"),
        ({"lr": float("nan")}, "learning rate must be above 0"),
        ({"seed": 1 << 63}, "seed must be"),
        ({"max_length": 16}, "--max-length is for text"),
        ({"data": "cola:/nowhere"}, "takes images and --data cola:/nowhere holds text"),
    ],
)
def test_what_does_not_exist_or_fit_is_refused_in_one_line(changes, message):
    with pytest.raises(UserError, match=message) as caught:
        prepare(config(**changes))
    assert "\n" not in str(caught.value)


def test_a_compression_that_does_not_parse_is_refused_before_any_data_is_opened():
    with pytest.raises(SpecError, match="unknown codec 'int9'"):
        prepare(config(compress="int9", data="there is none"))


def test_a_job_is_described_in_one_line(mobilenet):
    ready = dataclasses.replace(SAMPLES["ready"], device="cuda:0 Some GPU", memory_format="channels_last")
    text = describe(mobilenet, ready)
    assert text == (
        "mobilenet_v2 on digits (128 training and 20 test samples, images of 32 px, 10 classes), cut after "
        "features.0.1 and features.18, compress conv+int8; the server computes on cuda:0 Some GPU (channels_last)"
    )


def test_a_model_without_a_preset_is_cut_where_that_is_good():
    assert prepare(config(cuts=())).spec.cuts == ("first", "middle.1")


def test_a_job_is_settled():
    job = prepare(config())
    with pytest.raises(dataclasses.FrozenInstanceError):
        job.total_steps = 3


class Texts:
    """Samples of six tokens each, of twelve places."""

    train_size = 1000

    def plain(self, ids):
        mask = torch.arange(12).expand(len(ids), 12) < 6
        return torch.zeros(len(ids), 12, dtype=torch.int64), mask


class Pictures:
    train_size = 1000

    def plain(self, ids):
        return (torch.zeros(len(ids), 3, 4, 4),)


def test_bottlenecks_start_from_as_many_texts_as_hold_enough_tokens(monkeypatch):
    monkeypatch.setattr(bottleneck_start, "START_TOKENS", 600)
    assert len(bottleneck_start._some_samples(Texts(), 0)[0]) == 100
    monkeypatch.setattr(bottleneck_start, "START_TOKENS", 60)
    assert len(bottleneck_start._some_samples(Texts(), 0)[0]) == bottleneck_start.START_SAMPLES
    assert len(bottleneck_start._some_samples(Pictures(), 0)[0]) == bottleneck_start.START_SAMPLES

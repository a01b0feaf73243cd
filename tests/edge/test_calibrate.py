"""`edge-client calibrate` and `--bottleneck`: what is fitted, what the file holds, and which files are refused."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import dropout_model  # noqa: F401  (registers its model)
import token_model  # noqa: F401
from common.errors import TrainingStopped, UserError
from common.fitting import relative_error
from common.models import build_model
from common.narrowing import narrow_to
from common.weights import partition_state, split_bottleneck
from edge.calibrate import calibrate
from edge.config import CalibrateConfig, TrainConfig
from edge.job import prepare

pytestmark = pytest.mark.usefixtures("one_thread")


class Told:
    """Keeps what a calibration shows."""

    def __init__(self):
        self.at_last, self.notes = {}, []

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def at(self, what, done, total, detail=""):
        self.at_last[what] = (done, total)

    def note(self, text):
        self.notes.append(text)


TOKENS = {"model": "token_net", "cuts": ("embed", "blocks"), "image_size": 16}
MAPS = {"model": "dropout_net", "cuts": ("stem", "blocks"), "image_size": 16}


def settings(folder, **changes):
    shared = {"samples": 200, "batch_size": 48, "epochs": 2, "save": folder / "pair.safetensors"}
    return CalibrateConfig(**{**TOKENS, "compress": ("linear:6,4",), **shared, **changes})


def training(**changes):
    run = {"server": "nowhere", "train_limit": 400, "test_limit": 100, "batch_size": 8, "chunks": 2}
    return TrainConfig(**{**TOKENS, "compress": ("linear:6,4",), **run, **changes})


def bottleneck_of(job):
    states = [split_bottleneck(partition_state(part))[1] for part in job.parts.partitions.values()]
    return {name: tensor for state in states for name, tensor in state.items()}


# Fitting.


@pytest.mark.parametrize(
    ("model", "compress", "names", "narrow"),
    [
        (TOKENS, "linear:6,4", ["cut1", "cut2"], [(16, 6), (16, 4)]),
        (TOKENS, "cut2=linear:6", ["cut2"], [(16, 6)]),
        (TOKENS, "decay:rate=0.8,steps=3,iterations=2", ["cut1", "cut2"], [(16, 15), (16, 15)]),
        (MAPS, "conv:6x2+int8", ["cut1", "cut2"], [(6, 4, 4), (6, 4, 4)]),
        (MAPS, "cut1=conv2", ["cut1"], [(4, 2, 2)]),
        ({**MAPS, "cuts": ("blocks.1.conv", "blocks.4.norm")}, "conv:4x2", ["cut1.0", "cut1.1", "cut2.0", "cut2.1"],
         [(4, 4, 4)] * 4),
    ],
)  # fmt: skip
def test_every_pair_is_fitted_and_written_and_no_worse_than_it_started(
    tmp_path, model, compress, names, narrow
):
    config, told = settings(tmp_path, **model, compress=(compress,)), Told()
    fitted = calibrate(config, told)
    assert [pair.name for pair in fitted] == names
    assert [pair.narrow for pair in fitted] == narrow
    assert all(0 < pair.fit.after < pair.fit.before for pair in fitted)
    state = load_file(config.save)
    assert {
        name.removeprefix("bottleneck.").partition(".encoder")[0].partition(".decoder")[0] for name in state
    } == set(names)
    assert {(5, 5)} == {count for what, count in told.at_last.items() if what.startswith("recording")}


def test_pairs_reproduce_what_crosses_better_than_those_of_the_first_images(tmp_path):
    config = settings(tmp_path, **MAPS, compress=("conv:6x2",), samples=400, epochs=20)
    calibrate(config, Told())
    jobs = [
        prepare(training(**MAPS, compress=("conv:6x2",), bottleneck=file)) for file in (None, config.save)
    ]
    with jobs[0].samples.test(batch_size=100, channels_last=False) as batches:
        (images,) = batches.get().inputs
    errors = []
    for job in jobs:
        front, middle = job.parts.front, job.parts.middle
        encoder = front.get_submodule(front.encoders[0])
        with torch.no_grad():
            crossing = front.run_bare(images)[0]
        errors.append(relative_error(encoder, middle.get_submodule(middle.decoders[0]), [crossing]))
    assert errors[1] < errors[0]


def test_calibrating_leaves_the_bottleneck_alone_that_the_model_was_trained_with(tmp_path):
    decay = "decay:rate=0.8,steps=3,iterations=2"
    job = prepare(training(compress=(decay,)))
    narrow_to(4, *job.parts.partitions.values())  # as if it had been trained
    model = tmp_path / "model.safetensors"
    state = {n: t for part in job.parts.partitions.values() for n, t in partition_state(part).items()}
    save_file(state, model)
    fresh, trained = tmp_path / "fresh", tmp_path / "trained"
    calibrate(settings(tmp_path, compress=(decay,), steps=2, save=fresh), Told())
    calibrate(settings(tmp_path, compress=(decay,), steps=2, save=trained, weights=str(model)), Told())
    assert {n: t.shape for n, t in load_file(trained).items()} == {
        n: t.shape for n, t in load_file(fresh).items()
    }


def test_calibrating_repeats_to_the_bit_and_changes_neither_model_nor_random_numbers(tmp_path):
    before = torch.get_rng_state()
    states = []
    for name in ("one", "two"):
        config = settings(tmp_path, **MAPS, compress=("conv:6x2",), save=tmp_path / name)
        calibrate(config, Told())
        states.append(load_file(config.save))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_steps_count_instead_of_epochs(tmp_path):
    maps = {**MAPS, "compress": ("conv:6x2",)}
    (first, second) = calibrate(settings(tmp_path, **maps, steps=7), Told())
    assert (first.fit.steps, second.fit.steps) == (7, 7)
    (first, _) = calibrate(settings(tmp_path, **maps, epochs=3), Told())
    assert first.fit.steps == 3 * 5
    assert "[B,8,8,8] as [B,6,4,4]; relative error at first" in str(first)
    assert f"after 15 steps {first.fit.after:.4f}" in str(first)


def test_a_pair_that_narrows_is_described_as_it_ends(tmp_path):
    (pair, _) = calibrate(settings(tmp_path, compress=("decay:rate=0.8,steps=3,iterations=2",)), Told())
    assert "[B,16,24] as [B,16,15] in the end" in str(pair)
    assert f"on principal axes {pair.fit.after:.4f}" in str(pair)


def test_fewer_images_than_were_asked_for_are_all_recorded(tmp_path):
    told = Told()
    calibrate(settings(tmp_path, train_limit=49, samples=1000), told)
    assert told.at_last["recording cut 1, batch"] == (2, 2)


# The file, and training from it.


def test_file_says_what_it_was_made_for(tmp_path):
    config = settings(tmp_path, compress=("linear:6,4+int8",))
    calibrate(config, Told())
    with safe_open(config.save, "pt") as file:
        metadata = {name: value for name, value in file.metadata().items() if name != "format"}
    assert {name: json.loads(value) for name, value in metadata.items()} == {
        "model": "token_net",
        "cuts": ["embed", "blocks"],
        "bottlenecks": ["linear:6,4", "linear:6,4"],
        "shapes": [[[16, 24]], [[16, 24]]],
    }


@pytest.mark.parametrize("compress", ["linear:6,4", "decay:rate=0.8,steps=3,iterations=2", "cut1=linear:6"])
def test_training_starts_from_exactly_what_the_file_holds(tmp_path, compress):
    config = settings(tmp_path, compress=(compress,))
    calibrate(config, Told())
    job = prepare(training(compress=(compress, "grad=int8"), bottleneck=config.save))
    state, given = bottleneck_of(job), load_file(config.save)
    assert state.keys() == given.keys()
    assert all(torch.equal(state[name], given[name]) for name in state)
    own, _ = split_bottleneck(job.middle_state())
    plain = build_model(job.model).state_dict()
    assert all(torch.equal(tensor, plain[name]) for name, tensor in own.items())


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    config = settings(tmp_path_factory.mktemp("made"), epochs=1)
    calibrate(config, Told())
    return config.save


OTHERS = {
    "another model": ({**MAPS, "compress": ("cut1=conv",)}, "for the model token_net, and this run has dropout_net"),
    "other cuts": ({"cuts": ("embed", "blocks.0")}, "the cuts embed and blocks, and this run has embed and blocks.0"),
    "another spec": ({"compress": ("linear:8",)}, "--compress linear:6,4 and linear:6,4, and this run has linear:8"),
    "a cut without one": ({"compress": ("cut1=linear:6,4",)}, "and this run has linear:6,4 and none"),
    "no bottleneck": ({"compress": ("int8",)}, "needs a bottleneck in --compress"),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "says"), OTHERS.values(), ids=OTHERS)
def test_a_file_for_something_else_is_refused_with_what_differs(made, changes, says):
    with pytest.raises(UserError) as caught:
        prepare(training(**changes, bottleneck=made))
    assert says in str(caught.value)
    assert str(made) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_for_images_of_another_size_is_refused(tmp_path):
    config = settings(tmp_path, **MAPS, compress=("conv:6x2",))
    calibrate(config, Told())
    words = r"tensors of shape \[B,8,8,8\] and \[B,8,8,8\], and this run has \[B,8,12,12\]"
    with pytest.raises(UserError, match=words):
        prepare(training(**{**MAPS, "image_size": 24}, compress=("conv:6x2",), bottleneck=config.save))


def rewritten(made, folder, change, **metadata):
    """The file with its tensors changed."""
    state = load_file(made)
    with safe_open(made, "pt") as file:
        about = {**file.metadata(), **metadata}
    change(state)
    save_file(state, folder / "changed.safetensors", about)
    return folder / "changed.safetensors"


BIAS = "bottleneck.cut1.encoder.0.bias"
WRONG = {
    "a tensor too few": (lambda s: s.pop(BIAS), f"holds {BIAS} as nothing, and this run has float32 [6]"),
    "a tensor too many": (lambda s: s.update({"head.out.bias": torch.ones(3)}), "[3], and this run has nothing"),
    "another shape": (lambda s: s.update({BIAS: torch.ones(7)}), "as float32 [7], and this run has float32 [6]"),
    "another dtype": (lambda s: s.update({BIAS: torch.ones(6).half()}), "float16 [6], and this run has float32 [6]"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "says"), WRONG.values(), ids=WRONG)
def test_a_file_whose_tensors_are_others_is_refused(made, tmp_path, change, says):
    with pytest.raises(UserError) as caught:
        prepare(training(bottleneck=rewritten(made, tmp_path, change)))
    assert says in str(caught.value)


def test_a_narrowing_pair_that_has_seen_steps_is_refused(tmp_path):
    spec = "decay:rate=0.8,steps=3,iterations=2"
    config = settings(tmp_path, compress=(spec,))
    calibrate(config, Told())
    changed = rewritten(
        config.save, tmp_path, lambda s: s.update({"bottleneck.cut1.encoder.0.steps": torch.tensor(3)})
    )
    with pytest.raises(UserError, match=r"does not fit together: .*size mismatch"):
        prepare(training(compress=(spec,), bottleneck=changed))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "there is no bottleneck file .*edge-client calibrate makes one"),
        (b"nothing of the kind", "is no readable bottleneck file, perhaps cut short"),
        ("model", "is not a file of edge-client calibrate"),
        ("cut short", "is no readable bottleneck file, perhaps cut short"),
        ("no metadata", "is not a file of edge-client calibrate"),
    ],
)
def test_what_is_no_bottleneck_file_is_refused(made, tmp_path, content, says):
    path = tmp_path / "file.safetensors"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content == "model":
        save_file({"a": torch.ones(2)}, path, {"model": "token_net"})
    elif content == "no metadata":
        save_file({"a": torch.ones(2)}, path)
    elif content == "cut short":
        path.write_bytes(made.read_bytes()[:-40])
    with pytest.raises(UserError, match=says):
        prepare(training(bottleneck=path))


# What cannot be calibrated.


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"compress": ("int8",)}, "--compress int8 inserts nothing to calibrate"),
        ({"samples": 0}, "--samples must be at least 1"),
        ({"epochs": 0}, "--epochs must be at least 1"),
        ({"steps": 0}, "--steps must be at least 1"),
        ({"lr": 0.0}, "--lr must be above 0"),
        ({"lr": float("nan")}, "--lr must be above 0"),
        ({"batch_size": 0}, "--batch-size must be at least 1"),
        ({"cuts": ("embed",)}, "give --cut twice"),
        ({"compress": ("conv",)}, "conv needs a map"),
        ({"model": "token_nett"}, "unknown model"),
    ],
)
def test_what_does_not_fit_is_one_line(tmp_path, changes, says):
    with pytest.raises(UserError, match=says) as caught:
        calibrate(settings(tmp_path, **changes), Told())
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_cannot_be_written_is_a_failed_run(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("edge.calibrate.save_bottleneck", full)
    with pytest.raises(TrainingStopped, match=r"could not be written to .*: No space left on device"):
        calibrate(settings(tmp_path), Told())

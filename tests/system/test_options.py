"""Options of the command line, each seen to do what it says, in whole runs over a real link."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import dropout_model  # noqa: F401  (registers its model here too)
from common.metrics import StepReport
from common.model_spec import ModelSpec
from common.models import build_model
from common.spec import STREAMS
from common.weights import load_state
from edge.config import TrainConfig
from edge.progress import SilentProgress
from edge.trainer import Trainer
from tests.system.processes import TINY, events, run, serving, train
from wire.transport import run as run_coroutine


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with serving("--import", "dropout_model") as (server, address):
        yield address
        assert "Traceback" not in server.err


class Run:
    """One run of the tiny model to its end, and what it left."""

    def __init__(self, address: str, folder: Path, *arguments: object) -> None:
        saved, metrics, trace = (
            folder / name for name in ("model.safetensors", "metrics.jsonl", "trace.json")
        )
        self.ended = train(address, *arguments, "--save", saved, "--metrics", metrics, "--trace", trace)
        assert (self.ended.status, self.ended.err) == (0, ""), self.ended
        self.state = load_state(saved)
        self.lines: list[dict[str, Any]] = events(metrics)
        self.steps = [line for line in self.lines if line["event"] == "step"]
        self.summary = self.lines[-1]
        self.spans = [event for event in json.loads(trace.read_text())["traceEvents"] if event["ph"] == "X"]

    def computed(self) -> list[str]:
        """What the edge computed of chunks, in order, such as 0F3."""
        return [
            s["name"] for s in self.spans if s["pid"] == 1 and s["cat"] == "compute" and s["name"][0] in "02"
        ]

    def evaluated(self) -> list[int]:
        return [line["step"] for line in self.lines if line["event"] == "eval"]


def initial_state(**spec: Any) -> dict[str, Tensor]:
    return build_model(ModelSpec(name="dropout_net", **{"num_classes": 10, **spec})).state_dict()


def moved(state: Mapping[str, Tensor], since: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """How far each trained parameter has moved; buffers are left out."""
    before = initial_state() if since is None else since
    return {
        name: state[name] - before[name]
        for name in before
        if not name.endswith(("running_mean", "running_var", "num_batches_tracked"))
    }


# How a step is cut and how many are made.


@pytest.mark.parametrize(("batch_size", "chunks", "count"), [(8, 1, 1), (10, 4, 4), (9, 4, 3)])
def test_chunks_are_those_of_torch_with_an_uneven_last_one(
    address: str, tmp_path: Path, batch_size: int, chunks: int, count: int
) -> None:
    options = ("--batch-size", batch_size, "--chunks", chunks, "--steps", 2)
    this = Run(address, tmp_path, *options)
    assert sorted(set(this.computed())) == [f"{kind}{i}" for kind in ("0B", "0F", "2T") for i in range(count)]
    assert round(this.steps[0]["samples_per_s"] * this.steps[0]["step_s"]) == batch_size


@pytest.mark.parametrize("depth", [1, 3])
def test_depth_bounds_the_chunks_in_flight(address: str, tmp_path: Path, depth: int) -> None:
    this = Run(address, tmp_path, "--chunks", 8, "--depth", depth, "--steps", 3)
    in_flight = [0]
    for name in this.computed():
        in_flight.append(in_flight[-1] + {"0F": 1, "2T": 0, "0B": -1}[name[:2]])
    assert max(in_flight) == depth


def test_depth_changes_no_result(address: str, tmp_path: Path) -> None:
    states = []
    for depth in (1, 5):
        (tmp_path / str(depth)).mkdir()
        states.append(
            Run(address, tmp_path / str(depth), "--chunks", 8, "--depth", depth, "--steps", 3).state
        )
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_epochs_go_through_the_training_set(address: str, tmp_path: Path) -> None:
    this = Run(address, tmp_path, "--train-limit", 20, "--epochs", 3)
    assert [line["epoch"] for line in this.steps] == [0] * 3 + [1] * 3 + [2] * 3


def test_steps_count_instead_of_epochs(address: str, tmp_path: Path) -> None:
    this = Run(address, tmp_path, "--train-limit", 20, "--epochs", 3, "--steps", 5)
    assert [line["epoch"] for line in this.steps] == [0, 0, 0, 1, 1]
    assert "done: 5 steps" in this.ended.out


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        (("--eval-every", 2), [2, 4, 5]),
        (("--eval-every", 9), [5]),
        (("--eval-every", 0), []),
    ],
    ids=lambda value: str(value),
)
def test_evaluations_come_every_so_many_steps_and_at_the_end(
    address: str, tmp_path: Path, options: tuple[object, ...], steps: list[int]
) -> None:
    assert Run(address, tmp_path, "--steps", 5, *options).evaluated() == steps


def test_evaluations_come_once_an_epoch_unless_told_otherwise(address: str, tmp_path: Path) -> None:
    tiny = [word for word in TINY if word not in ("--eval-every", "0")]
    metrics = tmp_path / "metrics.jsonl"
    options = ("--server", address, *tiny, "--train-limit", 20, "--epochs", 2, "--metrics", metrics)
    assert run("edge-client", *options).status == 0
    lines = events(metrics)
    assert [line["step"] for line in lines if line["event"] == "eval"] == [3, 6]


def test_evaluating_changes_nothing_of_training(address: str, tmp_path: Path) -> None:
    states = []
    for every in (0, 1):
        (tmp_path / str(every)).mkdir()
        options = ("--compress", "int8", "--steps", 3, "--eval-every", every)
        states.append(Run(address, tmp_path / str(every), *options).state)
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


# How the weights move.

PLAIN_SGD = ("--momentum", 0, "--lr", 0.1)


def test_clip_norm_bounds_the_whole_models_step(address: str, tmp_path: Path) -> None:
    this = Run(address, tmp_path, *PLAIN_SGD, "--steps", 1, "--clip-norm", 1e-3)
    norm = torch.cat([delta.flatten() for delta in moved(this.state).values()]).norm().item()
    assert norm == pytest.approx(0.1 * 1e-3, rel=1e-2)


def test_adamw_moves_every_weight_by_its_rate_first(address: str, tmp_path: Path) -> None:
    this = Run(address, tmp_path, "--optimizer", "adamw", "--lr", 0.01, "--steps", 1)
    for name, delta in moved(this.state).items():
        if name != "stem.0.bias":  # BatchNorm follows: its gradient is nothing but rounding
            assert delta.abs().max().item() == pytest.approx(0.01, rel=1e-2), name


def test_weight_decay_of_adamw_shrinks_weights(address: str, tmp_path: Path) -> None:
    states = []
    for decay in (0.0, 0.5):
        (tmp_path / str(decay)).mkdir()
        options = ("--optimizer", "adamw", "--lr", 0.01, "--weight-decay", decay, "--steps", 1)
        states.append(Run(address, tmp_path / str(decay), *options).state)
    for name, start in initial_state().items():
        if "weight" in name:
            torch.testing.assert_close(states[1][name], states[0][name] - 0.01 * 0.5 * start, msg=name)


# The last of four steps' rate over the peak, of two steps of warm-up and two that go down to nothing.
RATES = {"constant": 1, "linear": 1 / 2, "cosine": 1 / 2, "polynomial": 1 / 4}


class StopAfter(SilentProgress):
    """Ends a run after a step."""

    def __init__(self, step: int) -> None:
        self._step = step
        self.trainer: Trainer

    def step(self, report: StepReport) -> None:
        if report.step == self._step:
            self.trainer.stop()


def state_after(step: int, config: TrainConfig) -> dict[str, Tensor]:
    """The weights after a step of a longer run."""
    progress = StopAfter(step)
    progress.trainer = Trainer(config, progress, keep_state=True)
    result = run_coroutine(progress.trainer.run())
    assert result.steps == step
    return result.state


@pytest.mark.parametrize("schedule", RATES)
def test_schedule_sets_the_rate(address: str, schedule: str) -> None:
    config = TrainConfig(
        server=address,
        model="dropout_net",
        cuts=("stem", "blocks"),
        image_size=16,
        batch_size=8,
        chunks=2,
        threads=1,
        train_limit=64,
        eval_every=0,
        memory_format="contiguous",  # measured for each run anew, dropout may drop others in the second one
        steps=4,
        lr=0.1,
        momentum=0,
        clip_norm=1e-2,  # a clipped step of SGD is as long as its rate, whatever the gradient
        schedule=schedule,
        warmup_steps=2,
        power=2,
    )
    delta = moved(state_after(4, config), state_after(3, config))
    norm = torch.cat([moves.flatten() for moves in delta.values()]).norm().item()
    assert norm == pytest.approx(0.1 * 1e-2 * RATES[schedule], rel=0.01)


@pytest.mark.parametrize("schedule", RATES)
def test_schedule_is_chosen_on_the_command_line(address: str, tmp_path: Path, schedule: str) -> None:
    Run(address, tmp_path, "--schedule", schedule, "--warmup-steps", 1, "--power", 2, "--steps", 3)


# What crosses, and where.

DENSE_BYTES = 8 * 8 * 8 * 8 * 4  # of one cut in one direction: a batch of 8 maps [8, 8, 8]
GOES_UP = {"cut1.act": True, "cut1.grad": False, "cut2.act": False, "cut2.grad": True}
PLACES = {
    "": STREAMS,
    "act=": ("cut1.act", "cut2.act"),
    "grad=": ("cut1.grad", "cut2.grad"),
    "cut1=": ("cut1.act", "cut1.grad"),
    "cut2=": ("cut2.act", "cut2.grad"),
    **{f"{stream}=": (stream,) for stream in STREAMS},
}


@pytest.fixture(scope="module")
def uncompressed(address: str, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run(address, tmp_path_factory.mktemp("none"), "--steps", 3)


def carried(this: Run) -> tuple[int, int]:
    """Bytes up and down of all steps."""
    return sum(line["up_bytes"] for line in this.steps), sum(line["down_bytes"] for line in this.steps)


@pytest.mark.parametrize("place", PLACES)
def test_codec_is_set_for_everything_or_for_a_part(
    address: str, tmp_path: Path, uncompressed: Run, place: str
) -> None:
    this = Run(address, tmp_path, "--compress", f"{place}fp16", "--steps", 3)
    saved = {up: 3 * DENSE_BYTES / 2 * sum(GOES_UP[s] is up for s in PLACES[place]) for up in (True, False)}
    for direction, (before, after) in zip(
        (True, False), zip(carried(uncompressed), carried(this), strict=True), strict=True
    ):
        assert before - after == pytest.approx(saved[direction], abs=0.1 * 3 * DENSE_BYTES)


def test_narrower_place_wins_over_the_wider(address: str, tmp_path: Path, uncompressed: Run) -> None:
    wide = ("--compress", "fp16", "--compress", "grad=none", "--compress", "cut2.grad=int8")
    this = Run(address, tmp_path, *wide, "--steps", 3)
    up, down = (before - after for before, after in zip(carried(uncompressed), carried(this), strict=True))
    assert up == pytest.approx(3 * DENSE_BYTES * (1 / 2 + 3 / 4), abs=0.15 * 3 * DENSE_BYTES)
    assert down == pytest.approx(3 * DENSE_BYTES * 1 / 2, abs=0.1 * 3 * DENSE_BYTES)


@pytest.mark.parametrize("spec", ["lz4", "bf16", "fp16+lz4", "conv", "conv2", "conv:4x2,4x1", "int8+lz4"])
def test_every_way_to_compress_trains_and_is_smaller(address: str, tmp_path: Path, spec: str) -> None:
    assert Run(address, tmp_path, "--compress", spec, "--steps", 3).summary["compress_rate"] < 1.0


def test_compressed_run_repeats_to_the_bit(address: str, tmp_path: Path) -> None:
    states = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        states.append(Run(address, tmp_path / name, "--compress", "conv+int8", "--steps", 3).state)
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_bottleneck_at_one_cut_only(address: str, tmp_path: Path) -> None:
    this = Run(address, tmp_path, "--compress", "cut1=conv+int8", "--steps", 2)
    inserted = {name.split(".")[1] for name in this.state if name.startswith("bottleneck.")}
    assert inserted == {"cut1"}


# What a run starts from.


def test_weights_of_the_edges_own_reach_the_middle(address: str, tmp_path: Path) -> None:
    given = initial_state(seed=5)
    torch.save(given, tmp_path / "given.pt")
    this = Run(address, tmp_path, "--weights", tmp_path / "given.pt", "--lr", 1e-9, "--steps", 1)
    for name, delta in moved(this.state, given).items():
        assert delta.abs().max() < 1e-6, name
    assert not torch.equal(given["blocks.1.conv.weight"], initial_state()["blocks.1.conv.weight"])


def test_saved_model_is_where_the_next_run_goes_on(address: str, tmp_path: Path) -> None:
    (tmp_path / "first").mkdir()
    (tmp_path / "second").mkdir()
    first = Run(address, tmp_path / "first", "--steps", 2)
    saved = tmp_path / "first" / "model.safetensors"
    second = Run(address, tmp_path / "second", "--weights", saved, "--lr", 1e-9, "--steps", 1)
    for name, delta in moved(second.state, first.state).items():
        assert delta.abs().max() < 1e-6, name


def test_another_number_of_classes_replaces_the_classifier_alone(address: str, tmp_path: Path) -> None:
    given = initial_state(seed=5)
    torch.save(given, tmp_path / "given.pt")
    options = ("--weights", tmp_path / "given.pt", "--num-classes", 12, "--lr", 1e-9, "--steps", 1)
    this = Run(address, tmp_path, *options)
    fresh = {name for name in given if this.state[name].shape != given[name].shape}
    assert fresh == {"head.3.weight", "head.3.bias"}
    assert this.state["head.3.weight"].shape == (12, 8)
    kept = {name: given[name] for name in given if name not in fresh}
    for name, delta in moved(this.state, kept).items():
        assert delta.abs().max() < 1e-6, name


def test_seed_decides_everything(address: str, tmp_path: Path, uncompressed: Run) -> None:
    losses = {}
    for seed in (0, 1):
        (tmp_path / str(seed)).mkdir()
        this = Run(address, tmp_path / str(seed), "--seed", seed, "--steps", 3)
        losses[seed] = [line["loss"] for line in this.steps]
    assert losses[0] == [line["loss"] for line in uncompressed.steps]
    assert losses[1] != losses[0]


def test_augmentation_can_be_left_out(address: str, tmp_path: Path, uncompressed: Run) -> None:
    this = Run(address, tmp_path, "--no-augment", "--steps", 3)
    assert [line["loss"] for line in this.steps] != [line["loss"] for line in uncompressed.steps]

"""`edge-client evaluate`: a saved model scores what it scored when it was trained, its bottleneck with it."""

import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.fault_plans import CutFrames, FrameCut
from benchmarks.faulty_proxy import FaultyProxy
from common.errors import UserError
from common.weights import load_state
from edge.config import TrainConfig
from tests.system.processes import events, run, running, serving

SHARED = ("--import", "token_model", "--model", "token_net", "--cut", "embed", "--cut", "blocks")
SHARED += ("--image-size", "16", "--batch-size", "8", "--chunks", "2", "--threads", "1")
SHARED += ("--memory-format", "contiguous")
TRAINING = ("--train-limit", "64", "--lr", "0.05", "--steps", "4", "--eval-every", "4")


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with serving("--import", "token_model") as (server, address):
        yield address
        assert "Traceback" not in server.err


def trained(address: str, folder: Path, *arguments: object) -> tuple[Path, dict[str, Any]]:
    """Train; gives the saved file and the line of the evaluation at the end."""
    saved, metrics = folder / "model.safetensors", folder / "trained.jsonl"
    outputs = ("--save", saved, "--metrics", metrics)
    ended = run("edge-client", "--server", address, *SHARED, *TRAINING, *arguments, *outputs)
    assert (ended.status, ended.err) == (0, ""), ended
    (evaluation,) = [line for line in events(metrics) if line["event"] == "eval"]
    return saved, evaluation


@pytest.mark.parametrize(
    "compress",
    [
        "none",
        "int8+lz4",
        "linear:12,6",
        # Narrowed once, and to be narrowed again.
        "decay:rate=0.8,steps=3,iterations=2",
        "decay:rate=0.8,rate2=0.5,steps=2,iterations=2,l1=1e-3,start=pca",
    ],
)
def test_a_saved_model_scores_as_it_did_when_it_was_trained(
    address: str, tmp_path: Path, compress: str
) -> None:
    chosen = ("--test-limit", "60", "--compress", compress)
    saved, before = trained(address, tmp_path, *chosen)
    metrics = tmp_path / "evaluated.jsonl"
    command = ("edge-client", "evaluate", "--server", address, *SHARED, *chosen)
    ended = run(*command, "--weights", saved, "--metrics", metrics)
    assert (ended.status, ended.err) == (0, ""), ended
    evaluation, summary = events(metrics)
    assert {**evaluation, "step": before["step"]} == before  # to the last bit
    assert (summary["event"], summary["steps"]) == ("summary", 0)
    assert ended.out.splitlines()[-1].startswith(f"test: accuracy {100 * before['accuracy']:.2f} %, loss ")
    assert (f"its bottleneck from {saved}" in ended.out) is (":" in compress)


def test_training_goes_on_with_the_bottleneck_that_a_model_was_trained_with(
    address: str, tmp_path: Path
) -> None:
    decay = ("--test-limit", "8", "--compress", "decay:rate=0.8,steps=3,iterations=2")
    saved, _ = trained(address, tmp_path, *decay)
    assert load_state(saved)["bottleneck.cut1.encoder.0.weight"].shape == (19, 24)
    again = tmp_path / "again"
    again.mkdir()
    saved, _ = trained(address, again, *decay, "--weights", saved)
    state = load_state(saved)
    assert int(state["bottleneck.cut1.encoder.0.steps"]) == 8
    assert state["bottleneck.cut1.encoder.0.weight"].shape == (15, 24)


def test_another_bottleneck_than_the_file_s_starts_anew_in_training_and_cannot_be_evaluated(
    address: str, tmp_path: Path
) -> None:
    saved, _ = trained(address, tmp_path, "--test-limit", "8", "--compress", "linear:12,6")
    other = ("--test-limit", "8", "--compress", "linear:12,7", "--weights", saved)
    ended = run("edge-client", "--server", address, *SHARED, *TRAINING, *other)
    assert (ended.status, ended.err) == (0, ""), ended
    assert f"without the bottleneck in {saved}" in ended.out
    ended = run("edge-client", "evaluate", "--server", address, *SHARED, *other)
    assert ended.status == 2
    assert ended.error == (
        f"{saved} was trained with a bottleneck, and not that of --compress linear:12,7: give the --compress and "
        "--cut that it was trained with"
    )


def test_a_model_without_bottleneck_is_not_evaluated_with_one(address: str, tmp_path: Path) -> None:
    saved, _ = trained(address, tmp_path, "--test-limit", "8")
    asked = ("--weights", saved, "--compress", "cut2=linear:6")
    ended = run("edge-client", "evaluate", "--server", address, *SHARED, *asked)
    assert ended.status == 2
    assert ended.error == (
        f"{saved} comes without a bottleneck: leave linear:6 out of --compress, or give its --bottleneck"
    )


def test_random_weights_are_evaluated_only_where_they_are_asked_for(address: str) -> None:
    command = ("edge-client", "evaluate", "--server", address, *SHARED, "--test-limit", "8")
    ended = run(*command)
    assert ended.status == 2
    assert "token_net has random weights: give those that were trained" in ended.error
    assert run(*command, "--weights", "random").status == 0


def test_a_server_has_to_be_named() -> None:
    ended = run("edge-client", "evaluate", "--weights", "random")
    assert ended.status == 2
    assert "--server HOST:PORT" in ended.error


def test_a_bottleneck_of_other_cuts_is_another_one(address: str, tmp_path: Path) -> None:
    """All layers of a transformer are as wide, so that it would fit."""
    linear = ("--test-limit", "8", "--compress", "linear:12,6")
    saved, _ = trained(address, tmp_path, *linear)
    elsewhere = ("--import", "token_model", "--model", "token_net", "--cut", "blocks.0", "--cut", "blocks")
    other = (*elsewhere, *SHARED[8:], *linear, "--weights", saved)
    ended = run("edge-client", "--server", address, *other, *TRAINING)
    assert (ended.status, ended.err) == (0, ""), ended
    assert f"without the bottleneck in {saved}" in ended.out
    ended = run("edge-client", "evaluate", "--server", address, *other)
    assert ended.status == 2
    assert "linear:12,6, but cut after embed and blocks: give the --compress and --cut" in ended.error


def test_a_classifier_of_other_classes_is_not_evaluated(address: str, tmp_path: Path) -> None:
    saved, _ = trained(address, tmp_path, "--test-limit", "8")
    asked = ("--test-limit", "8", "--weights", saved, "--num-classes", "12")
    ended = run("edge-client", "evaluate", "--server", address, *SHARED, *asked)
    assert ended.status == 2
    assert (
        ended.error
        == f"{saved} tells 10 classes apart, and this run has 12: give other --data, or train first"
    )


def test_a_file_of_a_bare_name_is_evaluated_with_its_bottleneck(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As weights of a registered model it can be nothing else."""
    linear = ("--test-limit", "60", "--compress", "linear:12,6")
    saved, before = trained(address, tmp_path, *linear)
    saved.rename(tmp_path / "trained")
    monkeypatch.chdir(tmp_path)
    ended = run("edge-client", "evaluate", "--server", address, *SHARED, *linear, "--weights", "trained")
    assert (ended.status, ended.err) == (0, ""), ended
    assert ended.out.splitlines()[-1].startswith(f"test: accuracy {100 * before['accuracy']:.2f} %")


def test_nothing_is_evaluated_into_a_file() -> None:
    for changes in ({"save": Path("m.safetensors")}, {"checkpoint": Path("run")}):
        with pytest.raises(UserError, match="nothing for --save or --checkpoint to keep"):
            TrainConfig(server="nowhere", only_evaluates=True, **changes)  # type: ignore[arg-type]


def test_a_killed_run_that_began_narrow_comes_to_the_weights_of_a_quiet_one(tmp_path: Path) -> None:
    decay = ("--test-limit", "8", "--compress", "decay:rate=0.8,steps=3,iterations=6")
    steps = ("--steps", "24", "--eval-every", "0", "--train-limit", "64")
    first = tmp_path / "first"
    first.mkdir()
    with serving("--import", "token_model", "--state-dir", tmp_path / "state") as (server, address):
        narrow, _ = trained(address, first, *decay)
        command = ("edge-client", "--server", address, *SHARED, *decay, *steps, "--weights", narrow)
        quiet, saved = tmp_path / "quiet.safetensors", tmp_path / "saved.safetensors"
        assert run(*command, "--save", quiet).status == 0
        checkpoints = ("--checkpoint", tmp_path / "run", "--checkpoint-every", "2")
        metrics = tmp_path / "metrics.jsonl"
        with FaultyProxy(address, delay_s=0.03) as proxy:
            files = ("--save", saved, "--metrics", metrics)
            with running(
                "edge-client", "--server", proxy.address, *command[3:], *checkpoints, *files
            ) as client:
                while not metrics.exists() or '"step": 8,' not in metrics.read_text():
                    assert client.alive, client.err
                    time.sleep(0.02)
                client.signal(signal.SIGKILL)
                client.wait()
            ended = run("edge-client", "--resume", tmp_path / "run", "--import", "token_model")
        assert ended.status == 0, ended
        assert "Traceback" not in server.err
    states = load_state(quiet), load_state(saved)
    assert int(states[0]["bottleneck.cut1.encoder.0.steps"]) == 28
    assert states[0]["bottleneck.cut1.encoder.0.weight"].shape == (5, 24)
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_an_evaluation_outlasts_lost_links(address: str, tmp_path: Path) -> None:
    chosen = ("--test-limit", "1600", "--weights", "random")  # 400 chunks, some pieces
    scores = []
    for cuts in ([], [("forward", 40), ("forward", 400), ("ready", 10), ("forward", 1)]):
        plan = CutFrames([FrameCut(kind, at, skip=70 if kind == "forward" else 0) for kind, at in cuts])
        metrics = tmp_path / f"{len(cuts)}.jsonl"
        with FaultyProxy(address, plan) as proxy:
            command = ("edge-client", "evaluate", "--server", proxy.address, *SHARED, *chosen)
            ended = run(*command, "--metrics", metrics)
        assert (ended.status, ended.err) == (0, ""), ended
        assert ("the link was lost in the evaluation" in ended.out) is bool(cuts)
        assert not plan.cuts
        evaluation, summary = events(metrics)
        assert summary["reconnects"] == len(cuts)
        scores.append(evaluation)
    assert scores[0] == scores[1]


def test_ctrl_c_ends_an_evaluation_at_once(address: str) -> None:
    many = ("--test-limit", "1600", "--batch-size", "2", "--weights", "random")
    with running("edge-client", "evaluate", "--server", address, *SHARED, *many) as client:
        client.until(r"evaluating: batch")
        client.signal(signal.SIGINT)
        ended = client.wait()
    assert (ended.status, ended.err) == (130, "")
    assert ended.out.splitlines()[-1] == "stopped before the end of the test set"

"""`calibrate` and `--bottleneck` as commands: what is made on the edge alone is what both sides train from."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from common.weights import load_state
from tests.system.processes import Ended, events, run, serving

TOKENS = (
    *("--import", "token_model", "--model", "token_net", "--cut", "embed", "--cut", "blocks"),
    *("--image-size", "16", "--threads", "1", "--train-limit", "400"),
)
JOB = (
    *("--batch-size", "8", "--chunks", "2", "--test-limit", "60", "--memory-format", "contiguous"),
    *("--steps", "1", "--lr", "1e-9", "--momentum", "0"),
)


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with serving("--import", "token_model") as (server, address):
        yield address
        assert "Traceback" not in server.err


def calibrated(path: Path, *arguments: object) -> Ended:
    options = ("--samples", 200, "--batch-size", 25, "--epochs", 2, "--save", path)
    return run("edge-client", "calibrate", *TOKENS, *options, *arguments)


def train(address: str, *arguments: object) -> Ended:
    return run("edge-client", "--server", address, *TOKENS, *JOB, *arguments)


@pytest.mark.parametrize("spec", ["linear:6,4", "decay:rate=0.8,steps=300,iterations=3", "cut2=linear:6"])
def test_both_sides_train_from_what_was_calibrated(address: str, tmp_path: Path, spec: str) -> None:
    pair, model = tmp_path / "pair", tmp_path / "model.safetensors"
    ended = calibrated(pair, "--compress", spec)
    assert (ended.status, ended.err) == (0, ""), ended
    options = ("--compress", spec, "--bottleneck", pair, "--save", model, "--eval-every", 0)
    ended = train(address, *options)
    assert (ended.status, ended.err) == (0, ""), ended
    pair = pair.rename(tmp_path / "pair.safetensors")
    given, trained = load_state(pair), load_state(model)
    assert given.keys() == {name for name in trained if name.startswith("bottleneck.")}
    for name, tensor in given.items():
        if not name.endswith(".steps"):
            torch.testing.assert_close(trained[name], tensor, atol=1e-6, rtol=0, msg=name)


def test_calibrated_pairs_bring_a_model_nearer_to_itself(address: str, tmp_path: Path) -> None:
    """The test loss of the model with pairs, compared with that without any."""
    spec, losses = "linear:6,start=identity", {}
    assert calibrated(tmp_path / "pair", "--compress", spec).status == 0
    for name, options in {
        "plain": (),
        "identity": ("--compress", spec),
        "calibrated": ("--compress", spec, "--bottleneck", tmp_path / "pair"),
    }.items():
        metrics = tmp_path / f"{name}.jsonl"
        assert train(address, *options, "--metrics", metrics).status == 0
        lines = events(metrics)
        (losses[name],) = [line["loss"] for line in lines if line["event"] == "eval"]
    assert abs(losses["calibrated"] - losses["plain"]) < 0.5 * abs(losses["identity"] - losses["plain"])


def test_calibrating_says_what_it_does_and_how_well(tmp_path: Path) -> None:
    first, *_, one, two, last = calibrated(tmp_path / "pair", "--compress", "linear:6,4").out.splitlines()
    assert first == "recording cut 1, batch 1/8"
    for line, width in ((one, 6), (two, 4)):
        found = re.fullmatch(
            rf"cut\d: \[B,16,24\] as \[B,16,{width}\]; relative error at first (\S+), on principal axes (\S+)",
            line,
        )
        assert found, line
        assert 0 < float(found[2]) < float(found[1])
    assert last == f"the bottleneck is in {tmp_path / 'pair'}; train with --bottleneck {tmp_path / 'pair'}"


def test_file_for_another_spec_is_one_line_and_nothing_is_trained(address: str, tmp_path: Path) -> None:
    assert calibrated(tmp_path / "pair", "--compress", "linear:6").status == 0
    ended = train(address, "--compress", "linear:8", "--bottleneck", tmp_path / "pair")
    assert ended.status == 2
    assert ended.out == ""
    assert "for --compress linear:6 and linear:6, and this run has linear:8 and linear:8" in ended.error


WRONG = {
    "no file to write": ((), "Missing option '--save'"),
    "nothing to fit": (("--save", "pair", "--compress", "int8"), "inserts nothing to calibrate"),
    "a pair too wide": (("--save", "pair", "--compress", "linear:25"), "use a width up to 24"),
    "a directory that is not there": (
        ("--save", "no/pair", "--compress", "linear"),
        "there is no directory no",
    ),
    "a server": (("--server", "localhost", "--save", "pair"), "No such option '--server'"),
}


@pytest.mark.parametrize(("arguments", "says"), WRONG.values(), ids=WRONG)
def test_wrong_calibration_is_one_line(arguments: tuple[str, ...], says: str) -> None:
    ended = run("edge-client", "calibrate", *TOKENS, *arguments)
    assert (ended.status, ended.out) == (2, "")
    assert says in ended.error

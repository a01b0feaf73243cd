"""`edge-client plan` and `--compress auto` against a real server, also over a link held to a rate."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from edge.config import TrainConfig
from edge.trainer import train as train_here
from tests.system.processes import PATIENCE_S, TINY, Command, Ended, events, run, running, serving, train

RATE_MBIT_S = 4
WIDER = ("--image-size", "64")
"""Chunks of 128 KiB at either cut: enough to measure a slow link by."""


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    # One session at a time: what measures has to leave before training begins.
    with serving("--import", "dropout_model", "--max-sessions", 1) as (server, address):
        yield address
        assert "Traceback" not in server.err
        assert "protocol" not in server.err  # who only looks whether there is a server breaks none


@contextmanager
def slow(address: str) -> Iterator[str]:
    """Relay to a server at a rate; gives the address to connect to."""
    command = [sys.executable, "-m", "benchmarks.relay", address, str(RATE_MBIT_S * 1e6), "0.01"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as relay:
        try:
            assert relay.stdout is not None
            yield relay.stdout.readline().strip()
        finally:
            relay.kill()


def tiny_without(*left_out: str) -> list[str]:
    pairs = zip(TINY[::2], TINY[1::2], strict=True)
    return [word for option, value in pairs if option not in left_out for word in (option, value)]


def plan(*arguments: object) -> Ended:
    shared = tiny_without("--eval-every", "--train-limit", "--test-limit")
    return run("edge-client", "plan", *shared, *arguments)


def planned(*arguments: object) -> dict[str, Any]:
    ended = plan("--json", *arguments)
    assert ended.status == 0, ended
    report: dict[str, Any] = json.loads(ended.out)
    return report


def row_of(report: dict[str, Any], compress: str) -> dict[str, Any]:
    row: dict[str, Any] = next(row for row in report["rows"] if row["compress"] == compress.split())
    return row


def test_the_link_is_measured_and_bounds_what_is_not_compressed(address: str) -> None:
    with slow(address) as there:
        report = planned("--server", there, *WIDER)
    for rate_bit_s in (report["link"]["up_bit_s"], report["link"]["down_bit_s"]):
        assert RATE_MBIT_S * 1e6 / 2 < rate_bit_s < RATE_MBIT_S * 1e6 * 2  # a busy machine is slow
    assert report["link"]["delay_s"] >= 0.01
    none, int8 = row_of(report, "none"), row_of(report, "int8")
    assert none["bound_by"] in ("up", "down")
    assert none["step_s"] >= none["up_bytes"] * 8 / report["link"]["up_bit_s"]
    assert int8["step_s"] < none["step_s"]
    assert report["best"]["compress"] != ["none"]


def test_a_link_can_be_assumed_and_the_server_measured_all_the_same(address: str) -> None:
    ended = plan("--server", address, "--rate", 100, "--delay", 20)
    assert ended.status == 0, ended
    assert "measuring " + address + "\n" in ended.err
    assert "link: 100 Mbit/s up, 100 Mbit/s down, 20 ms each way; the cloud computes " in ended.out
    assert "\ntake: --compress " in ended.out


@pytest.mark.parametrize("compress", ["none", "int8", "conv:4x2,4x1+int8 cut1.grad=fp16", "int4:group=64"])
def test_as_many_bytes_cross_as_were_planned(address: str, tmp_path: Path, compress: str) -> None:
    report = planned("--rate", 10, "--compress", compress)
    metrics = tmp_path / "metrics.jsonl"
    chosen = [word for spec in compress.split() for word in ("--compress", spec)]
    ended = train(address, "--steps", 4, "--metrics", metrics, *chosen)
    assert (ended.status, ended.err) == (0, ""), ended
    third = events(metrics)[2]
    row = row_of(report, compress)
    for direction in ("up_bytes", "down_bytes"):
        # Begin, commit and what answers them come on top.
        assert row[direction] < third[direction] < row[direction] * 1.02 + 1500
    dense_bytes = third["dense_bytes"]
    assert row["compress_rate"] == pytest.approx((row["up_bytes"] + row["down_bytes"]) / dense_bytes)


def test_auto_chooses_for_the_link_that_there_is_and_trains(address: str, tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    with slow(address) as there:
        ended = train(there, *WIDER, "--steps", 2, "--compress", "auto", "--metrics", metrics)
    assert (ended.status, ended.err) == (0, ""), ended
    chosen = next(line for line in ended.out.splitlines() if line.startswith("auto chooses --compress "))
    spec = chosen.removeprefix("auto chooses --compress ").partition(":")[0]
    assert spec != "none"
    assert f"compress {spec}" in ended.out  # of the run itself
    assert "done: 2 steps" in ended.out
    assert [line["step"] for line in events(metrics) if line["event"] == "step"] == [1, 2]
    assert events(metrics)[-1]["compress_rate"] < 0.6


def test_what_auto_chose_stays_when_a_run_goes_on(tmp_path: Path) -> None:
    folder, state = tmp_path / "run", tmp_path / "state"
    with serving("--import", "dropout_model", "--state-dir", state) as (_, address):
        ended = train(address, "--epochs", 1, "--compress", "auto", "--checkpoint", folder)
        assert (ended.status, ended.err) == (0, ""), ended
        again = run("edge-client", "--resume", folder, "--import", "dropout_model")
    assert (again.status, again.err) == (0, ""), again
    assert "auto" not in again.out
    compress = next(line for line in ended.out.splitlines() if ", compress " in line)
    assert next(line for line in again.out.splitlines() if ", compress " in line) == compress


def test_auto_in_code(address: str) -> None:
    import dropout_model  # noqa: F401  (registers its model)

    result = train_here(
        TrainConfig(
            server=address,
            model="dropout_net",
            image_size=16,
            batch_size=8,
            chunks=2,
            steps=2,
            threads=1,
            train_limit=16,
            test_limit=8,
            compress="auto",
        )
    )
    assert result.steps == 2
    assert result.state


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--compress", "auto", "--compress", "grad=fp16"), "leave the others out"),
        (("--compress", "cut1=auto"), "leave the others out"),
        (("--compress", "auto+int8"), "auto"),
        (("--compress", "auto", "--bottleneck", "file"), "does not go with --bottleneck"),
    ],
)
def test_auto_stands_alone(address: str, arguments: tuple[str, ...], said: str) -> None:
    ended = train(address, "--steps", 1, *arguments)
    assert ended.status == 2
    assert said in ended.error


@pytest.mark.parametrize("command", ["flops", "calibrate", "evaluate"])
def test_auto_is_for_training(command: str) -> None:
    more = {"calibrate": ("--save", "file"), "evaluate": ("--server", "127.0.0.1:1")}.get(command, ())
    ended = run("edge-client", command, "--compress", "auto", *more)
    assert ended.status == 2
    assert "auto" in ended.error


def test_what_is_trained_with_does_not_matter_to_what_is_measured(address: str) -> None:
    # Steps that warm up for longer than is measured, and that no weights would survive.
    options = ("--schedule", "linear", "--warmup-steps", 8, "--steps", 10, "--lr", 1e30, "--compress", "auto")
    ended = train(address, *options)
    assert "auto chooses --compress " in ended.out, ended
    assert ended.status == 1  # of the training itself
    assert "gradients" in ended.error or "loss" in ended.error


def test_a_folder_that_holds_a_run_is_refused_before_anything_is_measured(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with serving("--import", "dropout_model", "--state-dir", tmp_path / "state") as (_, address):
        first = train(address, "--steps", 1, "--checkpoint", folder)
        assert (first.status, first.err) == (0, ""), first
        ended = train(address, "--steps", 1, "--checkpoint", folder, "--compress", "auto")
    assert ended.status == 2
    assert "holds a run already" in ended.error
    assert ended.out == ""


def until_it_measures(client: Command, told: Callable[[], str]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while "timing chunks" not in told():
        assert client.alive, client.err
        assert time.monotonic() < deadline, client.err
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_auto_that_is_interrupted_has_not_trained(address: str, number: signal.Signals) -> None:
    options = ("--image-size", 64, "--threads", 1, "--compress", "auto")
    with running("edge-client", "--server", address, *options) as client:
        until_it_measures(client, lambda: client.out)
        client.signal(number)
        ended = client.wait()
    assert (ended.status, ended.err) == (130, "")
    assert ended.out.endswith("stopped before the first step\n")


def test_a_plan_that_is_interrupted_says_so(address: str) -> None:
    with running("edge-client", "plan", "--server", address, "--image-size", 64, "--threads", 1) as client:
        until_it_measures(client, lambda: client.err)
        client.signal(signal.SIGINT)
        ended = client.wait()
    assert ended.status == 130
    assert ended.err.endswith("error: interrupted\n")
    assert "Traceback" not in ended.err
    assert ended.out == ""

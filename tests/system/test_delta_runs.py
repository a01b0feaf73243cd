"""delta in whole runs: what it saves, what it needs, and how it fails."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from common.weights import load_state
from tests.system.processes import Ended, assert_serves, events, serving, train

DELTA = ("--compress", "act=delta+int4", "--compress", "grad=int8", "--no-augment", "--train-limit", 32)
STEPS_AN_EPOCH = 4


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with serving("--import", "dropout_model", "--disk-limit", "1G") as (server, address):
        yield address
        assert_serves(address)
        assert "Traceback" not in server.err


def trained(address: str, folder: Path, *arguments: object) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    saved, metrics = folder / "model.safetensors", folder / "metrics.jsonl"
    limit = (
        ()
        if any("limit=" in str(argument) for argument in arguments)
        else ("--compress", "act=delta:limit=8M+int4")
    )
    ended = train(address, *DELTA[2:], *limit, *arguments, "--save", saved, "--metrics", metrics)
    assert (ended.status, ended.err) == (0, ""), ended
    return events(metrics), load_state(saved)


def steps(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [line for line in lines if line["event"] == "step"]


def test_first_epoch_costs_half_and_the_others_an_eighth(address: str, tmp_path: Path) -> None:
    lines, _ = trained(address, tmp_path, "--epochs", 3)
    dense = 8 * 8 * 8 * 8 * 4  # bytes of a batch at one cut
    up = [line["up_bytes"] for line in steps(lines)]
    first, second, third = (sum(up[at : at + STEPS_AN_EPOCH]) for at in range(0, 12, STEPS_AN_EPOCH))
    # The step after planning and heartbeats come on top of it.
    assert first - second == pytest.approx(STEPS_AN_EPOCH * dense * (1 / 2 - 1 / 8), rel=0.1)
    assert third == pytest.approx(second, rel=0.05)


def test_run_repeats_to_the_bit_and_evaluations_change_nothing(address: str, tmp_path: Path) -> None:
    runs = []
    for name, often in (("one", 0), ("two", 0), ("three", 1)):
        (tmp_path / name).mkdir()
        runs.append(trained(address, tmp_path / name, "--epochs", 3, "--eval-every", often))
    for lines, state in runs[1:]:
        assert [line["loss"] for line in steps(lines)] == [line["loss"] for line in steps(runs[0][0])]
        assert all(torch.equal(state[name], runs[0][1][name]) for name in runs[0][1])
    assert sum(line["event"] == "eval" for line in runs[2][0]) == 3 * STEPS_AN_EPOCH


def test_what_does_not_fit_is_sent_in_full(address: str, tmp_path: Path) -> None:
    fits, _ = trained(address, tmp_path, "--epochs", 2)
    half, _ = trained(address, tmp_path, "--epochs", 2, "--compress", "act=delta:limit=256K+int4")
    assert steps(half)[-1]["loss"] == pytest.approx(steps(fits)[-1]["loss"], rel=0.05)
    sent = [sum(line["up_bytes"] for line in steps(lines)[STEPS_AN_EPOCH:]) for lines in (fits, half)]
    assert sent[1] - sent[0] == pytest.approx(STEPS_AN_EPOCH / 2 * 8**4 * 4 * (1 / 2 - 1 / 8), rel=0.1)


def failed(ended: Ended, status: int) -> str:
    assert ended.status == status, ended
    return ended.error


def test_images_that_vary_are_refused(address: str) -> None:
    said = failed(train(address, "--compress", "delta+int4"), 2)
    assert "--compress delta sends what has changed" in said
    assert "give --no-augment" in said


def test_gradients_alone_do_not_need_the_same_images(address: str) -> None:
    ended = train(address, "--compress", "grad=delta+int4", "--steps", 1)
    assert (ended.status, ended.err) == (0, ""), ended


def test_more_disk_than_the_server_gives_is_refused_before_the_first_step(address: str) -> None:
    said = failed(train(address, *DELTA, "--steps", 1), 1)
    assert "delta may keep 8 GiB on the server's disk, where a client may have 1" in said
    assert "delta:limit=1G" in said


def test_spec_that_does_not_parse_points_at_the_character(address: str) -> None:
    assert "delta at character 6 of 'int8+delta' stands in a wrong place" in failed(
        train(address, "--compress", "int8+delta"), 2
    )
    assert "wrong at character 7 of 'delta:limit=4X': 'limit=4X' is no argument" in failed(
        train(address, "--compress", "delta:limit=4X"), 2
    )


def test_full_disk_of_the_server_is_one_line_here_and_one_there() -> None:
    with serving("--import", "dropout_model") as (server, address):
        _, hard = resource.prlimit(server.pid, resource.RLIMIT_FSIZE)
        # Beyond it a write fails as on a full disk.
        resource.prlimit(server.pid, resource.RLIMIT_FSIZE, (1 << 16, hard))
        said = failed(train(address, *DELTA, "--steps", 4), 1)
        assert "the server cannot go on: what delta keeps of the samples cannot be kept in /" in said
        assert "free some space there" in said
        assert_serves(address)
        assert "Traceback" not in server.err
        assert server.err.count("cannot be kept in") == 1

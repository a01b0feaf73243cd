"""Ctrl-C and SIGTERM while a client trains: once ends after the step and saves, twice ends at once."""

import re
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.weights import load_state
from tests.system.processes import TINY, assert_serves, events, running, serving

FOR_EVER = ("--steps", 1_000_000)


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with serving("--import", "dropout_model") as (server, address):
        yield address
        assert_serves(address)
        assert "Traceback" not in server.err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_run_ends_after_the_step_and_saves(
    address: str, tmp_path: Path, number: signal.Signals
) -> None:
    saved, metrics = tmp_path / "model.safetensors", tmp_path / "metrics.jsonl"
    files = ("--save", saved, "--metrics", metrics)
    with running("edge-client", "--server", address, *TINY, *FOR_EVER, *files) as client:
        client.until(r"step 1/")
        client.signal(number)
        ended = client.wait()
    assert (ended.status, ended.err) == (130, "")
    last = ended.out.splitlines()[-1]
    stopped = re.fullmatch(r"stopped after step (\d+) of 1000000", last)
    assert stopped, last
    assert "stopping after this step; Ctrl-C again stops now" in ended.out
    *steps, summary = events(metrics)
    assert summary["steps"] == steps[-1]["step"] == int(stopped[1])
    assert load_state(saved)


def test_interrupted_evaluation_ends_soon_and_saves(address: str, tmp_path: Path) -> None:
    saved = tmp_path / "model.safetensors"
    many = ("--test-limit", 1_000, "--batch-size", 2, "--steps", 1_000, "--eval-every", 1)
    with running("edge-client", "--server", address, *TINY, *many, "--save", saved) as client:
        client.until(r"step 1/")
        client.signal(signal.SIGINT)
        ended = client.wait()
    assert (ended.status, ended.err) == (130, "")
    assert re.search(r"^stopped after step [1-9]\d* of 1000$", ended.out, re.MULTILINE)
    assert load_state(saved)


def test_second_interrupt_ends_at_once_and_leaves_the_old_file(address: str, tmp_path: Path) -> None:
    saved = tmp_path / "model.safetensors"
    saved.write_text("older")
    # A step of many chunks, one at a time, outlasts the two signals by far.
    slow = ("--batch-size", 600, "--chunks", 600, "--depth", 1, "--train-limit", 600, "--steps", 1_000)
    with running("edge-client", "--server", address, *TINY, *slow, "--save", saved) as client:
        client.until(r"step 1/")
        client.signal(signal.SIGINT)
        client.until(r"stopping after this step")
        client.signal(signal.SIGINT)
        ended = client.wait()
    assert (ended.status, ended.err) == (130, "")
    last = ended.out.splitlines()[-1]
    assert re.fullmatch(r"stopped at once after step \d+ of 1000; nothing was saved", last), last
    assert saved.read_text() == "older"


def test_interrupt_before_the_first_step_ends_at_once(tmp_path: Path) -> None:
    saved = tmp_path / "model.safetensors"
    saved.write_text("older")
    # A server that takes the connection and says nothing.
    with (
        socket.create_server(("127.0.0.1", 0)) as silent,
        running(
            "edge-client", "--server", f"127.0.0.1:{silent.getsockname()[1]}", *TINY, "--save", saved
        ) as client,
    ):
        connection, _ = silent.accept()
        with connection:
            client.signal(signal.SIGINT)
            ended = client.wait()
    assert (ended.status, ended.err) == (130, "")
    assert ended.out == "stopped before the first step\n"
    assert saved.read_text() == "older"

"""A server that runs for long, in whole processes: watched, drained, crowded, short of memory and of disk.

Whatever happens to a client, its weights in the end are bitwise those of a quiet run."""

import http.client
import json
import math
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.faulty_proxy import FaultyProxy
from tests.system.processes import PATIENCE_S, TINY, Command, Ended, run, running, serving, train

LIBRARY = ("--import", "dropout_model")
STEPS = 12
PAGE = 4096


@dataclass(frozen=True)
class Quiet:
    """A run that nothing happened to: its weights, and the bytes of a checkpoint on each side."""

    weights: Path
    edge_bytes: int
    cloud_bytes: int

    def assert_same(self, weights: Path) -> None:
        expected, came = load_file(self.weights), load_file(weights)
        assert expected.keys() == came.keys()
        for name, tensor in expected.items():
            assert torch.equal(tensor, came[name]), name


@pytest.fixture(scope="module")
def quiet(tmp_path_factory: pytest.TempPathFactory) -> Quiet:
    folder = tmp_path_factory.mktemp("quiet")
    weights, kept, state = folder / "model.safetensors", folder / "run", folder / "state"
    with serving(*LIBRARY, "--state-dir", state) as (_, address):
        done(train(address, "--steps", STEPS, "--save", weights, "--checkpoint", kept))
    edge, cloud = (next(path.rglob(f"step-*{STEPS}.safetensors")).stat().st_size for path in (kept, state))
    return Quiet(weights, edge, cloud)


def done(ended: Ended) -> None:
    assert (ended.status, ended.err) == (0, ""), ended
    assert f"done: {STEPS} steps" in ended.out, ended


def until(what: Callable[[], bool], server: Command) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not what():
        assert time.monotonic() < deadline, server.err
        time.sleep(0.02)


def ask(server: Command, path: str) -> tuple[int, str]:
    """Ask the port for those who watch; status 0 where nobody answers."""
    port = re.search(r"metrics and health at http://127.0.0.1:(\d+)/", server.err)
    assert port, server.err
    try:
        connection = http.client.HTTPConnection("127.0.0.1", int(port[1]), timeout=PATIENCE_S)
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    except OSError:
        return 0, ""


def metric(server: Command, name: str) -> float:
    status, text = ask(server, "/metrics")
    assert status == 200
    found = re.search(rf"^isthmus_{re.escape(name)} (\S+)$", text, re.MULTILINE)
    assert found, text
    return float(found[1])


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


@contextmanager
def small_disk(path: Path, pages: int) -> Iterator[None]:
    """A disk of so many pages at a path, where one may be mounted."""
    path.mkdir()
    size = f"size={pages * PAGE},mode=700"
    if subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", path], capture_output=True).returncode:
        pytest.skip("only root may mount a small disk")
    try:
        yield
    finally:
        subprocess.run(["umount", path], check=True)


def pages_for_two(checkpoint_bytes: int) -> int:
    """A disk that has room for two checkpoints and what describes the run, and never for a third."""
    return 2 * math.ceil(checkpoint_bytes / PAGE) + 2


def test_server_is_watched_while_it_trains_and_while_it_drains(quiet: Quiet, tmp_path: Path) -> None:
    saved, port, state = tmp_path / "model.safetensors", free_port(), tmp_path / "state"
    with (
        serving(*LIBRARY, "--port", port, "--state-dir", state, "--metrics-port", 0) as (first, address),
        FaultyProxy(address, delay_s=0.25) as slow,  # a step takes a second, so the server drains for as long
        running(
            "edge-client", "--server", slow.address, *TINY, "--steps", STEPS, "--save", saved, "--depth", 1
        ) as client,
    ):
        client.until(r"step 1/")
        status, text = ask(first, "/health")
        assert (status, json.loads(text)["status"], json.loads(text)["sessions"]) == (200, "ok", 1)
        assert metric(first, 'sessions{state="active"}') == 1
        until(lambda: metric(first, "steps_total") >= 1, first)  # its commit is on the way
        assert metric(first, "draining") == 0
        first.signal(signal.SIGTERM)
        until(lambda: "shutting down" in first.err, first)
        status, text = ask(first, "/health")
        assert (status, json.loads(text)["status"]) == (503, "draining"), first.err
        assert metric(first, "draining") == 1
        ended = first.wait()
        assert ended.status == 0, ended
        assert "Traceback" not in ended.err
        slow.delay_s = 0.0  # of the connections to come
        with serving(*LIBRARY, "--port", port, "--state-dir", state, "--metrics-port", 0) as (second, _):
            until(lambda: metric(second, 'resumes_total{source="checkpoint"}') == 1, second)
            done(client.wait())
    quiet.assert_same(saved)


def test_job_that_is_too_large_is_refused_and_the_next_is_taken(quiet: Quiet, tmp_path: Path) -> None:
    saved = tmp_path / "model.safetensors"
    with serving(*LIBRARY, "--memory-limit", "150M", "--metrics-port", 0) as (server, address):
        large = train(address, "--steps", 1, "--image-size", 128, "--batch-size", 64, "--chunks", 1)
        assert large.status == 1, large
        assert re.search(r"the job takes about \S+ GiB of the server's memory", large.error)
        assert "use more chunks" in large.error
        assert metric(server, 'refused_total{reason="memory"}') == 1
        for _ in range(2):
            done(train(address, "--steps", STEPS, "--save", saved))
            quiet.assert_same(saved)


def test_session_that_nobody_uses_makes_way_and_is_found_again(quiet: Quiet, tmp_path: Path) -> None:
    away, other = tmp_path / "away.safetensors", tmp_path / "other.safetensors"
    options = ("--max-sessions", 1, "--state-dir", tmp_path / "state", "--heartbeat", 0.2)
    with (
        serving(*LIBRARY, *options, "--metrics-port", 0) as (server, address),
        FaultyProxy(address, delay_s=0.05) as slow,  # so that it has not ended before it is stopped
        running("edge-client", "--server", slow.address, *TINY, "--steps", STEPS, "--save", away) as client,
    ):
        client.until(r"step 1/")
        client.signal(signal.SIGSTOP)
        until(lambda: metric(server, 'sessions{state="active"}') == 0, server)
        done(train(address, "--steps", STEPS, "--save", other))
        assert "is parked" in server.err
        client.signal(signal.SIGCONT)
        done(client.wait())
        assert "Traceback" not in server.err
    quiet.assert_same(away)
    quiet.assert_same(other)


def test_client_of_a_full_server_waits_for_its_turn(quiet: Quiet, tmp_path: Path) -> None:
    # It asked for a session that the server had refused to open, once, and ended.
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    with (
        serving(*LIBRARY, "--max-sessions", 1) as (server, address),
        FaultyProxy(address, delay_s=0.04) as slow,
        running("edge-client", "--server", slow.address, *TINY, "--steps", STEPS, "--save", first) as client,
    ):
        client.until(r"step 1/")
        with running(
            "edge-client", "--server", address, *TINY, "--steps", STEPS, "--save", second
        ) as waiting:
            waiting.until("the server cannot take this run now: .*already serves as many clients as it may")
            done(client.wait())
            done(waiting.wait())
        assert "Traceback" not in server.err
    quiet.assert_same(first)
    quiet.assert_same(second)


def test_clients_that_train_at_once_do_not_change_each_other(quiet: Quiet, tmp_path: Path) -> None:
    files = [tmp_path / "one.safetensors", tmp_path / "other.safetensors"]
    with serving(*LIBRARY) as (_, address), ThreadPoolExecutor(2) as pool:
        for ended in pool.map(lambda file: train(address, "--steps", STEPS, "--save", file), files):
            done(ended)
    for file in files:
        quiet.assert_same(file)


def test_session_that_nobody_wants_any_more_leaves_the_disk(tmp_path: Path) -> None:
    state, kept = tmp_path / "state", tmp_path / "run"
    options = ("--state-dir", state, "--park-after", 1, "--forget-after", 1)
    with serving(*LIBRARY, *options) as (server, address):
        done(train(address, "--steps", STEPS, "--checkpoint", kept))
        until(lambda: [path.name for path in state.iterdir()] == ["lock"], server)
        ended = run("edge-client", "--resume", kept, *LIBRARY)
    assert ended.status == 1
    assert "does not know this session any more; start it with the --state-dir it had" in ended.error


@pytest.mark.parametrize("side", ["edge", "cloud"])
def test_training_goes_on_where_a_disk_is_full(quiet: Quiet, tmp_path: Path, side: str) -> None:
    saved, kept, state = tmp_path / "model.safetensors", tmp_path / "run", tmp_path / "state"
    small, size = (kept, quiet.edge_bytes) if side == "edge" else (state, quiet.cloud_bytes)
    limits = ("--state-dir", state, "--state-limit", "1T")
    with small_disk(small, pages_for_two(size)), serving(*LIBRARY, *limits) as (server, address):
        options = ("--steps", STEPS, "--save", saved, "--checkpoint", kept, "--checkpoint-every", 4)
        ended = train(address, *options)
        done(ended)
        where = "HERE" if side == "edge" else "ON THE SERVER"
        for step in (8, 12):
            assert re.search(
                rf"^NO CHECKPOINT OF STEP {step} {where}: .*no space left on device; training goes on$",
                ended.out,
                re.MULTILINE,
            ), ended.out
        there = sorted(path.name for path in small.rglob("step-*"))
        assert there == ["step-0000000000.safetensors", "step-0000000004.safetensors"]
        quiet.assert_same(saved)
        saved.unlink()
        if (
            side == "edge"
        ):  # from the old one, once there is room again; nothing has to be found for the server
            moved = tmp_path / "moved"
            shutil.copytree(kept, moved)
            done(run("edge-client", "--resume", moved, *LIBRARY))
            quiet.assert_same(saved)
        assert "Traceback" not in server.err

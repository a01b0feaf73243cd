"""Runs that are taken up again, in whole processes: the server drained and started anew, sessions parked and found,
checkpoints of the wrong run, full disks. The final weights are bitwise those of a quiet run."""

import json
import os
import shutil
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from edge.job import prepare
from tests.system.peer import Peer
from tests.system.processes import TINY, Command, Ended, events, run, running, serving, train
from tests.tiny_job import TINY_JOB
from tests.wire.pair import rejoin_of
from wire.auth import REJOINED, RESUME, prove
from wire.messages import Bye, Error, Open, Ready, Resume

LIBRARY = ("--import", "dropout_model")
SESSION, SECRET = bytes(range(16)), bytes(range(32))


@pytest.fixture(scope="module")
def quiet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The weights of 40 quiet steps."""
    path = tmp_path_factory.mktemp("quiet") / "model.safetensors"
    with serving(*LIBRARY) as (_, address):
        ended = train(address, "--steps", 40, "--save", path)
    assert ended.status == 0, ended
    return path


def assert_same(one: Path, other: Path) -> None:
    first, second = load_file(one), load_file(other)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


@pytest.fixture
def port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "state"


def serving_at(port: int, state: Path, *arguments: object) -> "Iterator[tuple[Command, str]]":
    return serving(*LIBRARY, "--port", port, "--state-dir", state, *arguments)  # type: ignore[return-value]


def done(ended: Ended) -> None:
    assert ended.status == 0, ended
    assert ended.err == "", ended
    assert "done: 40 steps" in ended.out


def test_server_that_is_drained_and_started_again_goes_on(
    quiet: Path, port: int, state: Path, tmp_path: Path
) -> None:
    saved, metrics = tmp_path / "model.safetensors", tmp_path / "metrics.jsonl"
    options = ("--steps", 40, "--save", saved, "--metrics", metrics)
    with (
        serving_at(port, state) as (first, address),
        running("edge-client", "--server", address, *TINY, *options) as client,
    ):
        client.until(r"step 1/")
        first.signal(signal.SIGTERM)
        ended = first.wait()
        assert ended.status == 0, ended
        assert "Traceback" not in ended.err
        with serving_at(port, state):
            done(client.wait())
    assert_same(saved, quiet)
    records = events(metrics)
    assert [record["step"] for record in records if record["event"] == "step"] == list(range(1, 41))


def test_client_that_is_killed_goes_on_from_its_checkpoint_alone(
    quiet: Path, port: int, state: Path, tmp_path: Path
) -> None:
    saved, folder, metrics = tmp_path / "model.safetensors", tmp_path / "run", tmp_path / "metrics.jsonl"
    options = ("--steps", 40, "--save", saved, "--metrics", metrics, "--checkpoint", folder)
    with serving_at(port, state) as (_, address):
        with running("edge-client", "--server", address, *TINY, *options, "--checkpoint-every", 5) as client:
            client.until(r"step 1/")
            while not list(folder.glob("step-*5.safetensors")):
                time.sleep(0.01)
            client.signal(signal.SIGKILL)
            client.wait()
        done(run("edge-client", "--resume", folder, *LIBRARY))
    assert_same(saved, quiet)
    records = events(metrics)
    assert [record["step"] for record in records if record["event"] == "step"] == list(range(1, 41))
    assert json.loads((folder / "run.json").read_text())["settings"]["steps"] == 40
    assert os.stat(folder / "run.json").st_mode & 0o077 == 0


def test_run_that_is_stopped_and_one_that_is_done_can_be_gone_on_with(
    quiet: Path, port: int, state: Path, tmp_path: Path
) -> None:
    saved, folder = tmp_path / "model.safetensors", tmp_path / "run"
    options = ("--steps", 40, "--save", saved, "--checkpoint", folder, "--checkpoint-every", 1000)
    with serving_at(port, state) as (_, address):
        with running("edge-client", "--server", address, *TINY, *options) as client:
            client.until(r"step 1/")
            client.signal(signal.SIGINT)
            ended = client.wait()
        assert ended.status in (0, 130), ended
        moved = address.replace("127.0.0.1", "localhost")
        for given in (("--server", moved), ()):
            done(run("edge-client", "--resume", folder, *LIBRARY, *given))
            assert_same(saved, quiet)
            assert json.loads((folder / "run.json").read_text())["settings"]["server"] == moved


@pytest.mark.parametrize("side", ["edge", "cloud"])
def test_checkpoint_that_the_disk_has_damaged_is_passed_over(
    quiet: Path, port: int, state: Path, tmp_path: Path, side: str
) -> None:
    saved, folder = tmp_path / "model.safetensors", tmp_path / "run"
    options = ("--steps", 40, "--save", saved, "--checkpoint", folder, "--checkpoint-every", 5)
    with serving_at(port, state) as (_, address):
        assert train(address, *options).status == 0
    saved.unlink()
    newest = max((folder if side == "edge" else state).rglob("step-*"))
    content = bytearray(newest.read_bytes())
    content[-200] ^= 1
    newest.write_bytes(content)
    with serving_at(port, state) as (server, _):
        ended = run("edge-client", "--resume", folder, *LIBRARY)
        done(ended)
        assert f"{newest} IS DAMAGED" in (ended.out if side == "edge" else server.err)
    assert_same(saved, quiet)
    assert "going on to step 35" in ended.out


def test_run_whose_checkpoints_are_all_damaged_ends_and_stays_as_it_is(
    port: int, state: Path, tmp_path: Path
) -> None:
    folder, metrics = tmp_path / "run", tmp_path / "metrics.jsonl"
    options = ("--steps", 10, "--metrics", metrics, "--checkpoint", folder, "--checkpoint-every", 5)
    with serving_at(port, state) as (_, address):
        assert train(address, *options).status == 0
        for path in folder.glob("step-*"):
            content = bytearray(path.read_bytes())
            content[-200] ^= 1
            path.write_bytes(content)
        before = (folder / "run.json").read_text(), metrics.read_text()
        ended = run("edge-client", "--resume", folder, *LIBRARY)
    assert ended.status == 1
    assert "have no checkpoint of the same step: the client has none" in ended.error
    assert ((folder / "run.json").read_text(), metrics.read_text()) == before


@pytest.mark.parametrize("server_knows", [True, False])
def test_client_that_is_killed_before_its_first_checkpoint_begins_anew(
    quiet: Path, port: int, state: Path, tmp_path: Path, server_knows: bool
) -> None:
    saved, folder, metrics = tmp_path / "model.safetensors", tmp_path / "run", tmp_path / "metrics.jsonl"
    options = ("--steps", 40, "--save", saved, "--metrics", metrics, "--checkpoint", folder)
    with serving_at(port, state) as (_, address):
        assert train(address, *options).status == 0
        for path in folder.glob("step-*"):
            path.unlink()
        if not server_knows:
            for path in state.glob("*/step-*"):
                path.unlink()
        saved.unlink()
        done(run("edge-client", "--resume", folder, *LIBRARY))
    assert_same(saved, quiet)
    records = events(metrics)
    assert [record["step"] for record in records if record["event"] == "step"] == list(range(1, 41))


def test_lost_state_of_the_server_is_one_line(port: int, state: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with serving_at(port, state) as (_, address):
        assert train(address, "--steps", 4, "--checkpoint", folder).status == 0
    shutil.rmtree(state)
    with serving_at(port, state):
        ended = run("edge-client", "--resume", folder, *LIBRARY)
    assert ended.status == 1
    assert "does not know this session" in ended.error


def test_other_settings_are_refused_with_the_difference_named(port: int, state: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with serving_at(port, state) as (_, address):
        assert train(address, "--steps", 4, "--lr", 0.25, "--checkpoint", folder).status == 0
        for option, value, said in (
            ("--lr", 0.5, "0.25"),
            ("--optimizer", "adamw", "left out"),
            ("--steps", 8, "4"),
        ):
            ended = run("edge-client", "--resume", folder, *LIBRARY, option, value)
            assert ended.status == 2, ended
            assert option in ended.error
            assert said in ended.error
        again = train(address, "--steps", 4, "--checkpoint", folder)
        assert again.status == 2
        assert "--resume" in again.error


def test_checkpoint_of_another_job_is_refused_with_the_difference_named(
    port: int, state: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    with serving_at(port, state) as (_, address):
        assert train(address, "--steps", 4, "--checkpoint", folder).status == 0
        description = json.loads((folder / "run.json").read_text())
        description["settings"]["momentum"] = 0.5
        (folder / "run.json").write_text(json.dumps(description))
        ended = run("edge-client", "--resume", folder, *LIBRARY)
    assert ended.status == 2, ended
    assert "optim.momentum: 0.5 here, 0.9 in the checkpoint" in ended.error


def test_server_that_keeps_nothing_says_so_before_training(tmp_path: Path) -> None:
    with serving(*LIBRARY) as (_, address):
        ended = train(address, "--steps", 4, "--checkpoint", tmp_path / "run")
    assert ended.status == 2
    assert "--state-dir" in ended.error


@pytest.mark.parametrize("folder", ["missing", "empty", "damaged"])
def test_folder_without_a_run_is_one_line(folder: str, tmp_path: Path) -> None:
    path = tmp_path / folder
    if folder != "missing":
        path.mkdir()
    if folder == "damaged":
        (path / "run.json").write_text('{"version": 1, "session": "zz"}')
    ended = run("edge-client", "--resume", path)
    assert ended.status == 2
    assert ended.error.startswith(f"--resume {path}")


def test_two_servers_do_not_share_a_folder(port: int, state: Path) -> None:
    with serving_at(port, state):
        ended = run("cloud-server", "--cpu", "--port", 0, "--state-dir", state)
    assert ended.status == 2
    assert "another cloud-server uses" in ended.error


def test_idle_session_leaves_memory_and_is_brought_back(
    quiet: Path, port: int, state: Path, tmp_path: Path
) -> None:
    saved = tmp_path / "model.safetensors"
    with (
        serving_at(port, state, "--park-after", 1, "--heartbeat", 0.2) as (server, address),
        running("edge-client", "--server", address, *TINY, "--steps", 40, "--save", saved) as client,
    ):
        client.until(r"step 1/")
        client.signal(signal.SIGSTOP)
        deadline = time.monotonic() + 30
        while "is parked" not in server.err:
            assert time.monotonic() < deadline, server.err
            time.sleep(0.05)
        client.signal(signal.SIGCONT)
        done(client.wait())
    assert_same(saved, quiet)


def job_map() -> dict[str, Any]:
    return prepare(TINY_JOB).spec.to_map()


def greeted(address: str) -> Peer:
    peer = Peer(address)
    peer.greet()
    return peer


def resume(peer: Peer, secret: bytes = SECRET, session: bytes = SESSION) -> Resume:
    mac = prove(secret, RESUME, peer.welcome.nonce, session)
    return Resume(session, mac, 0, True, None, [])


def test_nobody_takes_up_a_session_of_another() -> None:
    with serving(*LIBRARY) as (_, address), greeted(address) as owner:
        owner.send(Open(SESSION, SECRET, job_map()))
        assert isinstance(owner.receive(), Ready)
        for secret, session, code in (
            (bytes(32), SESSION, "wrong_secret"),
            (SECRET, bytes(16), "unknown_session"),
        ):
            with greeted(address) as stranger:
                stranger.send(resume(stranger, secret, session))
                error = stranger.receive()
                assert isinstance(error, Error)
                assert error.code == code
        with greeted(address) as replayer:
            replayer.send(Open(SESSION, SECRET, job_map()))
            error = replayer.receive()
            assert isinstance(error, Error)
            assert error.code == "session_exists"
        owner.send(Bye("done"))  # it still has its session
        assert owner.receive() is None or isinstance(owner.receive(), Bye | None)


def test_owner_that_comes_back_takes_the_session_from_its_old_connection() -> None:
    with serving(*LIBRARY) as (_, address), greeted(address) as old, greeted(address) as new:
        old.send(Open(SESSION, SECRET, job_map()))
        assert isinstance(old.receive(), Ready)
        new.send(resume(new))
        ready = new.receive()
        assert isinstance(ready, Ready)
        assert ready.step == 0
        assert old.receive() is None


def test_proof_for_one_connection_is_none_for_another() -> None:
    with serving(*LIBRARY) as (_, address), greeted(address) as old, greeted(address) as new:
        old.send(Open(SESSION, SECRET, job_map()))
        assert isinstance(old.receive(), Ready)
        new.send(resume(old))  # as somebody would who had recorded it
        error = new.receive()
        assert isinstance(error, Error)
        assert error.code == "wrong_secret"


def test_ticket_lets_its_owner_in_once() -> None:
    with serving(*LIBRARY) as (_, address):
        with greeted(address) as first:
            first.send(Open(SESSION, SECRET, job_map()))
            ready = first.receive()
            assert isinstance(ready, Ready)
            assert ready.mac is None
            with Peer(address) as second:
                asks = rejoin_of(SESSION, SECRET, ready.ticket)
                second.send(asks)
                again = second.receive()
                assert isinstance(again, Ready)
                assert again.mac == prove(SECRET, REJOINED, asks.nonce, asks.mac)
                assert again.ticket != ready.ticket
                assert first.receive() is None  # its session is with the other connection
                for replayed in (asks, rejoin_of(SESSION, SECRET, ready.ticket)):
                    with Peer(address) as third:
                        third.send(replayed)
                        assert third.error().code == "stale_ticket"
                with Peer(address) as stranger:
                    stranger.send(rejoin_of(SESSION, bytes(32), again.ticket))
                    assert stranger.error().code == "stale_ticket"
        with Peer(address) as fourth:  # what strangers try does not use it up
            fourth.send(rejoin_of(SESSION, SECRET, again.ticket))
            assert isinstance(fourth.receive(), Ready)

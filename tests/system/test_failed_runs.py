"""Runs that fail: one line that says what happened, exit status 1, nothing hung, nothing lost."""

import asyncio
import re
import resource
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import dropout_model  # noqa: F401  (registers its model here too)
from common.model_spec import ModelSpec
from common.models import build_model
from common.weights import load_state
from edge.data.draws import epoch_order
from tests.system.processes import TINY, Command, Ended, assert_serves, events, running, serving, train
from wire.config import WireConfig
from wire.transport import serve

FOR_EVER = ("--steps", 1_000_000)


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[Command, str]]:
    with serving("--import", "dropout_model") as started:
        yield started
        command, address = started
        assert_serves(address)
        assert "Traceback" not in command.err


@pytest.fixture
def address(server: tuple[Command, str]) -> str:
    return server[1]


def failure(ended: Ended) -> str:
    """The one line of a run that failed."""
    assert ended.status == 1, ended
    return ended.error


# Nobody there, or somebody else.


@contextmanager
def listening(answer: Callable[[socket.socket], None]) -> Iterator[str]:
    """Answer connections in a thread; gives the address."""

    def serve_all() -> None:
        with suppress(OSError):  # the listener is shut down
            while True:
                connection, _ = listener.accept()
                with connection:
                    answer(connection)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve_all)
        thread.start()
        try:
            yield f"127.0.0.1:{listener.getsockname()[1]}"
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


def test_nothing_listening_says_so() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # taken, and not listened on
        address = f"127.0.0.1:{unused.getsockname()[1]}"
        said = failure(train(address))
    assert (
        said
        == f"cannot connect to {address}: nothing is listening there; start cloud-server, or check host and port"
    )


def test_host_that_does_not_exist_says_so() -> None:
    assert "there is no host of that name" in failure(train("cloud.invalid:7433"))


def test_http_server_is_recognised() -> None:
    def refuse(connection: socket.socket) -> None:
        connection.recv(1 << 16)
        connection.sendall(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n")

    with listening(refuse) as address:
        said = failure(train(address))
    assert "that port speaks HTTP, not the Isthmus protocol" in said


def test_other_protocol_is_recognised() -> None:
    with listening(lambda connection: connection.sendall(b"SSH-2.0-OpenSSH_9.6\r\n")) as address:
        assert "that port speaks something else" in failure(train(address))


def test_server_that_hangs_up_at_once_says_so() -> None:
    with listening(lambda connection: None) as address:
        assert "hung up before saying welcome" in failure(train(address))


@contextmanager
def isthmus_of_version(number: int) -> Iterator[str]:
    """A server that speaks another version of the protocol; gives its address."""
    started, ended = threading.Event(), None
    address = ""

    async def work() -> None:
        nonlocal ended, address
        ended = asyncio.Event()
        server = await serve(
            "127.0.0.1", 0, lambda connection: connection.close(), WireConfig(versions=(number,))
        )
        address = f"127.0.0.1:{server.port}"
        started.set()
        await ended.wait()
        await server.close()

    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_until_complete, args=(work(),))
    thread.start()
    started.wait()
    yield address
    assert ended is not None
    loop.call_soon_threadsafe(ended.set)
    thread.join()
    loop.close()


def test_version_mismatch_names_both_versions() -> None:
    with isthmus_of_version(9) as address:
        said = failure(train(address))
    assert "version 9" in said
    assert "version 3" in said
    assert "upgrade the older one" in said


def test_model_that_only_the_client_knows_is_refused_by_name() -> None:
    with serving() as (_, address):
        said = failure(train(address))
    assert "dropout_net" in said


# Training that cannot go on.

DIVERGING = ("--lr", "1e38", "--momentum", 0, "--steps", 50)


@pytest.mark.parametrize("compress", ["none", "int8", "fp16+lz4", "conv"])
def test_loss_that_is_not_a_number_stops_and_keeps_the_last_good_weights(
    address: str, tmp_path: Path, compress: str
) -> None:
    saved, metrics = tmp_path / "model.safetensors", tmp_path / "metrics.jsonl"
    many = ("--compress", compress, "--chunks", 8, "--depth", 8)
    said = failure(train(address, *DIVERGING, *many, "--save", saved, "--metrics", metrics))
    *steps, summary = events(metrics)
    assert steps, "the first step was good"
    assert said.startswith(("the loss of step", "the gradients of step"))
    assert said.endswith(f"the weights of step {len(steps)} are in {saved}")
    assert summary["event"] == "summary"
    assert summary["steps"] == len(steps)
    again = tmp_path / "again.safetensors"
    good = train(address, *DIVERGING, *many, "--steps", len(steps), "--save", again)
    assert good.status == 0, good
    kept, expected = load_state(saved), load_state(again)
    assert kept.keys() == expected.keys()
    assert all(torch.equal(kept[name], expected[name]) for name in kept)


@pytest.mark.parametrize("lr", ["1e10", "3e38"])
def test_weights_that_are_not_finite_take_no_file_s_place(address: str, tmp_path: Path, lr: str) -> None:
    saved = tmp_path / "model.safetensors"
    saved.write_text("older")
    said = failure(train(address, "--lr", lr, "--momentum", 0, "--steps", 50, "--save", saved))
    if said.endswith("give a lower --lr"):
        assert re.search(r"^the (loss|gradients) of step .*; the weights of step \d+ are not finite \(", said)
        assert saved.read_text() == "older"
    else:
        assert all(tensor.isfinite().all() for tensor in load_state(saved).values())


def test_a_bottleneck_does_not_start_from_weights_that_are_not_finite(address: str, tmp_path: Path) -> None:
    state = initial_state()
    first = next(name for name in state if name.endswith("weight"))
    torch.save({**state, first: torch.full_like(state[first], torch.nan)}, tmp_path / "nan.pt")
    ended = train(address, "--weights", tmp_path / "nan.pt", "--compress", "conv")
    assert ended.status == 2, ended
    assert "what crosses cut 1 is not finite" in ended.error


def test_diverging_without_a_file_says_how_to_keep_the_weights(address: str) -> None:
    assert failure(train(address, *DIVERGING)).endswith("give --save to keep the last good weights")


def test_nothing_good_to_keep_leaves_the_old_file(address: str, tmp_path: Path) -> None:
    weights, saved = tmp_path / "nan.pt", tmp_path / "model.safetensors"
    state = initial_state()
    torch.save({**state, "head.3.weight": torch.full_like(state["head.3.weight"], torch.nan)}, weights)
    saved.write_text("older")
    said = failure(train(address, "--weights", weights, "--save", saved))
    assert said.endswith("no step had been made, so nothing was saved")
    assert saved.read_text() == "older"


def initial_state() -> dict[str, torch.Tensor]:
    return build_model(ModelSpec(name="dropout_net", num_classes=10)).state_dict()


def damaged_folder(path: Path, split: str) -> tuple[str, Path]:
    """Images of two classes, and the one that is cut short: the last that the first epoch comes to."""
    images = {}
    for part in ("train", "test"):
        images[part] = [path / part / label / f"{i:02}.jpg" for label in ("cat", "dog") for i in range(32)]
        for image in images[part]:
            image.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 24, 3), np.uint8)).save(image)
    damaged = images[split][epoch_order(64, 0, 0)[-1]]
    damaged.write_bytes(damaged.read_bytes()[:-200])
    return f"folder:{path}", damaged


@pytest.mark.parametrize("split", ["train", "test"])
def test_truncated_image_is_named_and_what_was_learnt_is_kept(
    address: str, tmp_path: Path, split: str
) -> None:
    (data, damaged), saved = damaged_folder(tmp_path / "data", split), tmp_path / "model.safetensors"
    limits = ("--train-limit", 1000, "--test-limit", 1000, "--eval-every", 2)
    said = failure(train(address, *limits, "--data", data, "--save", saved, "--epochs", 2))
    assert str(damaged) in said
    assert "truncated" in said
    assert f"are in {saved}" in said
    assert load_state(saved)


# Disks that are full.


@pytest.mark.skipif(sys.platform != "linux", reason="limits another process's files")
def test_full_disk_leaves_the_old_model(address: str, tmp_path: Path) -> None:
    saved = tmp_path / "model.safetensors"
    saved.write_text("older")
    with running("edge-client", "--server", address, *TINY, *FOR_EVER, "--save", saved) as client:
        client.until(r"step 1/")
        resource.prlimit(client.pid, resource.RLIMIT_FSIZE, (4096, 4096))
        client.signal(signal.SIGINT)
        said = failure(client.wait())
    assert "the model of step" in said
    assert f"could not be written to {saved}: File too large" in said
    assert saved.read_text() == "older"
    assert [path.name for path in tmp_path.iterdir()] == [saved.name]


@pytest.mark.skipif(sys.platform != "linux", reason="limits another process's files")
def test_full_disk_leaves_the_old_trace(address: str, tmp_path: Path) -> None:
    trace = tmp_path / "trace.json"
    trace.write_text("older")
    with running("edge-client", "--server", address, *TINY, *FOR_EVER, "--trace", trace) as client:
        client.until(r"step 1/")
        resource.prlimit(client.pid, resource.RLIMIT_FSIZE, (4096, 4096))
        client.signal(signal.SIGINT)
        said = failure(client.wait())
    assert f"the timeline could not be written to {trace}: File too large" in said
    assert trace.read_text() == "older"
    assert [path.name for path in tmp_path.iterdir()] == [trace.name]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no disk that is always full")
def test_full_disk_of_the_metrics_is_said_once_and_training_goes_on(address: str, tmp_path: Path) -> None:
    saved = tmp_path / "model.safetensors"
    ended = train(address, "--steps", 3, "--metrics", "/dev/full", "--save", saved)
    assert (ended.status, ended.err) == (0, "")
    assert ended.out.count("METRICS ARE BEING LOST: cannot write to /dev/full (No space left on device)") == 1
    assert "done: 3 steps" in ended.out
    assert load_state(saved)


# The other side goes.


def test_server_killed_while_training_is_one_line(tmp_path: Path) -> None:
    with (
        serving("--import", "dropout_model") as (server, address),
        running("edge-client", "--server", address, *TINY, *FOR_EVER, "--give-up-after", 0.5) as client,
    ):
        client.until(r"step 1/")
        server.signal(signal.SIGKILL)
        said = failure(client.wait())
    assert said.startswith(f"the link to {address} was lost after step ")
    assert "nothing is listening there" in said


def test_server_told_to_end_while_training_says_bye_and_exits_well() -> None:
    with (
        serving("--import", "dropout_model") as (server, address),
        running("edge-client", "--server", address, *TINY, *FOR_EVER) as client,
    ):
        client.until(r"step 1/")
        server.signal(signal.SIGTERM)
        said = failure(client.wait())
        ended = server.wait()
    assert re.search(
        r"was lost after step \d+ of 1000000: .* the server was stopped, and keeps nothing on disk", said
    )
    assert ended.status == 0, ended
    assert "Traceback" not in ended.err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_idle_server_ends_well_when_told_to(number: signal.Signals) -> None:
    with serving() as (server, _):
        server.signal(number)
        ended = server.wait()
    assert ended.status == 0, ended
    assert "Traceback" not in ended.err


def test_client_killed_while_training_leaves_the_server_serving(server: tuple[Command, str]) -> None:
    command, address = server
    with running("edge-client", "--server", address, *TINY, *FOR_EVER) as client:
        client.until(r"step 1/")
        client.signal(signal.SIGKILL)
        assert client.wait().status == -signal.SIGKILL
    assert_serves(address)
    assert "Traceback" not in command.err


# Tracebacks.


@pytest.mark.parametrize(
    "arguments", [DIVERGING, ("--lr", "-1")], ids=["a failed run", "a wrong command line"]
)
def test_traceback_comes_with_debug_only(address: str, arguments: tuple[object, ...]) -> None:
    assert "Traceback" not in train(address, *arguments).err
    ended = train(address, *arguments, "--debug")
    assert "Traceback" in ended.err
    assert ended.status != 0

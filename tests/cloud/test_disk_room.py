"""Where the disk has no room for all sessions, none goes whose client is about to come back."""

import asyncio
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from cloud.limits import Crowded, DiskFull, Refused, TooLarge
from cloud.server import ServerConfig, _reason, running_server
from cloud.service import Service
from cloud.session import Session
from common.checkpoints import CheckpointFolder
from common.errors import IsthmusError, UserError
from edge.job import prepare
from tests.cloud.fake_client import Client
from tests.cloud.test_service import Serving, ended, in_use, later, never_built, parked, run, served
from tests.tiny_job import TINY_JOB
from wire.messages import Ready, Save, Saved

Ends = tuple[Client, "asyncio.Task[None]"]


@pytest.fixture(scope="module")
def spec() -> Any:
    return prepare(TINY_JOB).spec


@pytest.fixture(scope="module")
def one(spec: Any, tmp_path_factory: pytest.TempPathFactory) -> int:
    """Bytes of a session with one checkpoint."""
    folder = tmp_path_factory.mktemp("one")

    async def measure() -> None:
        async with served(folder) as serving:
            await serving.at_rest(spec)

    run(measure)
    return in_use(folder)


async def save(serving: Serving, client: Client, step: int, keep: int) -> str:
    """Have a checkpoint of a session written; what went wrong."""
    session = serving.register.tenants[client.key].session
    assert session is not None
    session.concluded = step
    client.say(Save(step, keep))
    count = 1 + sum(isinstance(message, Saved) for message in client.sent)
    error: str = (await client.until(Saved, count)).error
    return error


async def saved(serving: Serving, spec: Any, *steps: int) -> Ends:
    """A client with checkpoints of those steps."""
    client, attending = await serving.opened(spec)
    for step in steps:
        assert await save(serving, client, step, 0) == ""
    return client, attending


async def left(*all_ends: Ends) -> None:
    for client, attending in all_ends:
        client.abort()
        await ended(attending)


async def comes_back(serving: Serving, client: Client, *steps: int) -> Client:
    again = Client(client.key, client.secret)
    again.resumes(steps[-1], *steps)
    attending = serving.attend(again)
    ready = asyncio.create_task(again.until(Ready))
    await asyncio.wait((attending, ready), return_when=asyncio.FIRST_COMPLETED)
    if attending.done():
        ready.cancel()
        await attending
    return again


async def refused(serving: Serving, spec: Any) -> str:
    client = Client()
    client.opens(spec)
    with pytest.raises(Refused) as error:
        await serving.attend(client)
    return error.value.code


def test_clients_come_back_after_a_restart_to_more_than_the_limit(
    spec: Any, one: int, tmp_path: Path
) -> None:
    async def test() -> None:
        limit = int(5.9 * one)
        async with served(tmp_path, state_bytes=limit) as serving:
            both = [await saved(serving, spec, 0, 5) for _ in range(2)]
            for client, _ in both:
                serving.register.tenants[client.key].session.concluded = 12  # type: ignore[union-attr]
            await left(*both)
            await serving.service.drain(5)
        limit = int(4.5 * one)
        assert in_use(tmp_path) > limit
        for client, _ in both:  # the server was away for long
            os.utime(tmp_path / client.key.hex(), (1e9, 1e9))
        async with served(tmp_path, state_bytes=limit, forget_s=1e10) as serving:
            sweeping = asyncio.create_task(serving.register.sweep())
            await asyncio.sleep(0.2)
            for client, _ in both:
                await comes_back(serving, client, 0, 5, 12)
            sweeping.cancel()

    run(test)


def test_what_is_too_much_after_a_restart_goes_when_nobody_has_come_for_it(
    spec: Any, one: int, tmp_path: Path
) -> None:
    async def test() -> None:
        async with served(tmp_path) as serving:
            clients = [await parked(serving, spec), await parked(serving, spec)]
            os.utime(tmp_path / clients[0].key.hex(), (1e9, 1e9))
        async with served(tmp_path, state_bytes=one + one // 2, forget_s=1e10) as serving:
            assert serving.register.disk is not None
            await serving.register.disk.forget_old()
            assert len(os.listdir(tmp_path)) == 2
            later(serving)
            await serving.register.disk.forget_old()
            assert os.listdir(tmp_path) == [clients[1].key.hex()]

    run(test)


def test_session_whose_link_was_lost_a_moment_ago_does_not_go_for_a_new_one(
    spec: Any, one: int, tmp_path: Path
) -> None:
    async def test() -> None:
        async with served(tmp_path, sessions=1, state_bytes=int(3.2 * one)) as serving:
            ends = await saved(serving, spec, 0, 5)
            serving.register.tenants[ends[0].key].session.concluded = 7  # type: ignore[union-attr]
            await left(ends)
            assert await refused(serving, spec) == "busy"  # its client tries again
            await left((await comes_back(serving, ends[0], 0, 5, 7), ends[1]))

    run(test)


def test_client_that_is_refused_and_tries_again_keeps_its_session(
    spec: Any, one: int, tmp_path: Path
) -> None:
    async def test() -> None:
        async with served(tmp_path) as serving:
            waiting, gone = await parked(serving, spec), await parked(serving, spec)
            os.utime(tmp_path / waiting.key.hex(), (1e9, 1e9))
            os.utime(tmp_path / gone.key.hex(), (1.1e9, 1.1e9))
        limits = {"sessions": 1, "state_bytes": int(4.2 * one), "park_s": 1e6, "forget_s": 1e9}
        async with served(tmp_path, **limits) as serving:
            ends = await saved(serving, spec, 0, 5)
            for _ in range(2):
                later(serving)
                with pytest.raises(Refused, match="as many clients") as error:
                    await comes_back(serving, waiting, 0)
                assert error.value.code == "busy"
            assert await save(serving, ends[0], 10, 0) == ""
            assert set(os.listdir(tmp_path)) == {waiting.key.hex(), ends[0].key.hex()}
            await left(ends)

    run(test)


def test_several_checkpoints_at_once_do_not_take_the_same_room(
    spec: Any, one: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = CheckpointFolder.write

    def slowly(folder: CheckpointFolder, *arguments: Any) -> None:
        time.sleep(0.3)
        write(folder, *arguments)

    async def test() -> None:
        async with served(tmp_path, sessions=3, state_bytes=int(3.95 * one)) as serving:
            three = [await saved(serving, spec, 0) for _ in range(2)]
            three.append(await serving.opened(spec))
            assert await save(serving, three[-1][0], 0, 0) == ""
            with monkeypatch.context() as patched:
                patched.setattr(CheckpointFolder, "write", slowly)
                errors = await asyncio.gather(*(save(serving, client, 5, 0) for client, _ in three))
            assert sorted(map(bool, errors)) == [False, True, True]
            assert in_use(tmp_path) < 4 * one
            disk = serving.register.disk
            assert disk is not None
            assert not disk._promises
            await left(*three)

    run(test)


def test_room_that_was_promised_is_free_again_when_writing_fails(
    spec: Any, one: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise IsthmusError("no space left on device")

    async def test() -> None:
        async with served(tmp_path, state_bytes=int(2.2 * one)) as serving:
            ends = await saved(serving, spec, 0)
            with monkeypatch.context() as patched:
                patched.setattr(CheckpointFolder, "write", fail)
                assert "no space" in await save(serving, ends[0], 5, 0)
            assert await save(serving, ends[0], 5, 0) == ""
            await left(ends)

    run(test)


def test_what_is_half_written_counts_once(tmp_path: Path) -> None:
    async def test() -> None:
        async with served(tmp_path, state_bytes=1000) as serving:
            key, disk = bytes(16), serving.register.disk
            assert disk is not None
            disk.folder.of(key).mkdir()
            async with disk.room(key, 600):
                (disk.folder.of(key) / ".step.tmp").write_bytes(bytes(500))
                async with disk.room(bytes(15) + b"\1", 400):
                    pass
                with pytest.raises(DiskFull):
                    await disk.room(bytes(15) + b"\1", 401).__aenter__()

    run(test)


def test_session_with_room_for_two_checkpoints_goes_on_replacing_the_older(
    spec: Any, one: int, tmp_path: Path
) -> None:
    async def test() -> None:
        async with served(tmp_path, state_bytes=int(2.2 * one)) as serving:
            client, attending = await saved(serving, spec, 0, 5)
            assert "--state-limit" in await save(serving, client, 10, 0)  # neither side may lose step 0 yet
            checkpoints = serving.register.tenants[client.key].checkpoints
            assert checkpoints is not None
            assert checkpoints.steps() == [0, 5]
            for step in (15, 20, 25):
                keep = checkpoints.steps()[-1]
                assert await save(serving, client, step, keep) == ""
                assert checkpoints.steps() == [keep, step]
            await left((client, attending))

    run(test)


def test_session_that_could_keep_one_checkpoint_alone_is_not_begun(
    spec: Any, one: int, tmp_path: Path
) -> None:
    async def test() -> None:
        async with served(tmp_path, state_bytes=int(0.9 * one)) as serving:
            assert await refused(serving, spec) == "refused"
            assert not os.listdir(tmp_path)

    run(test)


def test_nothing_is_built_where_the_disk_is_full(
    spec: Any, one: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def build(*_: Any, **__: Any) -> Session:
        raise AssertionError("built")

    async def test() -> None:
        async with served(tmp_path, sessions=1) as serving:
            waiting = await serving.at_rest(spec)
            assert serving.register.disk is not None
            serving.register.disk.folder.most_bytes = one
            monkeypatch.setattr(Session, "build", build)
            assert await refused(serving, spec) == "busy"
            assert serving.register.tenants[waiting.key].session is not None  # nor has it made way
            assert list(serving.register.tenants) == [waiting.key]

    run(test)


def test_session_that_is_being_built_is_not_parked(spec: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        async with served(None) as serving:
            building, go = never_built(monkeypatch)
            client = Client()
            client.opens(spec)
            opening = serving.attend(client)
            await building.wait()
            serving.register.count()
            assert json.loads(serving.register.monitor.health()[1])["parked"] == 0
            go.set()
            await ended(opening)

    run(test)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (DiskFull("the disk"), "capacity"),
        (DiskFull("the disk", for_good=True), "capacity"),
        (TooLarge("memory"), "memory"),
        (Crowded("memory"), "memory"),
        (Refused("draining", "later"), "draining"),
        (IsthmusError("no such model"), "job"),
    ],
)
def test_metrics_tell_a_full_disk_from_full_memory(error: IsthmusError, reason: str) -> None:
    assert _reason(error) == reason


@pytest.mark.parametrize("limit", [None, 1 << 30])
def test_state_folder_that_cannot_be_read_is_a_line_for_people(
    limit: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    async def test() -> None:
        async with running_server(ServerConfig(port=0, state_dir=tmp_path, state_limit=limit)):
            raise AssertionError("it runs")

    monkeypatch.setattr("cloud.state_folder.os.listdir", fail)
    with pytest.raises(UserError, match=f"--state-dir {tmp_path} cannot be used: Permission denied"):
        run(test)


def test_nothing_is_forgotten_once_the_server_drains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[bool] = []
    draining = False
    drain = Service.drain

    async def slowly(service: Service, limit_s: float) -> None:
        nonlocal draining
        draining = True
        await asyncio.sleep(0.2)
        await drain(service, limit_s)

    async def look(_: object) -> int:
        looks.append(draining)
        return 0

    monkeypatch.setattr(Service, "drain", slowly)
    monkeypatch.setattr("cloud.disk_room.DiskRoom.forget_old", look)

    async def test() -> None:
        async with running_server(ServerConfig(port=0, state_dir=tmp_path, park_after=0.02)):
            await asyncio.sleep(0.1)

    run(test)
    assert looks
    assert not any(looks)

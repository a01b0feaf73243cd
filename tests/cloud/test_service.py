"""Sessions that are opened, found again and given up, with clients in this process: what goes wrong with one session
harms no other, and none is lost that somebody could come back for."""

import asyncio
import contextlib
import json
import os
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import AsyncMock

import pytest
import torch

from cloud.device import Device
from cloud.limits import DiskFull, Limits, Refused
from cloud.monitoring import Monitor
from cloud.register import Register
from cloud.service import Service
from cloud.session import Session
from cloud.state_folder import StateFolder
from cloud.tenant import Tenant
from common.checkpoints import CheckpointFolder
from common.errors import CheckpointFailed, IsthmusError
from edge.job import prepare
from tests.cloud.fake_client import Client, Receipt
from tests.tiny_job import TINY_JOB
from tests.wire.pair import rejoin_of
from wire.errors import StorageFailed, WireError
from wire.messages import Begin, Bye, Forward, Message, Ready, Save, Saved
from wire.streams import StreamEncoder, chunk_message, facts_of

LIMITS = Limits(sessions=2, memory_bytes=1 << 34, disk_bytes=1 << 34, park_s=600.0, forget_s=3600.0)


@pytest.fixture(scope="module")
def spec() -> Any:
    return prepare(TINY_JOB).spec


class Serving:
    """A service, and the connections to it."""

    def __init__(self, folder: Path | None, limits: Limits) -> None:
        self.register = Register(limits, folder, Monitor())
        self.service = Service(Device(None), 1, self.register)
        self._tasks: list[asyncio.Task[None]] = []

    def attend(self, client: Client) -> asyncio.Task[None]:
        self._tasks.append(asyncio.create_task(self.service.attend(client)))  # type: ignore[arg-type]
        return self._tasks[-1]

    async def opened(self, spec: Any) -> tuple[Client, asyncio.Task[None]]:
        client = Client()
        client.opens(spec)
        attending = self.attend(client)
        await client.until(Ready)
        return client, attending

    async def at_rest(self, spec: Any) -> Client:
        """A session that its client has lost the connection to, after a checkpoint."""
        client, attending = await self.opened(spec)
        client.say(Save(0, 0))
        assert (await client.until(Saved)).error == ""
        client.abort()
        await ended(attending)
        return client

    async def close(self) -> None:
        for tenant in list(self.register.tenants.values()):
            await tenant.close()


async def ended(attending: asyncio.Task[None]) -> None:
    with contextlib.suppress(WireError, IsthmusError):
        async with asyncio.timeout(30):
            await attending


@asynccontextmanager
async def served(folder: Path | None, **limits: Any) -> AsyncIterator[Serving]:
    serving = Serving(folder, replace(LIMITS, **limits))
    try:
        yield serving
    finally:
        await serving.close()


def never_built(monkeypatch: pytest.MonkeyPatch) -> tuple[asyncio.Event, asyncio.Event]:
    """Let no session be built: returns what is set once one has been begun, and what to set to have it refused."""
    building, full = asyncio.Event(), asyncio.Event()

    async def build(*_: Any, **__: Any) -> Session:
        building.set()
        await full.wait()
        raise Refused("busy", "full")

    monkeypatch.setattr(Session, "build", build)
    return building, full


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def in_time() -> None:
        async with asyncio.timeout(60):
            await test()

    asyncio.run(in_time())


def test_who_waits_for_a_session_that_comes_to_nothing_is_told_that_it_is_unknown(
    spec: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test() -> None:
        async with served(tmp_path) as serving:
            building, full = never_built(monkeypatch)
            client = Client()
            client.opens(spec)
            opening = serving.attend(client)
            await building.wait()
            again = Client(client.key, client.secret)  # its first connection is gone
            again.resumes(0)
            resuming = serving.attend(again)
            await asyncio.sleep(0.05)
            full.set()
            for attending, code in ((opening, "busy"), (resuming, "unknown_session")):
                with pytest.raises(Refused) as refused:
                    await attending
                assert refused.value.code == code
            assert not serving.register.tenants

    run(test)


def test_session_that_cannot_be_parked_refuses_nobody_else(
    spec: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test() -> None:
        async with served(tmp_path, sessions=2) as serving:
            stuck = await serving.at_rest(spec)
            other = await serving.at_rest(spec)
            park = Tenant.park

            async def fail(tenant: Tenant) -> None:
                if tenant.key == stuck.key:
                    raise CheckpointFailed("no space left on device")
                await park(tenant)

            monkeypatch.setattr(Tenant, "park", fail)
            await serving.opened(spec)  # in the place of the one that can go
            tenants = serving.register.tenants
            assert tenants[stuck.key].session is not None
            assert tenants[other.key].session is None
            client = Client()
            client.opens(spec)
            with pytest.raises(Refused) as refused:
                await serving.attend(client)
            assert refused.value.code == "busy"  # which may pass

    run(test)


def test_sessions_that_have_come_to_nothing_keep_nobody_out(spec: Any) -> None:
    async def test() -> None:
        async with served(None, sessions=2) as serving:
            for _ in range(4):
                client, attending = await serving.opened(spec)
                client.abort()
                await ended(attending)

    run(test)


def test_step_that_only_lacks_the_clients_word_is_worth_keeping(spec: Any, tmp_path: Path) -> None:
    async def test() -> None:
        async with served(tmp_path) as serving:
            client, attending = await serving.opened(spec)
            client.abort()
            await ended(attending)
            tenant = serving.register.tenants[client.key]
            assert not tenant.is_worth_keeping
            assert tenant.session is not None
            tenant.session.pending = 1
            assert tenant.is_worth_keeping
            tenant.session.pending = None

    run(test)


@pytest.mark.parametrize("error", [OSError(24, "too many open files"), StorageFailed("/tmp", "full")])
def test_sweeping_goes_on_whatever_fails(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test() -> None:
        async with served(tmp_path, park_s=0.02) as serving:
            swept = 0

            def fail(*_: Any) -> None:
                nonlocal swept
                swept += 1
                raise error

            register = serving.register
            monkeypatch.setattr(register.disk, "forget_old", fail)
            if isinstance(error, WireError):
                monkeypatch.setattr(register.disk, "forget_old", AsyncMock(return_value=0))
                monkeypatch.setattr(register, "_sweep", fail)
                register.tenants[bytes(16)] = Tenant(bytes(16), bytes(32), None, None, Monitor())  # type: ignore[arg-type]
            sweeping = asyncio.create_task(register.sweep())
            while swept < 3:
                assert not sweeping.done(), sweeping
                await asyncio.sleep(0.01)
            sweeping.cancel()

    run(test)


def test_session_that_was_changed_halfway_goes_on_from_its_checkpoint(spec: Any, tmp_path: Path) -> None:
    async def test() -> None:
        async with served(tmp_path) as serving:
            client = await serving.at_rest(spec)
            before = serving.register.tenants[client.key].session
            assert before is not None
            before.broken = True
            again = Client(client.key, client.secret)
            again.resumes(0, 0)
            serving.attend(again)
            assert (await again.until(Ready)).step == 0
            session = serving.register.tenants[client.key].session
            assert session is not before
            assert session is not None
            assert not session.broken

    run(test)


def test_restoring_that_fails_leaves_a_session_that_nobody_uses(spec: Any, tmp_path: Path) -> None:
    async def test() -> None:
        async with served(tmp_path) as serving:
            client = await serving.at_rest(spec)
            tenant = serving.register.tenants[client.key]
            assert tenant.session is not None
            state = await tenant.session.snapshot()
            with pytest.raises(KeyError):
                await tenant.session.restore(0, {"middle": state["middle"], "applied": 0, "pending": None})
            assert tenant.session.broken

    run(test)


def test_client_that_comes_while_the_server_drains_is_not_robbed_of_its_session(
    spec: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test() -> None:
        async with served(tmp_path) as serving:
            build, building, go = Session.build, asyncio.Event(), asyncio.Event()

            async def slowly(*arguments: Any, **options: Any) -> Session:
                building.set()
                await go.wait()
                return await build(*arguments, **options)

            monkeypatch.setattr(Session, "build", slowly)
            client = Client()
            send = client.send

            async def send_slowly(message: Message) -> Receipt:
                await asyncio.sleep(0.2)
                return await send(message)

            monkeypatch.setattr(client, "send", send_slowly)
            client.opens(spec)
            attending = serving.attend(client)
            await building.wait()
            draining = asyncio.create_task(serving.service.drain(10))
            await asyncio.sleep(0)
            go.set()
            await attending  # without an error
            await draining
            assert client.ended == "the server is shutting down"

    run(test)


def test_parking_again_and_again_leaves_no_more_checkpoints(spec: Any, tmp_path: Path) -> None:
    async def test() -> None:
        async with served(tmp_path) as serving:
            client = await serving.at_rest(spec)
            tenant = serving.register.tenants[client.key]
            for step in (1, 2, 3, 4):
                await serving.service._build(tenant)
                await tenant.restore(0 if step == 1 else step - 1)
                assert tenant.session is not None
                tenant.session.concluded = step
                await tenant.park()
                assert tenant.checkpoints is not None
                assert tenant.checkpoints.steps() == [0, step]  # the client has asked for the first

    run(test)


def test_client_whose_message_is_on_its_way_for_long_is_not_sent_away(spec: Any, tmp_path: Path) -> None:
    async def test() -> None:
        async with served(tmp_path, sessions=1, park_s=0.05) as serving:
            client, attending = await serving.opened(spec)
            client.busy = True
            await asyncio.sleep(0.1)
            assert not await serving.register.make_way()
            assert not attending.done()
            client.busy = False
            assert await serving.register.make_way()
            await attending
            assert client.ended == "nothing was done for long"

    run(test)


def chunk(serving: Serving, client: Client) -> Forward:
    """An evaluation's only chunk."""
    session = serving.register.tenants[client.key].session
    assert session is not None
    named = {info.name: torch.zeros(info.batched(4)) for info in session.middle.crossing(1, gradients=False)}
    encoder = StreamEncoder(session.spec.codecs["cut1.act"], gradient=False)
    encoded = encoder.encode(named, seed=0, facts=facts_of(named))
    message = chunk_message(encoded, list(named), 0, 0, backward=False, evaluate=True)
    assert isinstance(message, Forward)
    return replace(message, payload=bytearray(b"".join(bytes(buffer) for buffer in message.payload)))


def test_client_that_does_not_read_its_answers_has_no_more_of_them_made(spec: Any) -> None:
    async def test() -> None:
        async with served(None) as serving:
            client, attending = await serving.opened(spec)
            client.reads.clear()
            for _ in range(2):
                client.say(Begin(0, 1, evaluate=True), chunk(serving, client))
                await client.until(Forward)
            await asyncio.sleep(0.3)
            assert sum(isinstance(message, Forward) for message in client.sent) == 1
            client.reads.set()
            await client.until(Forward, 2)
            client.say(Bye("done"))
            await attending

    run(test)


def test_checkpoints_that_are_asked_for_faster_than_they_are_written_are_not_copied_all_at_once(
    spec: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test() -> None:
        async with served(tmp_path) as serving:
            client, _ = await serving.opened(spec)
            tenant = serving.register.tenants[client.key]
            most, write = 0, tenant._write

            async def slowly(*arguments: Any) -> None:
                nonlocal most
                most = max(most, len(tenant._saving))
                await asyncio.sleep(0.02)
                await write(*arguments)

            monkeypatch.setattr(tenant, "_write", slowly)
            client.say(*(Save(0, 0) for _ in range(8)))
            await client.until(Saved, 8)
            assert most == 1

    run(test)


def test_checkpoint_is_written_though_an_older_one_cannot_be_removed(
    spec: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any) -> None:
        raise CheckpointFailed("old checkpoints could not be removed")

    async def test() -> None:
        monkeypatch.setattr(CheckpointFolder, "prune", fail)
        async with served(tmp_path) as serving:
            client = await serving.at_rest(spec)  # is told that it is there
            tenant = serving.register.tenants[client.key]
            assert await tenant.steps() == [0]
            assert "old checkpoints could not be removed" in caplog.text

    run(test)


@pytest.mark.parametrize(
    ("error", "raised"),
    [(torch.OutOfMemoryError("no"), IsthmusError), (RuntimeError("a defect"), RuntimeError)],
)
def test_step_that_cannot_begin_ends_the_conversation_at_once(
    spec: Any, error: Exception, raised: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise error

    async def test() -> None:
        async with served(None) as serving:
            client, attending = await serving.opened(spec)
            session = serving.register.tenants[client.key].session
            assert session is not None
            monkeypatch.setattr(session.middle.stage, "begin_step", fail)
            client.say(Begin(1, 1, evaluate=False))
            with pytest.raises(raised):
                await attending
            assert session.broken
            assert not serving.register.tenants

    run(test)


def test_goodbye_leaves_nothing(spec: Any, tmp_path: Path) -> None:
    async def test() -> None:
        async with served(tmp_path) as serving:
            client, attending = await serving.opened(spec)
            client.say(Bye("done"))
            await attending
            assert not serving.register.tenants
            assert not serving.register.visits
            assert not os.listdir(tmp_path)

    run(test)


@pytest.mark.parametrize("in_memory", [True, False])
def test_session_goes_back_behind_a_checkpoint_that_is_damaged(
    spec: Any, tmp_path: Path, in_memory: bool, caplog: pytest.LogCaptureFixture
) -> None:
    async def test() -> None:
        async with served(tmp_path) as serving:
            client = await serving.at_rest(spec)
            tenant = serving.register.tenants[client.key]
            assert tenant.session is not None
            tenant.session.concluded = 5
            await tenant.park()
        newest = tmp_path / client.key.hex() / "step-0000000005.safetensors"
        content = bytearray(newest.read_bytes())
        content[-100] ^= 1
        newest.write_bytes(content)
        async with served(tmp_path) as serving:
            if in_memory:
                tenant = serving.register.find(client.key)  # type: ignore[assignment]
                serving.register.tenants[client.key] = tenant
                await serving.service._build(tenant)
            again = Client(client.key, client.secret)
            again.resumes(None, 0, 5)
            serving.attend(again)
            assert (await again.until(Ready)).step == 0
            assert f"{newest} IS DAMAGED" in caplog.text
            assert newest.exists()

    run(test)


# What is kept on disk.


def in_use(folder: Path) -> int:
    return sum(kept.nbytes for kept in StateFolder(folder, 0).look())


async def parked(serving: Serving, spec: Any) -> Client:
    client = await serving.at_rest(spec)
    await serving.register.tenants[client.key].park()
    return client


def later(serving: Serving, seconds: float = 1000.0) -> None:
    """As if so much time had passed for the sessions that nobody uses."""
    disk = serving.register.disk
    assert disk is not None
    disk._began_s -= seconds
    for kept in disk.folder.look():
        os.utime(disk.folder.of(kept.key), (kept.used_s - seconds, kept.used_s - seconds))
    for tenant in serving.register.tenants.values():
        tenant.touched_s -= seconds


def test_sessions_that_nobody_uses_are_forgotten_oldest_first_where_the_disk_is_needed(
    spec: Any, tmp_path: Path
) -> None:
    async def test() -> None:
        async with served(tmp_path) as serving:
            clients = [await parked(serving, spec)]
            one = in_use(tmp_path)
            clients += [await parked(serving, spec), await parked(serving, spec)]
            for age, client in enumerate(clients):
                os.utime(tmp_path / client.key.hex(), (1e9 + age, 1e9 + age))
        async with served(tmp_path, state_bytes=4 * one, forget_s=1e10) as serving:
            later(serving)
            client, attending = await serving.opened(spec)
            client.say(Save(0, 0))
            assert (await client.until(Saved)).error == ""
            kept = set(os.listdir(tmp_path))
            assert kept == {each.key.hex() for each in (*clients[1:], client)}
            client.abort()
            await ended(attending)

    run(test)


def test_new_session_is_refused_and_a_checkpoint_not_written_where_those_in_use_take_the_disk(
    spec: Any, tmp_path: Path
) -> None:
    async def test() -> None:
        async with served(tmp_path) as serving:
            await serving.at_rest(spec)
            one = in_use(tmp_path)
        (tmp_path / "small").mkdir()
        async with served(tmp_path / "small", state_bytes=2 * one + one // 5) as serving:
            client, attending = await serving.opened(spec)
            client.say(Save(0, 0))
            assert (await client.until(Saved)).error == ""
            for count, step in enumerate((5, 10), 2):
                serving.register.tenants[client.key].session.concluded = step  # type: ignore[union-attr]
                client.say(Save(step, 0))
                answer = await client.until(Saved, count)
                assert ("--state-limit" in answer.error) == (step == 10)
            other = Client()
            other.opens(spec)
            with pytest.raises(Refused, match="--state-limit") as refused:
                await serving.attend(other)
            assert refused.value.code == "busy"
            assert os.listdir(tmp_path / "small") == [client.key.hex()]
            client.abort()
            await ended(attending)
            await serving.register.tenants[client.key].park()  # else nobody would ever get its room
            later(serving)
            client, _ = await serving.opened(spec)
            client.say(Save(0, 0))
            assert (await client.until(Saved)).error == ""

    run(test)


def test_nobody_is_forgotten_for_what_would_not_fit_all_the_same(spec: Any, tmp_path: Path) -> None:
    async def test() -> None:
        async with served(tmp_path) as serving:
            client = await parked(serving, spec)
        one = in_use(tmp_path)
        async with served(tmp_path, state_bytes=3 * one) as serving:
            working = await serving.at_rest(spec)
            later(serving)
            disk = serving.register.disk
            assert disk is not None
            for nbytes, code in ((3 * one + 1, "refused"), (2 * one + one // 2, "busy")):
                with pytest.raises(DiskFull, match="--state-limit") as refused:
                    await disk.room(working.key, nbytes).__aenter__()
                assert refused.value.code == code
            assert set(os.listdir(tmp_path)) == {client.key.hex(), working.key.hex()}

    run(test)


def test_client_that_comes_back_while_its_session_is_forgotten_finds_all_of_it_or_nothing(
    spec: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test() -> None:
        async with served(tmp_path) as serving:
            clients = [await parked(serving, spec), await parked(serving, spec)]
        async with served(tmp_path, forget_s=0.0) as serving:
            looking, go, look = threading.Event(), threading.Event(), StateFolder.look

            def slowly(folder: StateFolder) -> Any:
                found = look(folder)
                looking.set()
                go.wait(30)
                return found

            monkeypatch.setattr(StateFolder, "look", slowly)
            assert serving.register.disk is not None
            forgetting = asyncio.create_task(serving.register.disk.forget_old())
            await asyncio.to_thread(looking.wait, 30)
            here, late = (Client(client.key, client.secret) for client in clients)
            here.resumes(0, 0)
            serving.attend(here)
            await here.until(Ready)  # after it was found to be old, and before anything is removed
            go.set()
            await forgetting
            late.resumes(0, 0)
            with pytest.raises(Refused, match="does not know this session"):
                await serving.attend(late)
            assert os.listdir(tmp_path) == [here.key.hex()]
            assert len(os.listdir(tmp_path / here.key.hex())) == 2

    run(test)


def test_no_more_sessions_are_kept_than_a_thousand_that_nobody_uses(
    spec: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test() -> None:
        monkeypatch.setattr("cloud.disk_room._MOST_UNUSED", 1)
        async with served(tmp_path) as serving:
            clients = [await parked(serving, spec), await parked(serving, spec)]
            os.utime(tmp_path / clients[1].key.hex(), (1e9, 1e9))
            serving.register.tenants[clients[1].key].touched_s -= 1.0
            assert serving.register.disk is not None
            await serving.register.disk.forget_old()
            assert list(serving.register.tenants) == [clients[0].key]  # that this process parked them, too

    run(test)


def test_sessions_that_are_on_disk_count_as_parked_from_the_start(spec: Any, tmp_path: Path) -> None:
    async def test() -> None:
        async with served(tmp_path) as serving:
            client = await parked(serving, spec)
            await parked(serving, spec)
        async with served(tmp_path) as serving:
            sweeping = asyncio.create_task(serving.register.sweep())
            health: dict[str, Any] = {}
            while not health.get("parked"):
                await asyncio.sleep(0.01)
                health = json.loads(serving.register.monitor.health()[1])
            assert health["parked"] == 2
            again = Client(client.key, client.secret)
            again.resumes(0, 0)
            serving.attend(again)
            await again.until(Ready)
            health = json.loads(serving.register.monitor.health()[1])
            assert (health["sessions"], health["parked"]) == (1, 1)
            sweeping.cancel()

    run(test)


def test_client_that_comes_late_does_not_take_the_session_from_a_newer_one(spec: Any) -> None:
    async def test() -> None:
        async with served(None) as serving:
            client, attending = await serving.opened(spec)
            ticket = (await client.until(Ready)).ticket
            client.abort()
            await ended(attending)
            async with serving.register.tenants[client.key].lock:
                newer = Client(client.key, client.secret)
                newer.resumes(0)
                serving.attend(newer)
                await asyncio.sleep(0.05)  # it has proved whose it is, and waits for the session
                assert not serving.service.redeem(rejoin_of(client.key, client.secret, ticket))
            await newer.until(Ready)

    run(test)


def test_ticket_is_for_a_session_in_memory(spec: Any, tmp_path: Path) -> None:
    async def test() -> None:
        async with served(tmp_path) as serving:
            client = await serving.at_rest(spec)
            tenant = serving.register.tenants[client.key]
            ticket = tenant.ticket
            assert ticket is not None
            await tenant.park()
            assert not serving.service.redeem(rejoin_of(client.key, client.secret, ticket))

    run(test)

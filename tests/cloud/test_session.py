"""A session that comes to rest with a step pending: kept on disk, brought back, and told what became of the step."""

import asyncio
from collections.abc import Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import token_model  # noqa: F401  (registers its model)
from cloud.device import Device
from cloud.middle import Middle
from cloud.monitoring import Monitor
from cloud.passing import Passing
from cloud.session import Session
from cloud.tenant import Tenant
from cloud.turns import Turns
from common.driver import Driver
from common.schedule import Action, cloud_schedule
from common.weights import partition_state, state_digest
from edge.job import prepare
from tests.tiny_job import TINY_JOB
from wire.codecs.base import Facts
from wire.messages import Backward, Forward
from wire.streams import IDS, StreamEncoder, chunk_message, facts_of

CHAINS = ["none", "lowrank:2+int8", "topk:0.2,feedback", "delta+int4"]


async def built(spec: Any) -> Session:
    return await Session.build(
        spec, Device(None), Turns(), threads=1, disk_limit=1 << 34, reserve=lambda nbytes: None
    )


class Client:
    """Sends a session the chunks of steps, always the same for the same step."""

    def __init__(self, session: Session) -> None:
        spec = session.spec
        self.facts: dict[int, Facts] = {}
        self.up = {
            1: StreamEncoder(spec.codecs["cut1.act"], gradient=False),
            2: StreamEncoder(spec.codecs["cut2.grad"], gradient=True),
        }

    def tensors(self, session: Session, step: int, chunk: int, cut: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(step * 100 + chunk * 10 + cut)
        infos = session.middle.crossing(cut, gradients=cut == 2, committed=session.applied)
        return {info.name: torch.randn(info.batched(4), generator=generator) for info in infos}

    def message(self, session: Session, step: int, chunk: int, cut: int) -> Forward | Backward:
        named = self.tensors(session, step, chunk, cut)
        if cut == 1:
            if session.training.uses_ids:
                named = {IDS: torch.arange(4 * chunk, 4 * chunk + 4), **named}
            self.facts[chunk] = facts_of(named)
        encoded = self.up[cut].encode(named, seed=step, facts=self.facts[chunk])
        message = chunk_message(encoded, list(named), step, chunk, backward=cut == 2)
        payload = bytearray(b"".join(bytes(buffer) for buffer in message.payload))
        fields = {name: getattr(message, name) for name in message.__slots__} | {"payload": payload}
        return type(message)(**fields)

    def conclude(self, *, applied: bool) -> None:
        for encoder in self.up.values():
            encoder.commit() if applied else encoder.rollback()


async def all_chunks(session: Session, client: Client, step: int) -> Passing:
    """Do what a conversation does in a step, up to its last answer."""
    passing = Passing(
        step=step,
        evaluate=False,
        committed=session.applied,
        chunks=2,
        most_in_flight=2,
        codecs=session.training,
        driver=Driver(cloud_schedule(2), lambda action: asyncio.sleep(0)),
    )
    await session.begin()
    for cut, kind in ((1, "F"), (2, "B")):
        for chunk in range(2):
            message, action = client.message(session, step, chunk, cut), Action(1, kind, chunk)
            passing.accept(message)
            placed = await session.lanes.run("decode", "", session.work.decode, passing, message, cut)
            work = session.work.forward if cut == 1 else session.work.backward
            results, _ = await session.lanes.run("compute", "", work, passing, action, placed)
            names = [info.name for info in session.middle.crossing(3 - cut, gradients=cut == 2)]
            await session.lanes.run(
                "encode", "", session.work.encode, passing, action, 3 - cut, names, results
            )
            passing.encoded += 1
    return passing


async def step(session: Session, client: Client, number: int) -> None:
    await all_chunks(session, client, number)
    await session.conclude(number, applied=True)
    client.conclude(applied=True)


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(work)


def spec_of(chain: str) -> Any:
    return prepare(replace(TINY_JOB, optimizer="adamw", compress=(chain,), augment=False)).spec


@pytest.mark.parametrize("applied", [True, False])
@pytest.mark.parametrize("parked", [True, False])
@pytest.mark.parametrize("chain", CHAINS)
def test_pending_step_is_applied_or_undone_as_the_client_has_it(
    chain: str, parked: bool, applied: bool, tmp_path: Path
) -> None:
    async def compare() -> None:
        spec = spec_of(chain)
        quiet, lost = await built(spec), await built(spec)
        mine, others = Client(quiet), Client(lost)
        for number in (1, 2):
            await step(quiet, mine, number)
            await step(lost, others, number)
        if applied:
            await step(quiet, mine, 3)
        passing = await all_chunks(lost, others, 3)
        await lost.suspend(passing)
        assert lost.pending == 3
        if parked:
            tenant = Tenant(bytes(16), bytes(32), spec, tmp_path, Monitor())
            tenant.session = lost
            await tenant.park()
            assert tenant.session is None
            tenant.session = lost = await built(spec)
            await tenant.restore(2)
        assert (lost.concluded, lost.pending) == (2, 3)
        await lost.meet(3 if applied else 2, applied=True, scale=None)
        others.conclude(applied=applied)
        for number in (4, 5):
            await step(quiet, mine, number)
            await step(lost, others, number)
        for name, expected in (await quiet.weights()).items():
            assert torch.equal((await lost.weights())[name], expected), name
        await quiet.close()
        await lost.close()

    run(compare())


def test_job_that_begins_after_steps_needs_no_weights_to_know_its_width() -> None:
    async def begin() -> None:
        decay = "decay:rate=0.5,steps=2,iterations=2"
        model = {"model": "token_net", "cuts": ("embed", "blocks"), "compress": (decay,)}
        spec = replace(prepare(replace(TINY_JOB, **model)).spec, committed=2)
        spec = replace(spec, digest=state_digest(partition_state(Middle(spec, Device(None)).stage.partition)))
        session = await built(spec)
        assert not session.middle.needs_weights
        assert session.applied == session.middle.committed == 2
        for number in (1, 2, 3):
            await step(session, Client(session), number)
        assert session.applied == session.middle.committed == 5
        assert session.middle.crossing(1, gradients=False, committed=5)[0].shape[-1] == 6
        await session.close()

    run(begin())


def test_step_that_has_not_come_through_is_undone(tmp_path: Path) -> None:
    async def compare() -> None:
        session = await built(spec_of("int8"))
        client = Client(session)
        await step(session, client, 1)
        before = {name: tensor.clone() for name, tensor in (await session.weights()).items()}
        passing = await all_chunks(session, client, 2)
        passing.encoded -= 1
        await session.suspend(passing)
        assert session.pending is None
        for name, expected in (await session.weights()).items():
            assert torch.equal(before[name], expected), name
        await session.close()

    run(compare())


def test_conclusion_is_carried_through_whoever_stops_waiting() -> None:
    async def cancelled() -> None:
        session = await built(spec_of("none"))
        client = Client(session)
        before = {name: tensor.clone() for name, tensor in (await session.weights()).items()}
        await all_chunks(session, client, 1)

        async def wait() -> None:
            await asyncio.shield(session.conclude(1, applied=True))

        waiting = asyncio.create_task(wait())
        await asyncio.sleep(0)
        waiting.cancel()
        await session.suspend(None)
        assert session.concluded == 1
        assert not session.broken
        after = await session.weights()
        assert any(not torch.equal(before[name], after[name]) for name in before)
        await session.close()

    run(cancelled())

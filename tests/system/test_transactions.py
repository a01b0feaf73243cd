"""Invariant 2 for codecs: of a step that is dropped, nothing of what they have learnt remains on either side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

import dropout_model  # noqa: F401  (registers its model here too)
from common.errors import TrainingStopped
from common.lanes import Lanes
from common.trace import Tracer
from edge.config import TrainConfig
from edge.context import Context, build_context
from edge.job import prepare
from edge.link import open_link
from edge.pipeline import Pipeline
from edge.result import fetch_state
from edge.run_folder import SessionKey
from tests.system.conftest import CloudServer
from wire.transport import run

CHAINS = ["lowrank:2", "topk:0.1,feedback", "delta+int4", "delta:limit=160K+topk:0.2,feedback+zstd", "int8"]
BATCH = 8
SAMPLES = torch.randn(24, 3, 16, 16, generator=torch.Generator().manual_seed(0))
STEPS = {1: range(8), 2: range(8, 16), 4: range(4, 12), 5: range(8), 7: range(10, 18), 8: range(8)}
DROPPED = {3: range(2, 10), 6: range(14, 22)}


@dataclass
class Trained:
    """What a run came to: losses, weights, and every payload that crossed of the steps that were applied."""

    losses: list[float] = field(default_factory=list)
    payloads: dict[tuple[Any, ...], bytes] = field(default_factory=dict)
    state: dict[str, Tensor] = field(default_factory=dict)


def trained(server: CloudServer, chain: str, *, dropped: bool) -> Trained:
    config = TrainConfig(
        server=server.address,
        model="dropout_net",
        cuts=("stem", "blocks"),
        image_size=16,
        batch_size=BATCH,
        chunks=4,
        threads=1,
        lr=0.1,
        compress=chain,
        augment=False,
        memory_format="contiguous",
        train_limit=64,
        test_limit=8,
    )
    return run(_train(config, dropped))


async def _train(config: TrainConfig, dropped: bool) -> Trained:
    job, tracer, this = prepare(config), Tracer("edge", enabled=False), Trained()
    lanes = Lanes(tracer, 1)
    host, _, port = config.server.rpartition(":")
    async with open_link(host, int(port), tracer) as link:
        ready = await link.open(SessionKey.new(), job.spec)
        if ready.need_weights:
            await link.send_weights(job.middle_state())
        context = build_context(job, link, lanes, ready.memory_format)
        _listen(context, this)
        pipeline = Pipeline(context, clip_norm=None, skip_overflow=False)

        async def step(number: int, ids: Sequence[int], *, broken: bool = False) -> float:
            samples = SAMPLES[list(ids)].clone()
            if broken:
                samples[:-1] *= -5
                samples[-1] = (
                    torch.nan
                )  # the last chunk's loss; the others have been through every codec by then
            outcome = await pipeline.train(
                number,
                (samples,),
                torch.arange(BATCH) % 10,
                chunks=4,
                depth=2,
                sample_ids=torch.tensor(list(ids)),
            )
            assert outcome.score is not None
            return outcome.score.loss

        for number in sorted({**STEPS, **DROPPED}):
            if number in STEPS:
                this.losses.append(await step(number, STEPS[number]))
            elif dropped:
                with pytest.raises(TrainingStopped, match=f"loss of step {number} is nan"):
                    await step(number, DROPPED[number], broken=True)
        this.state = await fetch_state(job, context)
    context.close()
    this.payloads = {key: payload for key, payload in this.payloads.items() if key[0] in STEPS}
    return this


def _listen(context: Context, this: Trained) -> None:
    """Keep what crosses, both ways."""

    def keep(message: Any, payload: bytes) -> None:
        this.payloads[message.step, message.chunk, message.kind, tuple(message.names)] = payload

    send = context.link.send

    async def sending(message: Any, *, name: str = "") -> None:
        if message.kind in ("forward", "backward"):
            keep(message, b"".join(bytes(buffer) for buffer in message.payload))
        await send(message, name=name)

    context.link.send = sending  # type: ignore[method-assign]
    for decoder in context.decoders.values():

        def decoding(
            message: Any, *args: Any, decode: Any = decoder.decode, **options: Any
        ) -> dict[str, Tensor]:
            keep(message, bytes(message.payload))
            tensors: dict[str, Tensor] = decode(message, *args, **options)
            return tensors

        decoder.decode = decoding  # type: ignore[method-assign]


@pytest.mark.parametrize("chain", CHAINS)
def test_steps_after_a_dropped_one_are_those_of_an_undisturbed_run(
    cloud_server: CloudServer, chain: str
) -> None:
    disturbed = trained(cloud_server, chain, dropped=True)
    plain = trained(cloud_server, chain, dropped=False)
    assert disturbed.losses == plain.losses
    assert disturbed.payloads.keys() == plain.payloads.keys()
    assert len(plain.payloads) == len(STEPS) * 4 * 4
    for key, payload in plain.payloads.items():
        assert disturbed.payloads[key] == payload, key
    for name, expected in plain.state.items():
        assert torch.equal(disturbed.state[name], expected), name

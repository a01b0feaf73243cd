"""What every pass over the data works with, and how a step of it ends."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from common.coders import Coders
from common.lanes import COMPUTE, Lanes
from common.memory_format import FORMATS
from common.narrowing import committed_steps
from common.partition import Split
from common.propagate import TensorInfo
from common.snapshot import copy_of
from common.stage import Stage
from edge.job import Job
from edge.link import Link
from edge.outcome import Outcome
from wire.streams import StreamDecoder, StreamEncoder, uses_ids


@dataclass(kw_only=True)
class Context:
    """What every pass works with, whatever becomes of connections.

    A step ends in one of two ways, and always in one piece, `conclude`; one that the connection was lost under is
    undone by `rest`.

    Attributes:
        link: an open job.
        front: the first partition.
        back: the last partition.
        parts: which tensor goes where.
        codecs: the codec chain of each stream.
        lanes: compute, encode and decode threads.
        seed: the run's seed.
        trim: drops what pads all the samples of a chunk.
        max_bytes: the largest tensor that a chunk may bring.
        committed: steps committed so far, which what crosses may depend on.
        outcome: of the last step that was concluded.
        encoders: of training, by cut: activations at cut 1, gradients at cut 2.
        decoders: of training, by cut: gradients at cut 1, activations at cut 2.
        uses_ids: whether the chunks of a training step take their samples' ids along.
    """

    link: Link
    front: Stage
    back: Stage
    parts: Split
    codecs: dict[str, str]
    lanes: Lanes
    seed: int
    trim: Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]]
    max_bytes: int
    committed: int = 0
    outcome: Outcome = field(default_factory=Outcome)
    encoders: dict[int, StreamEncoder] = field(init=False)
    decoders: dict[int, StreamDecoder] = field(init=False)
    uses_ids: bool = field(init=False)

    def __post_init__(self) -> None:
        """Make the streams of training."""
        self.encoders = {1: self.encoder("cut1.act"), 2: self.encoder("cut2.grad")}
        self.decoders = {1: self.decoder("cut1.grad"), 2: self.decoder("cut2.act")}
        self.uses_ids = uses_ids(self.codecs)
        self._coders = Coders(self.lanes, self.encoders.values(), self.decoders.values())
        self._concluding: asyncio.Future[Any] | None = None

    def crossing(self, cut: int, *, gradients: bool) -> list[TensorInfo]:
        """Describe what crosses a cut, in order: all of it forward, what needs a gradient backward."""
        infos = self.parts.crossing(cut, self.committed)
        return [info for info in infos if info.requires_grad or not gradients]

    def tokens(self, inputs: tuple[Tensor, ...]) -> int | None:
        """Return how many tokens the front's inputs have; None for images."""
        return self.parts.inputs[0].tokens(inputs[0].shape)

    def back_inputs(self, arrived: tuple[Tensor, ...], held: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Join what crossed cut 2 with what the front kept for the back."""
        return self.parts.back_inputs(arrived, held) if self.parts.kept else arrived

    def encoder(self, stream: str) -> StreamEncoder:
        """Make an encoder with fresh state for a stream of `common.spec.STREAMS`."""
        return StreamEncoder(self.codecs[stream], gradient=stream.endswith("grad"))

    def conclude(self, outcome: Outcome) -> asyncio.Future[Any]:
        """End a step, in order with what is queued; shield the result, so that it is carried through."""
        self.outcome = outcome
        self.committed += outcome.applied
        end = (self._apply, outcome.scale) if outcome.applied else (self._undo,)
        self._concluding = asyncio.gather(
            self.lanes.run(COMPUTE, "commit" if outcome.applied else "rollback", *end),
            *self._coders.settle(applied=outcome.applied),
        )
        return self._concluding

    def _apply(self, scale: float | None) -> None:
        self.front.commit(scale)
        self.back.commit(scale)

    def _undo(self) -> None:
        self.front.rollback()
        self.back.rollback()

    async def rest(self) -> None:
        """Come to rest between steps, once everything that waited for the lanes has gone: undo what is under way.

        Raises:
            Exception: what went wrong when the last step was concluded.
        """
        if self._concluding is not None:
            await asyncio.shield(self._concluding)
        # The lanes work in order: these come behind whatever is left on them.
        await asyncio.gather(
            self.lanes.run(COMPUTE, "rollback", self._undo), *self._coders.settle(applied=False)
        )

    def snapshot(self) -> Awaitable[dict[str, Any]]:
        """Copy everything that training changes: now, before what is queued after this call. Call between steps."""
        parts = (
            self.lanes.run(COMPUTE, "snapshot", copy_of, self._stages),
            *self._coders.copies(),
        )
        return _together(self.committed, parts)

    def _stages(self) -> dict[str, Any]:
        return {"front": self.front.snapshot(), "back": self.back.snapshot()}

    async def restore(self, step: int, state: Mapping[str, Any]) -> None:
        """Take a snapshot over.

        Args:
            step: the last one concluded then.
            state: what was copied.
        """
        await self.rest()
        stages = state["stages"]
        await self.lanes.run(COMPUTE, "restore", self.front.restore, stages["front"])
        await self.lanes.run(COMPUTE, "restore", self.back.restore, stages["back"])
        await self._coders.restore(state["streams"])
        self.committed, self.outcome = state["committed"], Outcome(step)

    def close(self) -> None:
        """End the lanes, and give up what codecs keep on disk."""
        self.lanes.close()
        self._coders.close()

    def decoder(self, stream: str) -> StreamDecoder:
        """Make a decoder with fresh state for a stream of `common.spec.STREAMS`."""
        return StreamDecoder(self.codecs[stream], gradient=stream.endswith("grad"), max_bytes=self.max_bytes)


async def _together(committed: int, parts: Sequence[Awaitable[Any]]) -> dict[str, Any]:
    stages, *streams = await asyncio.gather(*parts)
    return {"committed": committed, "stages": stages, "streams": streams}


def build_context(job: Job, link: Link, lanes: Lanes, memory_format: str) -> Context:
    """Put front and back to work.

    Args:
        job: what was prepared.
        link: with the job open on it.
        lanes: compute, encode and decode threads.
        memory_format: the server's choice.
    """
    parts, spec = job.parts, job.spec

    def stage(part: str, needs_grad: list[bool]) -> Stage:
        return Stage(
            parts.partitions[part],
            part,
            seed=spec.seed,
            needs_grad=needs_grad,
            optim=spec.optim,
            memory_format=FORMATS[memory_format],
        )

    return Context(
        link=link,
        front=stage("front", [False for _ in parts.inputs]),
        back=stage("back", [info.requires_grad for info in (*parts.cut2, *parts.kept)]),
        parts=parts,
        codecs=dict(spec.codecs),
        lanes=lanes,
        seed=spec.seed,
        trim=job.samples.trim,
        max_bytes=max(info.dense_bytes(spec.chunk_size) for info in (*parts.cut1, *parts.cut2)),
        committed=committed_steps(*parts.partitions.values()),
    )

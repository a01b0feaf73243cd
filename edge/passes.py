"""One pass of chunks through the split model: a training step's, or an evaluation's.

A pass performs the edge's actions as the schedule says, sends what each gives and files what arrives.
"""

import asyncio
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from common.driver import Driver
from common.errors import TrainingStopped
from common.lanes import COMPUTE, DECODE, ENCODE
from common.schedule import Action, Schedule
from common.seeding import derive_seed
from edge.context import Context
from edge.outcome import Score
from wire.codecs.base import NOTHING_KNOWN, Facts
from wire.errors import CorruptPayload, RemoteProtocolError
from wire.messages import Backward, Forward
from wire.streams import IDS, Encodings, chunk_message, facts_of

T = TypeVar("T")


class Pass:
    """Performs actions, sends their results, files arrivals. Subclasses say what each action computes.

    Args:
        context: what to work with.
        step: the number that messages carry.
    """

    evaluate = False

    def __init__(self, context: Context, step: int) -> None:
        self.context = context
        self.step = step
        self.score = Score()
        self.arrived: dict[Action, tuple[Tensor, ...]] = {}
        self.held: dict[int, tuple[Tensor, ...]] = {}  # what the front keeps for the back, by chunk
        self.facts: dict[int, Facts] = {}  # what both ends know of the chunks under way
        self.encoders = context.encoders
        self.decoders = context.decoders
        self._failed = False
        self._tasks: asyncio.TaskGroup
        self._driver: Driver

    async def run(self, schedule: Schedule) -> None:
        """Perform a schedule to its end.

        Raises:
            ExceptionGroup: of what failed first and what that broke.
        """
        link = self.context.link
        with self._noticing():  # what the cloud has sent before it knows of a failure is taken, and dropped
            async with asyncio.TaskGroup() as self._tasks:
                self._driver = Driver(schedule, self._perform)
                link.on_tensors = self._take
                with self._noticing():
                    await self._driver.run()
        link.on_tensors = None
        # It refers to this pass, which would keep the batch until the next garbage collection.
        del self._driver

    @contextmanager
    def _noticing(self) -> Iterator[None]:
        """Take note where something fails: from then on the task group is ending and takes no new tasks."""
        try:
            yield
        except BaseException:
            self._failed = True
            raise

    def samples(self, chunk: int) -> int:
        """Return how many samples a chunk has."""
        raise NotImplementedError

    def tokens(self, chunk: int) -> int | None:
        """Return how many tokens a chunk's samples are padded to; None for images."""
        raise NotImplementedError

    def sample_ids(self, chunk: int) -> Tensor | None:
        """Return the ids of a chunk's samples, int64 ``[n]``, where its codecs are to know them."""
        return None

    def incoming(self, message: Forward | Backward) -> tuple[Action, int]:
        """Return the action that a message makes possible, and the cut that it came through."""
        raise NotImplementedError

    async def _perform(self, action: Action) -> None:
        raise NotImplementedError

    async def compute(self, action: Action, work: Callable[..., T], *args: object) -> T:
        """Run an action's work on the compute lane."""
        return await self.context.lanes.run(COMPUTE, str(action), work, *args)

    def _take(self, message: Forward | Backward) -> None:
        if self._failed:
            return
        if message.step != self.step:
            raise RemoteProtocolError(f"{message.kind} of step {message.step} came in step {self.step}")
        action, cut = self.incoming(message)
        decoding = self.context.lanes.run(DECODE, str(action), self._decode, message, cut)
        self._tasks.create_task(self._arrive(action, decoding))

    def _decode(self, message: Forward | Backward, cut: int) -> tuple[Tensor, ...]:
        infos = self.context.crossing(cut, gradients=isinstance(message, Backward))
        names = [info.name for info in infos]
        # What comes through cut 1, or in an evaluation, is the last of its chunk.
        known = self.facts.pop if cut == 1 or self.evaluate else self.facts.get
        facts = known(message.chunk, None) or NOTHING_KNOWN
        tensors = self.decoders[cut].decode(
            message, names, facts=facts, unmasked=self.context.parts.unmasked(cut)
        )
        for info, tensor in zip(infos, tensors.values(), strict=True):
            expected = info.batched(self.samples(message.chunk), self.tokens(message.chunk))
            if (tensor.dtype, tuple(tensor.shape)) != (info.dtype, expected):
                raise CorruptPayload(
                    f"{info.name} came as {tensor.dtype} {list(tensor.shape)}, not {info.dtype} {list(expected)}"
                )
        return tuple(tensors.values())

    async def _arrive(self, action: Action, decoding: asyncio.Future[tuple[Tensor, ...]]) -> None:
        with self._noticing():
            self.arrived[action] = await decoding
            self._driver.arrive(action)

    def send(self, action: Action, cut: int, tensors: Sequence[Tensor]) -> None:
        """Encode and send an action's results in the background, in the order of the calls."""
        names = [info.name for info in self.context.crossing(cut, gradients=action.backward)]
        named = dict(zip(names, tensors, strict=True))
        ids = self.sample_ids(action.chunk) if cut == 1 else None
        if ids is not None:
            named = {IDS: ids, **named}
        encoding = self.context.lanes.run(ENCODE, str(action), self._encode, action, cut, named)
        self._tasks.create_task(self._send(action, list(named), encoding))

    def _encode(self, action: Action, cut: int, tensors: dict[str, Tensor]) -> Encodings:
        seed = derive_seed(self.context.seed, self.step, action.chunk, f"cut{cut}.{action.what}")
        if cut == 1:
            self.facts[action.chunk] = facts_of(tensors)
        facts = self.facts.get(action.chunk, NOTHING_KNOWN)
        unmasked = self.context.parts.unmasked(cut)
        return self.encoders[cut].encode(tensors, seed=seed, facts=facts, unmasked=unmasked)

    async def _send(self, action: Action, names: list[str], encoding: asyncio.Future[Encodings]) -> None:
        step, chunk, backward, evaluate = self.step, action.chunk, action.backward, self.evaluate
        with self._noticing():
            encodings = await encoding
            message = chunk_message(encodings, names, step, chunk, backward=backward, evaluate=evaluate)
            await self.context.link.send(message, name=str(action))


class TrainingPass(Pass):
    """The chunks of one training step; see `common.schedule` for its actions.

    Args:
        context: what to work with.
        step: its number.
        inputs: what the front takes of the batch, cut as `torch.chunk` cuts.
        labels: ``[B]``.
        chunks: how many chunks.
        sample_ids: int64 ``[B]``; needed where ``context.uses_ids``.
    """

    def __init__(
        self,
        context: Context,
        step: int,
        inputs: tuple[Tensor, ...],
        labels: Tensor,
        chunks: int,
        sample_ids: Tensor | None = None,
    ) -> None:
        super().__init__(context, step)
        cut = zip(*(tensor.chunk(chunks) for tensor in inputs), strict=True)
        self.inputs = [context.trim(chunk) for chunk in cut]
        self.labels = labels.chunk(chunks)
        self._ids = sample_ids.chunk(chunks) if sample_ids is not None and context.uses_ids else None
        self.middle_norm_sq = math.nan
        self._samples = len(labels)
        self._held_gradients: dict[int, tuple[Tensor | None, ...]] = {}

    @property
    def count(self) -> int:
        """How many chunks there are; fewer than asked for where the batch is small."""
        return len(self.inputs)

    def samples(self, chunk: int) -> int:
        """See `Pass.samples`."""
        return len(self.labels[chunk])

    def tokens(self, chunk: int) -> int | None:
        """See `Pass.tokens`."""
        return self.context.tokens(self.inputs[chunk])

    def sample_ids(self, chunk: int) -> Tensor | None:
        """See `Pass.sample_ids`."""
        return None if self._ids is None else self._ids[chunk]

    def incoming(self, message: Forward | Backward) -> tuple[Action, int]:
        """See `Pass.incoming`."""
        if message.chunk >= self.count:
            raise RemoteProtocolError(f"chunk {message.chunk} came in a step of {self.count} chunks")
        if isinstance(message, Forward):
            return Action(2, "T", message.chunk), 2
        if message.chunk == self.count - 1:
            if message.norm_sq is None:
                raise RemoteProtocolError("the step's last gradient came without the middle's norm")
            self.middle_norm_sq = message.norm_sq
        return Action(0, "B", message.chunk), 1

    async def _perform(self, action: Action) -> None:
        match action.kind:
            case "0F":
                self.send(action, 1, await self.compute(action, self._front_forward, action.chunk))
            case "2T":
                arrived = self.arrived.pop(action)
                self.send(action, 2, await self.compute(action, self._turn, action.chunk, arrived))
            case _:
                arrived = self.arrived.pop(action)
                await self.compute(action, self._front_backward, action.chunk, arrived)

    def _front_forward(self, chunk: int) -> tuple[Tensor, ...]:
        context = self.context
        outputs = context.front.forward(self.step, chunk, self.inputs[chunk])
        self.held[chunk] = outputs if context.parts.kept else ()
        return outputs[: len(context.parts.cut1)]

    def _turn(self, chunk: int, arrived: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        context, labels = self.context, self.labels[chunk]
        entries, outputs = context.back.forward_attached(
            self.step, chunk, context.back_inputs(arrived, self.held.pop(chunk))
        )
        logits = outputs[0]
        with torch.enable_grad():
            # The batch's loss is the mean over its samples: a chunk counts by its size.
            mean_loss = cross_entropy(logits, labels)
            loss = mean_loss * (len(labels) / self._samples)
        value = mean_loss.item()
        if not math.isfinite(value):
            raise TrainingStopped(f"the loss of step {self.step} is {value}")
        gradients = context.back.backward_attached(entries, (loss,), (None,))
        self.score.add(value, logits.detach(), labels)
        crossing = len(context.parts.cut2)
        self._held_gradients[chunk] = (None,) * crossing + gradients[crossing:]
        return tuple(gradient for gradient in gradients[:crossing] if gradient is not None)

    def _front_backward(self, chunk: int, arrived: tuple[Tensor, ...]) -> None:
        context = self.context
        given = iter(arrived)
        from_middle = [next(given) if info.requires_grad else None for info in context.parts.cut1]
        gradients = context.parts.front_gradients(from_middle, self._held_gradients.pop(chunk))
        context.front.backward(chunk, gradients)

"""What the lanes do with one chunk on the server: decode, forward, backward, encode."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from cloud.device import LaneStreams, Placed
from cloud.middle import UNKNOWN, Middle
from cloud.passing import Passing
from common.errors import IsthmusError
from common.schedule import Action
from common.seeding import derive_seed
from wire.codecs.base import NOTHING_KNOWN, Facts
from wire.errors import CorruptPayload
from wire.messages import Backward, Forward
from wire.streams import IDS, Encodings, facts_of

T = TypeVar("T")


class Work:
    """The lanes' work of one session. Each method runs on the lane of its name (forward and backward: compute).

    Args:
        middle: what is trained.
        streams: the lanes' CUDA streams.
        seed: the run's.
    """

    def __init__(self, middle: Middle, streams: LaneStreams, seed: int) -> None:
        self._middle = middle
        self._streams = streams
        self._seed = seed

    def decode(self, passing: Passing, message: Forward | Backward, cut: int) -> Placed:
        """Decode and check a chunk's tensors, onto the device."""
        # Of this pass: the commit before it may still wait to be computed.
        infos = self._middle.crossing(
            cut, gradients=isinstance(message, Backward), committed=passing.committed
        )
        names = [info.name for info in infos]
        decoder, sizes, facts = passing.codecs.decoders[cut], passing.sizes, passing.facts
        device, unmasked = self._middle.stage.device, self._middle.unmasked(cut)
        is_forward = isinstance(message, Forward)
        if is_forward and passing.codecs.uses_ids and not passing.evaluate:
            names.insert(0, IDS)

        def work() -> tuple[Tensor, ...]:
            known = None if is_forward else facts.get(message.chunk, NOTHING_KNOWN)
            tensors = decoder.decode(message, names, device=device, facts=known, unmasked=unmasked)
            if is_forward:
                facts[message.chunk] = facts_of(tensors)
            tensors.pop(IDS, None)
            for info, tensor in zip(infos, tensors.values(), strict=True):
                seen = sizes.get(message.chunk, UNKNOWN)
                sizes[message.chunk] = self._middle.check(info, tensor, seen)
            _check_ids(facts.get(message.chunk), sizes.get(message.chunk, UNKNOWN).samples)
            return tuple(tensors.values())

        return self._streams.decode(work)

    def forward(self, passing: Passing, action: Action, placed: Placed) -> tuple[Placed, float | None]:
        """Run a chunk forward; the second result is None."""
        stage = self._middle.stage
        run = stage.evaluate if passing.evaluate else partial(stage.forward, passing.step, action.chunk)
        with _enough_memory():
            return self._streams.compute(run, placed), None

    def backward(self, passing: Passing, action: Action, placed: Placed) -> tuple[Placed, float | None]:
        """Run a chunk backward; with the last one goes the sum of squares of all gradients."""
        with _enough_memory():
            results = self._streams.compute(partial(self._middle.backward, action.chunk), placed)
        if action.chunk != passing.chunks - 1:
            return results, None
        with self._streams.computing():
            return results, self._middle.finish_gradients()

    def between(self, work: Callable[..., T], *args: object) -> T:
        """Run what begins or ends a step, or reads or loads the weights, in order with what chunks compute."""
        with _enough_memory(), self._streams.computing():
            return work(*args)

    def encode(
        self, passing: Passing, action: Action, cut: int, names: list[str], placed: Placed
    ) -> Encodings:
        """Encode an action's results, into host memory."""
        seed = derive_seed(self._seed, passing.step, action.chunk, f"cut{cut}.{action.what}")
        encoder, facts = passing.codecs.encoders[cut], passing.facts[action.chunk]
        unmasked = self._middle.unmasked(cut)

        def work(tensors: tuple[Tensor, ...]) -> Encodings:
            named = dict(zip(names, tensors, strict=True))
            return encoder.encode(named, seed=seed, facts=facts, unmasked=unmasked)

        return self._streams.encode(work, placed)


def _check_ids(facts: Facts | None, samples: int | None) -> None:
    if facts is None or facts.ids is None or samples is None:
        return
    if len(facts.ids) != samples:
        raise CorruptPayload(f"a chunk of {samples} samples came with {len(facts.ids)} sample ids")


@contextmanager
def _enough_memory() -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise IsthmusError(
            "the server's GPU has too little memory for this; use more chunks or a lower --depth, smaller images or "
            "a smaller batch"
        ) from error

"""The lanes of `benchmarks/codecs.py`: real boundary tensors, what is repeated with them, and the threads that do it.

A lane makes two things of a tensor, one after the other and each as fast as it can: it encodes, and it decodes.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from benchmarks.mobilenet_split import split_mobilenet_v2
from common.runtime import set_threads
from edge.data.datasets import open_dataset
from edge.data.loader import eval_batches
from wire.codecs.base import Facts, Role
from wire.codecs.chain import Decoder, Encoded, Encoder, parse_chain

CHUNK, IMAGE_SIZE = 8, 224
TENSORS = 4
"""Tensors that a lane goes round."""

IN_FLIGHT = 2
"""Results that a lane keeps: what is being sent, and what waits."""


@dataclass(frozen=True)
class Boundary:
    """One tensor that crosses.

    Attributes:
        name: where it crosses and what it is.
        x: the tensor.
        role: what it is to training.
        bottleneck: what made it narrow, or ``none``.
    """

    name: str
    x: Tensor
    role: Role
    bottleneck: str

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor as fp32."""
        return self.x.numel() * 4

    @property
    def label(self) -> str:
        """The tensor's name, shape and order, in one string."""
        order = "NHWC" if self.x.is_contiguous(memory_format=torch.channels_last) else "NCHW"
        return f"{self.name} {list(self.x.shape)} {order}"


def boundaries(bottleneck: str) -> Iterator[Boundary]:
    """The four tensors that cross in a step of one chunk: activations and gradients at both cuts."""
    dataset = open_dataset("digits", seed=0)
    loaded = eval_batches(
        dataset.test, batch_size=CHUNK, image_size=IMAGE_SIZE, normalise=dataset.normalise, channels_last=True
    )
    with loaded as batches:
        batch = batches.get()
    assert batch is not None
    split = split_mobilenet_v2(bottleneck)
    front = split.front(batch.inputs[0])
    sent1 = front.detach().requires_grad_()
    middle = split.middle(sent1)
    sent2 = middle.detach().requires_grad_()
    loss = torch.nn.functional.cross_entropy(split.back(sent2), batch.labels)
    torch.autograd.backward(loss)
    torch.autograd.backward(middle, sent2.grad)
    title = "" if bottleneck == "none" else f" behind {bottleneck}"
    for cut, sent in ((1, sent1), (2, sent2)):
        assert sent.grad is not None
        for role, x in ((Role.ACTIVATION, sent.detach()), (Role.GRADIENT, sent.grad)):
            channels_last = x.contiguous(memory_format=torch.channels_last)
            yield Boundary(f"cut {cut}{title}, {role.value}", channels_last, role, bottleneck)


def all_boundaries() -> list[Boundary]:
    """Every tensor that is measured: each channels-last, and then row-major."""
    return [
        replace(boundary, x=x)
        for bottleneck in ("none", "conv")
        for boundary in boundaries(bottleneck)
        for x in (boundary.x, boundary.x.contiguous())
    ]


@dataclass(frozen=True)
class Lane:
    """What one thread repeats, and what it makes of a tensor.

    Attributes:
        encode: encodes the next tensor, and returns what must live until it is sent.
        decode: decodes the next message; None where the two are one.
        sent_bytes: that one encoded tensor has.
    """

    encode: Callable[[], object]
    decode: Callable[[], object] | None
    sent_bytes: int


def codec_lane(chain: str, boundary: Boundary) -> Lane:
    """Encode and decode as the product does."""
    stages = parse_chain(chain)
    encoder, decoder = Encoder(stages, boundary.role), Decoder(stages, boundary.role)
    tensors = itertools.cycle([boundary.x.clone() for _ in range(TENSORS)])
    seeds = itertools.count()
    facts = Facts(ids=tuple(range(len(boundary.x))))
    for _ in range(2):  # the first is no rule where samples are compared with what they were
        encoded = encoder.encode(boundary.x, seed=0, facts=facts)
        decoder.decode(encoded.desc, bytearray(b"".join(encoded.buffers)), facts=facts)
    received = itertools.cycle([bytearray(b"".join(encoded.buffers)) for _ in range(TENSORS)])

    def encode() -> Encoded:
        return encoder.encode(next(tensors), seed=next(seeds), facts=facts)

    def decode() -> Tensor:
        return decoder.decode(encoded.desc, next(received), facts=facts)[0]

    return Lane(encode, decode, encoded.size)


def naive_encode(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize by channel, one operation after the other."""
    low, high = x.amin((0, 2, 3), keepdim=True), x.amax((0, 2, 3), keepdim=True)
    scale = (high - low).clamp(min=1e-30) / 255
    return ((x - low) / scale).round().clamp(0, 255).to(torch.uint8), low, scale


def naive_decode(q: Tensor, low: Tensor, scale: Tensor) -> Tensor:
    """Back from what `naive_encode` made."""
    return q.float() * scale + low


def naive_lane(boundary: Boundary) -> Lane:
    """The reference that int8 is compared with. Gradients are not even rounded stochastically."""
    tensors = itertools.cycle([boundary.x.clone() for _ in range(TENSORS)])
    messages = itertools.cycle([naive_encode(next(tensors)) for _ in range(TENSORS)])
    return Lane(
        lambda: naive_encode(next(tensors)),
        lambda: naive_decode(*next(messages)),
        boundary.x.numel(),
    )


def memcpy_lane(boundary: Boundary) -> Lane:
    """The roof: as many bytes of fp32 from one place to another."""
    size = boundary.x.numel()
    sources = itertools.cycle([np.zeros(size, np.float32) for _ in range(TENSORS)])
    targets = itertools.cycle([np.zeros(size, np.float32) for _ in range(TENSORS)])
    return Lane(lambda: np.copyto(next(targets), next(sources)), None, size * 4)


@dataclass(frozen=True)
class Speed:
    """What a lane did in a while.

    Attributes:
        calls_s: calls a second.
        faults: page faults a call.
    """

    calls_s: float
    faults: float


def repeat(work: Callable[[], object], seconds: float) -> Speed:
    """Repeat work for a while, in the calling thread."""
    kept: deque[object] = deque(maxlen=IN_FLIGHT)
    for _ in range(IN_FLIGHT + 1):
        kept.append(work())
    faults = thread_faults()
    began = time.perf_counter()
    calls = 0
    while (elapsed := time.perf_counter() - began) < seconds:
        kept.append(work())
        calls += 1
    return Speed(calls / elapsed, (thread_faults() - faults) / calls)


def thread_faults() -> int:
    """Page faults of the calling thread so far; 0 where the system does not count them by thread."""
    try:
        import resource

        return resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
    except (ImportError, AttributeError):
        return 0


class Pair:
    """Two lanes' threads, which work at once or one alone."""

    def __init__(self) -> None:
        self._threads = [
            ThreadPoolExecutor(1, thread_name_prefix="lane", initializer=set_threads, initargs=(1,))
            for _ in range(2)
        ]

    def run(self, works: Sequence[Callable[[], object]], seconds: float) -> list[Speed]:
        """Repeat each of up to two pieces of work for a while, all at once."""
        running = [
            thread.submit(repeat, work, seconds) for thread, work in zip(self._threads, works, strict=False)
        ]
        return [future.result() for future in running]

    def close(self) -> None:
        """End the threads."""
        for thread in self._threads:
            thread.shutdown()


@contextmanager
def lane_threads() -> Iterator[Pair]:
    """Two threads for the time of a block."""
    pair = Pair()
    try:
        yield pair
    finally:
        pair.close()

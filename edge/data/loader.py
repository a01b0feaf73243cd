"""Batches prepared ahead of training by background threads, in an order that no timing can change."""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edge.data.augment import Augment, Normalise, to_tensor, vary
from edge.data.draws import epoch_order
from edge.data.source import ImageSource

_LARGE_BATCH = 16 << 20  # bytes


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Samples ready for a model's front.

    Attributes:
        inputs: the tensors that the model takes, each with the samples along dimension 0; for images one
            float32 ``[b, 3, size, size]``.
        labels: int64 ``[b]``.
        sample_ids: int64 ``[b]``, where the samples stand in their source; stable over epochs.
        epoch: number of the epoch, from 0.
        number: place of the batch in its epoch, from 0.
    """

    inputs: tuple[Tensor, ...]
    labels: Tensor
    sample_ids: Tensor
    epoch: int
    number: int

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Which samples make a batch."""

    ids: NDArray[np.int64]
    epoch: int
    number: int


class Batches:
    """An iterator over batches that keeps the next few being prepared.

    `get` blocks the calling thread: call it from an executor, not on an event loop. One thread consumes.

    Args:
        plans: the batches to prepare, in order.
        prepare: makes a batch; called from several threads at once.
        ahead: most batches prepared or being prepared before they are asked for; each takes its memory.
        threads: number of threads that prepare.
        clock: seconds that only grow.

    Attributes:
        wait_s: seconds that the consumer has waited for batches that were not ready.
    """

    def __init__(
        self,
        plans: Iterator[Plan],
        prepare: Callable[[Plan], Batch],
        *,
        ahead: int = 2,
        threads: int = 1,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        if ahead < 1 or threads < 1:
            raise ValueError("ahead and threads must be at least 1")
        self.wait_s = 0.0
        self._plans = plans
        self._prepare = prepare
        self._clock = clock
        self._closed = False
        self._pending: deque[Future[Batch]] = deque()
        self._lock = threading.Lock()  # closing may meet a consumer that is just taking the next batch
        self._pool = _single_core_threads(threads)
        for _ in range(ahead):
            self._submit()

    def ready(self) -> bool:
        """Tell whether `get` would return (or raise) at once."""
        return not self._pending or self._pending[0].done()

    def get(self) -> Batch | None:
        """Wait for the next batch.

        Returns:
            The batch, or None after the last one or after `close`.

        Raises:
            UserError: a sample of it could not be read. The loader is closed then.
        """
        if not self._pending:
            return None
        future = self._pending.popleft()
        late_from = None if future.done() else self._clock()
        try:
            batch = future.result()
        except CancelledError:
            return None
        except BaseException:
            self.close()
            raise
        if late_from is not None:
            self.wait_s += self._clock() - late_from
        self._submit()
        return batch

    def close(self) -> None:
        """Drop what is not begun, wait for what is, and end the threads. Harmless when repeated."""
        with self._lock:
            self._closed = True
            self._pending.clear()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _submit(self) -> None:
        with self._lock:
            plan = None if self._closed else next(self._plans, None)
            if plan is not None:
                self._pending.append(self._pool.submit(self._prepare, plan))

    def __iter__(self) -> Iterator[Batch]:
        while (batch := self.get()) is not None:
            yield batch

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _single_core_threads(threads: int) -> ThreadPoolExecutor:
    """Start threads in which torch uses one core, so that they leave the others to training."""
    all_set = threading.Barrier(threads + 1)

    def start() -> None:
        torch.get_num_threads()  # a thread's first call takes the common number over, whatever was set before
        torch.set_num_threads(1)
        all_set.wait()

    # torch gives the number last set anywhere to every thread that computes for its first time later. Ours
    # must keep theirs to themselves: begin them all now, and then put back the caller's number.
    compute_threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(threads, thread_name_prefix="loader")
    for _ in range(threads):
        pool.submit(start)
    all_set.wait()
    torch.set_num_threads(compute_threads)
    return pool


def batch_count(n: int, batch_size: int, *, drop_last: bool = False) -> int:
    """Count the batches of one epoch over `n` samples."""
    return n // batch_size if drop_last else -(-n // batch_size)


def shuffled(
    n: int,
    *,
    batch_size: int,
    seed: int,
    epoch: int = 0,
    epochs: int = 1,
    start_batch: int = 0,
    drop_last: bool = False,
) -> Iterator[Plan]:
    """Yield the batches of one or more epochs over `n` samples; arguments as for `train_batches`."""
    for e in range(epoch, epoch + epochs):
        order = epoch_order(n, seed, e)
        first = start_batch if e == epoch else 0
        for number in range(first, batch_count(n, batch_size, drop_last=drop_last)):
            yield Plan(ids=order[number * batch_size : (number + 1) * batch_size], epoch=e, number=number)


def in_order(n: int, batch_size: int, start_batch: int = 0) -> Iterator[Plan]:
    """Yield batches of `n` samples, each once and in order, from one of them on."""
    for number in range(start_batch, batch_count(n, batch_size)):
        yield Plan(
            ids=np.arange(number * batch_size, min((number + 1) * batch_size, n)), epoch=0, number=number
        )


def train_batches(
    source: ImageSource,
    *,
    batch_size: int,
    seed: int,
    epoch: int,
    image_size: int,
    normalise: Normalise,
    augment: Augment | None = None,
    start_batch: int = 0,
    epochs: int = 1,
    drop_last: bool = False,
    channels_last: bool = False,
    ahead: int | None = None,
    threads: int = 1,
) -> Batches:
    """Read shuffled, augmented batches of one or more epochs.

    With several epochs, the first batch of one is prepared while the last of the one before trains.

    Args:
        source: where the images come from.
        batch_size: samples in a batch; the last of an epoch is smaller when they do not come out even.
        seed: the run's seed.
        epoch: the first epoch.
        image_size: side of the images, in pixels.
        normalise: statistics to normalise by.
        augment: how to vary the images; None leaves them as they are.
        start_batch: where to begin in the first epoch.
        epochs: how many epochs to read, the first included.
        drop_last: leave out an epoch's smaller last batch.
        channels_last: lay images out channels-last.
        ahead: see `Batches`; None for 2, or 1 where a batch is so large that its step outlasts its preparation.
        threads: see `Batches`.
    """

    def prepare(plan: Plan) -> Batch:
        images = source.fetch(plan.ids, image_size)
        if augment is not None:
            images = vary(images, plan.ids, augment, seed, plan.epoch)
        pixels = to_tensor(images, image_size, normalise, channels_last=channels_last)
        return batch_of(source.labels, plan, (pixels,))

    if ahead is None:
        ahead = 1 if batch_size * 3 * image_size**2 * 4 > _LARGE_BATCH else 2
    plans = shuffled(
        len(source),
        batch_size=batch_size,
        seed=seed,
        epoch=epoch,
        epochs=epochs,
        start_batch=start_batch,
        drop_last=drop_last,
    )
    return Batches(plans, prepare, ahead=ahead, threads=threads)


def eval_batches(
    source: ImageSource,
    *,
    batch_size: int,
    image_size: int,
    normalise: Normalise,
    channels_last: bool = False,
    start_batch: int = 0,
    ahead: int = 2,
    threads: int = 1,
) -> Batches:
    """Read every image once, in order and as it is. Arguments as for `train_batches`."""

    def prepare(plan: Plan) -> Batch:
        images = source.fetch(plan.ids, image_size)
        pixels = to_tensor(images, image_size, normalise, channels_last=channels_last)
        return batch_of(source.labels, plan, (pixels,))

    return Batches(in_order(len(source), batch_size, start_batch), prepare, ahead=ahead, threads=threads)


def batch_of(labels: NDArray[np.int64], plan: Plan, inputs: tuple[Tensor, ...]) -> Batch:
    """Put together what was read of a batch; `labels` are those of the whole source."""
    return Batch(
        inputs=inputs,
        labels=torch.from_numpy(labels[plan.ids]),
        sample_ids=torch.from_numpy(plan.ids),
        epoch=plan.epoch,
        number=plan.number,
    )

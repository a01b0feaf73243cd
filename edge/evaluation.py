"""A pass over the test set, which an unreadable sample or the user may end early."""

import asyncio
from collections.abc import Callable

import torch
from torch import Tensor

from common.errors import UserError
from edge.data.loader import batch_count
from edge.job import Job
from edge.outcome import Score
from edge.pipeline import Pipeline
from edge.progress import Progress


class Evaluations:
    """When the test set is gone through, and that it is.

    Args:
        job: what was prepared.
        progress: is shown how far it has come.
        stopping: says whether to come to an end.
    """

    def __init__(self, job: Job, progress: Progress, stopping: Callable[[], bool]) -> None:
        every = job.config.eval_every
        self._every = job.steps_per_epoch if every is None else every
        self._job = job
        self._progress = progress
        self._stopping = stopping
        self._done = 0

    def is_due(self, step: int) -> bool:
        """Whether the model is to be evaluated as it is after a step, and was not yet."""
        due = self._every and (step % self._every == 0 or step == self._job.total_steps)
        return bool(due) and step > self._done and not self._stopping()

    async def run(self, pipeline: Pipeline, step: int, *, channels_last: bool) -> Score | None:
        """Evaluate; arguments, result and errors as `evaluate`'s."""
        score = await evaluate(
            pipeline,
            self._job,
            step,
            channels_last=channels_last,
            progress=self._progress,
            stopping=self._stopping,
        )
        if score is not None:
            self._done = step
        return score

    def went_back(self) -> None:
        """Training goes on from an earlier step: what comes after it is evaluated anew."""
        self._done = 0


async def evaluate(
    pipeline: Pipeline,
    job: Job,
    step: int,
    *,
    channels_last: bool,
    progress: Progress,
    stopping: Callable[[], bool],
) -> Score | None:
    """Evaluate the model as it is.

    Args:
        pipeline: with the job open on it.
        job: what was prepared.
        step: the last training step.
        channels_last: the layout of images in memory.
        progress: is shown how far it has come.
        stopping: says whether to come to an end.

    Returns:
        The score, or None where it was ended early.

    Raises:
        UserError: a sample cannot be read; training could go on.
        WireError: the link failed.
    """
    samples, chunk_size = job.samples, job.spec.chunk_size
    chunks = batch_count(samples.test_size, chunk_size)
    loop = asyncio.get_running_loop()
    batches = samples.test(batch_size=chunk_size, channels_last=channels_last)
    unreadable: UserError | None = None

    async def fetch(chunk: int) -> tuple[tuple[Tensor, ...], Tensor]:
        nonlocal unreadable
        if unreadable is None and not stopping():
            progress.evaluating(chunk, chunks)
            try:
                batch = await loop.run_in_executor(None, batches.get)
                assert batch is not None
                return batch.inputs, batch.labels
            except UserError as error:
                unreadable = error
        # The server waits for every chunk: come to the end with as little work as can be.
        return samples.filler(), torch.zeros(1, dtype=torch.int64)

    try:
        score = await pipeline.evaluate(step, chunks, fetch, depth=job.spec.in_flight)
    finally:
        await loop.run_in_executor(None, batches.close)
    if unreadable is not None:
        raise unreadable
    return None if stopping() else score

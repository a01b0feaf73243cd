"""A pass over the test set, which an unreadable sample or the user may end early.

It is made piece by piece. A lost link costs the piece under way and none of those before it, so that a long pass over a
bad link comes to its end; each has codecs of its own, so that the score does not depend on where the link was lost.
"""

import asyncio

import torch
from torch import Tensor

from common.errors import UserError
from edge.data.loader import Batches, batch_count
from edge.job import Job
from edge.outcome import Score
from edge.pipeline import Pipeline
from edge.progress import Progress
from edge.supervisor import Supervisor

PIECE = 64
"""Chunks of one piece."""


class Evaluations:
    """When the test set is gone through, and that it is.

    Args:
        job: what was prepared.
        progress: is shown how far it has come.
        supervisor: says whether to come to an end, and is told of every piece.
    """

    def __init__(self, job: Job, progress: Progress, supervisor: Supervisor) -> None:
        every = job.config.eval_every if job.total_steps else None
        self._every = job.steps_per_epoch if every is None else every
        self._job = job
        self._progress = progress
        self._supervisor = supervisor
        # Before the first step there is nothing to evaluate, unless that is all there is to do.
        self._before_all = 0 if job.total_steps else -1
        self._done = self._before_all
        self._chunks = batch_count(job.samples.test_size, job.spec.chunk_size)
        self._scored = 0
        self._score = Score()

    def is_due(self, step: int) -> bool:
        """Whether the model is to be evaluated as it is after a step, and was not yet."""
        due = self._every and (step % self._every == 0 or step == self._job.total_steps)
        return bool(due) and step > self._done and not self._supervisor.stopping

    async def run(self, pipeline: Pipeline, step: int, *, channels_last: bool) -> Score | None:
        """Evaluate the model as it is, or what is left to do of that where the link was lost.

        Args:
            pipeline: with the job open on it.
            step: the last training step.
            channels_last: the layout of images in memory.

        Returns:
            The score, or None where it was ended early.

        Raises:
            UserError: a sample cannot be read; training could go on.
            WireError: the link failed.
        """
        samples, chunk_size, loop = self._job.samples, self._job.spec.chunk_size, asyncio.get_running_loop()
        batches = samples.test(batch_size=chunk_size, channels_last=channels_last, start_batch=self._scored)
        try:
            while self._scored < self._chunks and not self._supervisor.stopping:
                await self._evaluate_piece(pipeline, step, batches)
                self._supervisor.progressed()
        except UserError:
            self._begin_anew()
            raise
        finally:
            await loop.run_in_executor(None, batches.close)
        score = None if self._supervisor.stopping else self._score
        self._begin_anew()
        if score is not None:
            self._done = step
        return score

    def went_back(self) -> None:
        """Training goes on from an earlier step: what comes after it is evaluated anew."""
        self._done = self._before_all
        self._begin_anew()

    def _begin_anew(self) -> None:
        self._scored, self._score = 0, Score()

    async def _evaluate_piece(self, pipeline: Pipeline, step: int, batches: Batches) -> None:
        loop, unreadable = asyncio.get_running_loop(), None

        async def fetch(chunk: int) -> tuple[tuple[Tensor, ...], Tensor]:
            nonlocal unreadable
            if unreadable is None and not self._supervisor.stopping:
                self._progress.evaluating(self._scored + chunk, self._chunks)
                try:
                    batch = await loop.run_in_executor(None, batches.get)
                    assert batch is not None
                    return batch.inputs, batch.labels
                except UserError as error:
                    unreadable = error
            # The server waits for every chunk: come to the end with as little work as can be.
            return self._job.samples.filler(), torch.zeros(1, dtype=torch.int64)

        chunks = min(PIECE, self._chunks - self._scored)
        score = await pipeline.evaluate(step, chunks, fetch, depth=self._job.spec.in_flight)
        if unreadable is not None:
            raise unreadable
        self._score.extend(score)
        self._scored += chunks

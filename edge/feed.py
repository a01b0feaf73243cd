"""Batches by step: each is a pure function of the step's number, so that any step can be made again."""

import asyncio

from edge.config import TrainConfig
from edge.data.loader import Batch, Batches
from edge.job import Job


class Feed:
    """The training batches of a run, read ahead in order from whatever step it is at.

    Args:
        job: what was prepared.
        channels_last: the layout of images in memory; an attribute, too.
    """

    def __init__(self, job: Job, *, channels_last: bool) -> None:
        self._samples = job.samples
        self._config: TrainConfig = job.config
        self._per_epoch = job.steps_per_epoch
        self._epochs = -(-job.total_steps // self._per_epoch)
        self.channels_last = channels_last
        self._batches: Batches | None = None
        self._step = 0
        self._fetching: asyncio.Future[Batch | None] | None = None

    async def batch(self, step: int) -> Batch:
        """Return the batch of a step; the same one again as often as it is asked for.

        Raises:
            UserError: a sample cannot be read.
        """
        if self._batches is None or self._fetching is None or step not in (self._step, self._step + 1):
            await self.close()
            self._batches = self._samples.train(
                batch_size=self._config.batch_size,
                epochs=self._epochs,
                channels_last=self.channels_last,
                start=divmod(step - 1, self._per_epoch),
            )
            self._fetch()
        elif step == self._step + 1:
            self._fetch()
        self._step = step
        assert self._fetching is not None
        # Whoever waits may be cancelled, and the batch must not be lost with it: the next one takes the same.
        batch = await asyncio.shield(self._fetching)
        assert batch is not None
        return batch

    def _fetch(self) -> None:
        assert self._batches is not None
        self._fetching = asyncio.get_running_loop().run_in_executor(None, self._batches.get)

    async def close(self) -> None:
        """Give up what was read ahead."""
        if self._batches is not None:
            await asyncio.get_running_loop().run_in_executor(None, self._batches.close)
        self._batches = self._fetching = None

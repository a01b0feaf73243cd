"""When a run writes checkpoints, and whether both sides have them."""

import asyncio
from collections.abc import Callable
from typing import Any

from common.errors import IsthmusError
from edge.context import Context
from edge.job import Job
from edge.link import Link
from edge.run_folder import RunFolder
from wire.messages import Saved


class Saves:
    """The checkpoints of a run.

    Whatever goes wrong with one is said loudly, and training goes on: those that there were stay.

    Args:
        folder: where they go on this side.
        every: steps from one to the next.
        about: what the run is.
        warn: tells people.
    """

    def __init__(
        self, folder: RunFolder, every: int, about: dict[str, Any], warn: Callable[[str], None]
    ) -> None:
        self.folder = folder
        self._every = every
        self._about = about
        self._warn = warn
        self._asked: dict[int, asyncio.Future[Saved]] = {}
        self._writing: asyncio.Task[None] | None = None

    def wants(self, step: int, *, last: bool) -> bool:
        """Whether a checkpoint of a step is due that neither is there nor was asked for on this connection.

        Args:
            step: the last one concluded.
            last: no other will follow.
        """
        due = last or step % self._every == 0
        return due and step not in self._asked and not self.folder.is_saved(step)

    async def save(self, context: Context, link: Link) -> None:
        """Let both sides write a checkpoint of the last step concluded.

        Raises:
            WireError: the link failed.
        """
        await self.written()  # one at a time: a slow disk slows the run, and does not fill memory
        step = context.outcome.step
        if step not in self.folder.steps:
            self._writing = asyncio.get_running_loop().create_task(self._write(step, context.snapshot()))
        self._asked[step] = answer = await link.save(step, self.folder.common)
        answer.add_done_callback(self._answered)
        if not self.folder.has_common:  # there has to be a step to go back to before anything can be lost
            await self.settled(link)

    async def _write(self, step: int, snapshot: Any) -> None:
        try:
            await self.folder.write(step, snapshot, self._about)
        except IsthmusError as error:
            self._warn(f"NO CHECKPOINT OF STEP {step} HERE: {error}; training goes on")
            return
        try:
            await self.folder.prune()
        except IsthmusError as error:
            self._warn(f"{error}; training goes on")

    def _answered(self, answer: asyncio.Future[Saved]) -> None:
        if answer.cancelled():
            return
        saved = answer.result()
        if saved.error:
            self._warn(f"NO CHECKPOINT OF STEP {saved.step} ON THE SERVER: {saved.error}; training goes on")
        else:
            self.folder.saved_there(saved.step)

    def lost(self) -> None:
        """The connection has gone: what was asked for and not answered may be asked for again."""
        for answer in self._asked.values():
            answer.cancel()
        self._asked = {}

    async def settled(self, link: Link) -> None:
        """Wait until both sides have written what was asked for, or have failed.

        Raises:
            WireError: the link failed.
        """
        await self.written()
        for answer in list(self._asked.values()):
            await link.answered(answer)

    async def written(self) -> None:
        """Wait until this side has written what it was asked for, or has failed."""
        if self._writing is not None:
            await asyncio.shield(self._writing)


def about(job: Job) -> dict[str, Any]:
    """What checkpoints of a run have to agree in."""
    spec = job.spec.to_map()
    del spec["trace"]  # changes no result
    return {"part": "edge", "spec": spec}

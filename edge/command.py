"""Training from the command line: progress on standard output, Ctrl-C, and the demo's own server."""

import asyncio
import contextlib
import signal
import sys
from collections.abc import Sequence

from common.errors import IsthmusError
from edge.config import TrainConfig
from edge.local_server import local_server
from edge.progress import open_progress
from edge.result import TrainResult
from edge.trainer import Trainer
from wire.transport import run


def train_command(config: TrainConfig, *, own_server: bool, modules: Sequence[str]) -> None:
    """Train and say how it went.

    Ctrl-C once ends after the step under way, twice at once.

    Args:
        config: what to do.
        own_server: start a server for this run, and stop it afterwards.
        modules: what that server has to import.
    """
    with local_server(modules) if own_server else contextlib.nullcontext(config.server) as server:
        result = run(_interruptible(config.at(server)))
    if result.steps < result.total_steps:
        sys.stdout.write(f"stopped after step {result.steps} of {result.total_steps}\n")
        sys.exit(130)
    accuracy = "" if result.accuracy is None else f", test accuracy {result.accuracy:.2%}"
    sys.stdout.write(f"done: {result.steps} steps{accuracy}\n")


async def _interruptible(config: TrainConfig) -> TrainResult:
    progress = open_progress(sys.stdout)
    trainer = Trainer(config, progress)
    task = asyncio.ensure_future(trainer.run())
    asked = False

    def interrupt() -> None:
        nonlocal asked
        if asked:
            task.cancel()
            return
        asked = True
        trainer.stop()
        progress.note("stopping after this step; Ctrl-C again stops now")

    with contextlib.suppress(NotImplementedError):
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, interrupt)
    try:
        return await task
    except asyncio.CancelledError:
        raise Interrupted(f"stopped at once after step {trainer.steps} of {trainer.total_steps}") from None


class Interrupted(IsthmusError):
    """The user did not want to wait for the step under way."""

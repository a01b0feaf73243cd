"""Training and evaluating from the command line: progress on standard output, Ctrl-C, and the demo's own server."""

import asyncio
import contextlib
import signal
import sys
from collections.abc import Sequence

from common.errors import IsthmusError
from edge.auto import settle
from edge.config import TrainConfig
from edge.local_server import local_server
from edge.progress import open_progress
from edge.result import TrainResult
from edge.run_folder import SessionKey
from edge.trainer import Trainer
from wire.transport import run


def train_command(
    config: TrainConfig,
    *,
    own_server: bool,
    modules: Sequence[str],
    cpu: bool,
    resumed: SessionKey | None = None,
) -> None:
    """Train and say how it went.

    Ctrl-C once ends after the step under way, twice at once; before the first step, once is enough.

    Args:
        config: what to do.
        own_server: start a server for this run, and stop it afterwards.
        modules: what that server has to import.
        cpu: that server computes on the CPU even where there is a GPU.
        resumed: the session of a run that goes on from its checkpoints.
    """
    with local_server(modules, cpu=cpu) if own_server else contextlib.nullcontext(config.server) as server:
        result = _run(config.at(server), resumed)
    if result.steps < result.total_steps:
        hint = "" if config.checkpoint is None else f"; go on by edge-client --resume {config.checkpoint}"
        sys.stdout.write(f"stopped after step {result.steps} of {result.total_steps}{hint}\n")
        sys.exit(130)
    accuracy = "" if result.accuracy is None else f", test accuracy {result.accuracy:.2%}"
    lost = f", {result.thrown_away} of them thrown away" if result.thrown_away else ""
    sys.stdout.write(f"done: {result.steps} steps{lost}{accuracy}\n")


def evaluate_command(config: TrainConfig) -> None:
    """Evaluate a model as it is; the score is the last line.

    Args:
        config: what to do; it trains nothing.
    """
    _run(config, None)


def _run(config: TrainConfig, resumed: SessionKey | None) -> TrainResult:
    """Run to the end; says so and exits where the user did not want to wait for it."""
    try:
        return run(_interruptible(config, resumed))
    except Interrupted as interrupted:
        sys.stdout.write(f"{interrupted}\n")
        sys.exit(130)


async def _interruptible(config: TrainConfig, resumed: SessionKey | None) -> TrainResult:
    progress = open_progress(sys.stdout)
    trainer: Trainer | None = None

    async def work() -> TrainResult:
        nonlocal trainer
        trainer = Trainer(await settle(config, progress.note), progress, resumed=resumed)
        return await trainer.run()

    loop, signals = asyncio.get_running_loop(), (signal.SIGINT, signal.SIGTERM)
    task = asyncio.ensure_future(work())
    asked = False

    def interrupt() -> None:
        nonlocal asked
        if asked or trainer is None or not trainer.training:
            for number in signals:  # whoever cannot wait for what is being computed to end has a third one
                loop.remove_signal_handler(number)
            task.cancel()
            return
        asked = True
        trainer.stop()
        progress.note("stopping after this step; Ctrl-C again stops now")

    with contextlib.suppress(NotImplementedError):
        for number in signals:
            loop.add_signal_handler(number, interrupt)
    try:
        return await task
    except asyncio.CancelledError:
        if trainer is None or not trainer.training:
            what = "the end of the test set" if config.only_evaluates else "the first step"
            raise Interrupted(f"stopped before {what}") from None
        left = "nothing was saved"
        if config.checkpoint is not None:
            left = f"go on from the last checkpoint by edge-client --resume {config.checkpoint}"
        raise Interrupted(
            f"stopped at once after step {trainer.steps} of {trainer.total_steps}; {left}"
        ) from None


class Interrupted(IsthmusError):
    """The user did not want to wait for a step to end."""

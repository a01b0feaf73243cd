"""What a run leaves behind: figures, and the whole trained model."""

import json
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from common.errors import TrainingStopped
from common.metrics import SummaryReport
from common.narrowing import narrow_to
from common.trace import Tracer
from common.weights import merge_states, partition_state, save_model, split_bottleneck
from edge.config import TrainConfig
from edge.context import Context
from edge.job import Job


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What a run came to.

    Attributes:
        steps: training steps made, those included that were thrown away.
        total_steps: steps that were asked for.
        thrown_away: steps whose gradients overflowed in fp16, so that they changed nothing.
        loss: of the last step; None if there was none.
        accuracy: of the last evaluation, 0 to 1; None if there was none.
        mcc: its Matthews' correlation coefficient, for text; else None.
        summary: bytes, times and busy shares.
        state: the whole trained model by plain names, a bottleneck's own weights under ``bottleneck.``; empty
            where neither a file nor the state was asked for.
    """

    steps: int
    total_steps: int
    thrown_away: int
    loss: float | None
    accuracy: float | None
    mcc: float | None
    summary: SummaryReport
    state: dict[str, Tensor]


async def fetch_state(job: Job, context: Context) -> dict[str, Tensor]:
    """Fetch the middle and join the three partitions; see `TrainResult.state`."""
    narrow_to(context.committed, job.parts.middle)  # its shapes are those that the server's has by now
    middle = await context.link.fetch_middle(job.middle_state())
    whole, bottleneck = merge_states(
        job.initial_state,
        partition_state(context.front.partition),
        middle,
        partition_state(context.back.partition),
    )
    return {**whole, **bottleneck}


def write_model(job: Job, state: Mapping[str, Tensor], steps: int, stopped: Exception | None) -> None:
    """Write the trained model where it was asked for, if it is worth something.

    Args:
        job: what was trained.
        state: `fetch_state`'s.
        steps: how many made it.
        stopped: what ended training early, for the message; None where nothing did.

    Raises:
        TrainingStopped: it is worth nothing, or cannot be written.
    """
    try:
        check_sound(job, state, steps)
        save_state(state, job.config, steps, job.spec.cuts)
    except TrainingStopped as failed:
        raise TrainingStopped(f"{stopped}; {failed}" if stopped else str(failed)) from failed


def check_sound(job: Job, state: Mapping[str, Tensor], steps: int) -> None:
    """Refuse weights that nothing can be done with, and that would take an older file's place.

    Raises:
        TrainingStopped: a trained parameter is not finite.
    """
    trained = {
        name for partition in job.parts.partitions.values() for name, _ in partition.named_parameters()
    }
    for name, tensor in state.items():
        if name in trained and not tensor.isfinite().all():
            raise TrainingStopped(
                f"the weights of step {steps} are not finite ({name}), so nothing was written to {job.config.save}; "
                "give a lower --lr"
            )


def save_state(state: Mapping[str, Tensor], config: TrainConfig, steps: int, cuts: tuple[str, str]) -> None:
    """Write the trained model where `config.save` says, whole or not at all; if not there, to a temporary folder.

    A bottleneck's place goes into the file's header: it is of use at these cuts only.

    Raises:
        TrainingStopped: the disk is full, or the file cannot be written; says where the model is instead.
    """
    assert config.save is not None
    own, bottleneck = split_bottleneck(state)
    metadata = {"model": config.model, "steps": str(steps)}
    if bottleneck:
        metadata["cuts"] = json.dumps(cuts)
    try:
        save_model(config.save, own, bottleneck, metadata)
    except OSError as error:
        said = f"the model of step {steps} could not be written to {config.save}: {error.strerror or error}"
        instead: Path | None = None
        try:
            instead = Path(tempfile.mkdtemp(prefix="isthmus-"), config.save.name)
            save_model(instead, own, bottleneck, metadata)
        except OSError:
            if instead is not None:
                with suppress(OSError):
                    instead.parent.rmdir()
            raise TrainingStopped(f"{said}; nor to {tempfile.gettempdir()}, so it is lost") from error
        raise TrainingStopped(f"{said}; it is in {instead} instead") from error


def write_trace(tracer: Tracer, path: Path) -> None:
    """Write the timeline of both sides.

    Raises:
        TrainingStopped: the disk is full, or the file cannot be written.
    """
    try:
        tracer.write(path)
    except OSError as error:
        reason = error.strerror or str(error)
        raise TrainingStopped(f"the timeline could not be written to {path}: {reason}") from error


def kept(config: TrainConfig, steps: int) -> str:
    """Say what is left of a run that ended early, after so many steps."""
    if config.only_evaluates:
        return "the test set was not gone through"
    if steps == 0:
        return "no step had been made, so nothing was saved"
    if config.save is None:
        return "give --save to keep the last good weights"
    return f"the weights of step {steps} are in {config.save}"

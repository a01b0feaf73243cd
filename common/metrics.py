"""What a run reports about itself: steps, evaluations and a summary, and the file that keeps them."""

import contextlib
import json
import math
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from types import TracebackType
from typing import Self, TypeAlias

from common.errors import UserError

Value: TypeAlias = str | int | float | None


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """One training step.

    Attributes:
        step: number of the step, from 1, over the whole run.
        epoch: number of its epoch, from 0.
        loss: mean over the batch.
        accuracy: share of the batch that was classified right, or None where that was not counted.
        samples: size of the batch.
        step_s: seconds from the end of the step before to the end of this one.
        up_bytes: what the socket carried to the cloud, headers included.
        down_bytes: what it carried back.
        dense_bytes: size of the boundary tensors as dense fp32, both ways.
    """

    step: int
    epoch: int
    loss: float
    step_s: float
    samples: int
    up_bytes: int
    down_bytes: int
    dense_bytes: int
    accuracy: float | None = None

    @property
    def samples_per_s(self) -> float | None:
        """Samples trained in a second."""
        return ratio(self.samples, self.step_s)

    @property
    def compress_rate(self) -> float | None:
        """Bytes on the socket, both ways, over the dense bytes."""
        return ratio(self.up_bytes + self.down_bytes, self.dense_bytes)

    def record(self) -> dict[str, Value]:
        """Give the line of the metrics file."""
        return {
            "event": "step",
            "step": self.step,
            "epoch": self.epoch,
            "loss": self.loss,
            "step_s": self.step_s,
            "samples_per_s": self.samples_per_s,
            "up_bytes": self.up_bytes,
            "down_bytes": self.down_bytes,
            "dense_bytes": self.dense_bytes,
            "compress_rate": self.compress_rate,
        }


@dataclass(frozen=True, kw_only=True)
class EvalReport:
    """One pass over the test set.

    Attributes:
        step: the training step that it followed; 0 before the first.
        loss: mean over the set.
        accuracy: share that was classified right, 0 to 1.
        mcc: Matthews correlation, where the task is judged by it.
    """

    step: int
    loss: float
    accuracy: float
    mcc: float | None = None

    def record(self) -> dict[str, Value]:
        """Give the line of the metrics file."""
        line: dict[str, Value] = {
            "event": "eval",
            "step": self.step,
            "loss": self.loss,
            "accuracy": self.accuracy,
        }
        return line if self.mcc is None else line | {"mcc": self.mcc}


@dataclass(frozen=True, kw_only=True)
class SummaryReport:
    """A whole run.

    Attributes:
        steps: training steps that this run made.
        median_step_s: median of their seconds.
        up_bytes: what the socket carried to the cloud, all of it.
        down_bytes: what it carried back.
        compress_rate: training's bytes on the socket over training's dense bytes.
        reconnects: how often the connection was made anew.
        link_busy: share of the training time that the busier direction of the link was busy, 0 to 1.
        edge_busy: share that the edge computed.
        cloud_busy: share that the cloud computed.
    """

    steps: int
    median_step_s: float | None
    up_bytes: int
    down_bytes: int
    compress_rate: float | None
    reconnects: int
    link_busy: float | None
    edge_busy: float | None
    cloud_busy: float | None

    def record(self) -> dict[str, Value]:
        """Give the line of the metrics file."""
        return {
            "event": "summary",
            "steps": self.steps,
            "median_step_s": self.median_step_s,
            "up_bytes": self.up_bytes,
            "down_bytes": self.down_bytes,
            "compress_rate": self.compress_rate,
            "reconnects": self.reconnects,
            "link_busy": self.link_busy,
            "edge_busy": self.edge_busy,
            "cloud_busy": self.cloud_busy,
        }


Report: TypeAlias = StepReport | EvalReport | SummaryReport


def ratio(part: float, whole: float) -> float | None:
    """Divide, or give None where there is nothing to divide by."""
    return part / whole if whole > 0 else None


class MetricsWriter:
    """Writes reports to a file, one line of JSON each, every line at once.

    A disk that fills up does not end the training: it is said once, loudly, and lines are missing until there
    is room again. No line is ever left torn.

    Args:
        path: the file. What it holds is replaced.
        warn: tells people; called once from `write`, and from `rewind`.
        append: add to what the file holds instead.

    Raises:
        UserError: the file cannot be opened for writing.
    """

    def __init__(self, path: Path | str, *, warn: Callable[[str], None], append: bool = False) -> None:
        self._path = path
        self._warn = warn
        self._warned = False
        flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_APPEND | (0 if append else os.O_TRUNC)
        try:
            self._fd: int | None = os.open(path, flags, 0o666)
        except OSError as error:
            raise UserError(f"cannot write metrics to {path}: {error.strerror or error}") from error

    def write(self, report: Report) -> None:
        """Write one line; numbers that JSON has no word for (infinity, not-a-number) become null."""
        if self._fd is None:
            raise ValueError("the metrics file is closed")
        line = json.dumps({key: _finite(value) for key, value in report.record().items()}, allow_nan=False)
        unwritten = memoryview(line.encode() + b"\n")
        written = 0
        try:
            while written < len(unwritten):
                written += os.write(self._fd, unwritten[written:])
        except OSError as error:
            self._take_back(written)
            if not self._warned:
                self._warned = True
                self._warn(
                    f"METRICS ARE BEING LOST: cannot write to {self._path} ({error.strerror or error}); "
                    "free some space; training goes on"
                )

    def rewind(self, step: int) -> None:
        """Bring the file back to where a step had just been made: what is after it is cut off, which takes no room.

        Where it cannot be, that is said loudly, and training goes on. A pipe or a device stays as it is.

        Args:
            step: the last step that stays. Its evaluation goes, for it is made again.
        """
        if self._fd is None:
            raise ValueError("the metrics file is closed")
        try:
            mine = os.fstat(self._fd)
            # A file that was moved away, as logs are, is not this run's to cut any more.
            if stat.S_ISREG(mine.st_mode) and os.path.samestat(mine, os.stat(self._path)):
                lines = Path(self._path).read_bytes().splitlines(keepends=True)
                os.ftruncate(self._fd, sum(map(len, takewhile(lambda line: _is_before(line, step), lines))))
        except OSError as error:
            self._warn(
                f"METRICS AFTER STEP {step} STAND IN {self._path} TWICE: it cannot be cut off there "
                f"({error.strerror or error}); training goes on"
            )

    def close(self) -> None:
        """Close the file. Harmless when repeated."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def _take_back(self, written: int) -> None:
        if written and self._fd is not None:
            with contextlib.suppress(OSError):  # a pipe cannot take anything back
                os.ftruncate(self._fd, os.lseek(self._fd, -written, os.SEEK_CUR))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _is_before(line: bytes, step: int) -> bool:
    try:
        record = json.loads(line)
        at = record["step"]
        return bool(line.endswith(b"\n") and (at < step or (at == step and record["event"] == "step")))
    except (ValueError, KeyError, TypeError):
        return False


def _finite(value: Value) -> Value:
    return None if isinstance(value, float) and not math.isfinite(value) else value

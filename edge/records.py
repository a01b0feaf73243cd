"""What is told of a run: to people, in the metrics file, and in the summary."""

import time
from contextlib import ExitStack
from typing import Any

from common.metrics import EvalReport, MetricsWriter, Report, StepReport, SummaryReport
from common.stats import RunStats
from common.trace import Tracer
from edge.busy import BusyTimes
from edge.config import TrainConfig
from edge.data.loader import Batch
from edge.job import Job
from edge.link import Link
from edge.outcome import Outcome, Score
from edge.progress import Progress
from wire.errors import RemoteProtocolError
from wire.messages import Committed


class Records:
    """Counts steps, evaluations, bytes and busy times, over all connections of a run.

    Args:
        config: what was asked for.
        progress: is shown what happens.
        tracer: takes in the server's timeline.

    Attributes:
        busy: how long each side worked.
        loss: of the last step; None before the first.
        accuracy: of the last evaluation, None before the first.
        mcc: its Matthews' correlation coefficient, for text.
        reported: the last step that was reported.
    """

    def __init__(self, config: TrainConfig, progress: Progress, tracer: Tracer) -> None:
        self.busy = BusyTimes()
        self.loss: float | None = None
        self.accuracy: float | None = None
        self.mcc: float | None = None
        self.reported = 0
        self._config = config
        self._progress = progress
        self._tracer = tracer
        self._stats = RunStats()
        self._metrics: MetricsWriter | None = None
        self._link: Link | None = None
        self._up_before = self._down_before = 0  # of connections that have gone
        self._reconnects = -1
        self._begun = (-1, 0.0, 0, 0)
        self._thrown_away: list[int] = []
        self._job: Job

    def open(self, job: Job, resources: ExitStack, *, append: bool) -> None:
        """Begin, once the server has taken the job.

        Args:
            job: what was prepared.
            resources: closes the metrics file.
            append: go on with the metrics file of an earlier process.

        Raises:
            UserError: the metrics file cannot be written.
        """
        self._job, path = job, self._config.metrics
        if path is not None:  # not before: a run that comes to nothing leaves the old file as it is
            writer = MetricsWriter(path, warn=self._progress.note, append=append)
            self._metrics = resources.enter_context(writer)

    def connected(self, link: Link) -> None:
        """A connection takes the run up."""
        self._link = link
        self._reconnects += 1
        link.on_committed = self._on_committed

    def disconnected(self, link: Link) -> None:
        """A connection has gone."""
        self._up_before += link.connection.sent_bytes
        self._down_before += link.connection.received_bytes
        self._link = None

    @property
    def up_bytes(self) -> int:
        """Bytes that all connections took."""
        return self._up_before + (0 if self._link is None else self._link.connection.sent_bytes)

    @property
    def down_bytes(self) -> int:
        """Bytes that all connections brought."""
        return self._down_before + (0 if self._link is None else self._link.connection.received_bytes)

    def begin(self, step: int) -> None:
        """A step begins, or begins again."""
        if self._begun[0] != step:
            self._begun = step, time.perf_counter(), self.up_bytes, self.down_bytes

    def concluded(self, outcome: Outcome, batch: Batch) -> None:
        """Report a step, unless it was."""
        score, (step, start_s, up, down) = outcome.score, self._begun
        if outcome.step <= self.reported or outcome.reason or score is None:
            return
        self.reported = outcome.step
        if not outcome.applied:
            self._thrown_away.append(step)
            self._progress.note(
                f"step {step}: fp16 overflowed; the step was thrown away and the loss scale halved"
            )
        report = StepReport(
            step=step,
            epoch=batch.epoch,
            loss=score.loss,
            accuracy=score.accuracy,
            step_s=time.perf_counter() - start_s,
            samples=score.samples,
            up_bytes=self.up_bytes - up,
            down_bytes=self.down_bytes - down,
            # Activations and gradients.
            dense_bytes=2 * self._job.parts.dense_bytes(score.samples),
        )
        self.loss = score.loss
        self._stats.add(report)
        self._progress.step(report)
        self._report(report)

    def evaluated(self, step: int, score: Score) -> None:
        """Report an evaluation."""
        self.accuracy = score.accuracy
        self.mcc = score.mcc if self._job.samples.judged_by_mcc else None
        report = EvalReport(step=step, loss=score.loss, accuracy=score.accuracy, mcc=self.mcc)
        self._progress.evaluated(report)
        self._report(report)

    def went_back(self, step: int) -> None:
        """The run goes on from an earlier step, or from where another process left it."""
        self._stats.take_back(self.reported - step)
        self._thrown_away = [number for number in self._thrown_away if number <= step]
        self.reported = step
        self._begun = (-1, 0.0, 0, 0)
        if self._metrics is not None:
            self._metrics.rewind(step)

    @property
    def thrown_away(self) -> int:
        """Steps whose gradients overflowed, so that they changed nothing."""
        return len(self._thrown_away)

    @property
    def scores(self) -> dict[str, Any]:
        """The newest loss, accuracy and Matthews' correlation, None where there is none, and `thrown_away`; by name."""
        made = {"loss": self.loss, "accuracy": self.accuracy, "mcc": self.mcc}
        return made | {"thrown_away": self.thrown_away}

    def summary(self) -> SummaryReport:
        """Sum the run up, and report it."""
        busy = self.busy
        summary = self._stats.summary(
            reconnects=max(self._reconnects, 0),
            link_busy_s=max(busy.up_s, busy.down_s),
            edge_busy_s=busy.edge_s,
            cloud_busy_s=busy.cloud_s,
            up_bytes=self.up_bytes,
            down_bytes=self.down_bytes,
        )
        self._report(summary)
        return summary

    def _on_committed(self, message: Committed) -> None:
        self.busy.committed(message.detail)
        events = message.detail.get("events")
        if isinstance(events, list) and self._link is not None:
            try:
                self._tracer.merge("cloud", events, offset_ns=self._link.connection.clock_offset_ns)
            except ValueError as error:
                raise RemoteProtocolError(f"the server's timeline makes no sense: {error}") from error

    def _report(self, report: Report) -> None:
        if self._metrics is not None:
            self._metrics.write(report)

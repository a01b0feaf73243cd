"""A whole run on the edge: connect, train, evaluate, report, save."""

import asyncio
import time
from contextlib import ExitStack

from torch import Tensor

from common.errors import TrainingStopped, UserError
from common.lanes import COMPUTE, Lanes
from common.metrics import EvalReport, MetricsWriter, Report, StepReport, SummaryReport
from common.runtime import default_threads
from common.stats import RunStats
from common.trace import Tracer
from edge.busy import BusyTimes
from edge.config import TrainConfig, parse_address
from edge.context import Context, build_context
from edge.data.loader import Batch
from edge.evaluation import evaluate
from edge.job import Job, describe, prepare
from edge.link import Link, open_link
from edge.pipeline import Pipeline
from edge.progress import Progress, SilentProgress
from edge.result import TrainResult, fetch_state, save_state, write_trace
from edge.security import wire_config
from edge.tuner import Tuner, measured_model
from wire.errors import ConnectionLost, RemoteProtocolError
from wire.messages import Committed
from wire.transport import run


class Trainer:
    """One run.

    Args:
        config: what to do.
        progress: is shown what happens.
        keep_state: fetch the trained model even where no file is asked for.
    """

    def __init__(self, config: TrainConfig, progress: Progress, *, keep_state: bool = False) -> None:
        self._config = config
        self._progress = progress
        self._keep_state = keep_state
        self._tracer = Tracer("edge", enabled=config.trace is not None)
        self._stats = RunStats()
        self._stop_asked = self.training = False
        self._total_steps = 0
        self._loss: float | None = None
        self._accuracy: float | None = None
        self._mcc: float | None = None
        self._busy = BusyTimes()
        self._metrics: MetricsWriter | None = None
        self._link: Link
        self._lanes: Lanes
        self._job: Job
        self._context: Context
        self._pipeline: Pipeline

    def stop(self) -> None:
        """Ask the run to end after the step under way."""
        self._stop_asked = True

    @property
    def steps(self) -> int:
        """Steps made so far."""
        return self._stats.steps

    @property
    def total_steps(self) -> int:
        """Steps that were asked for; 0 before that is known."""
        return self._total_steps

    async def run(self) -> TrainResult:
        """Train to the end, or until `stop`.

        Raises:
            UserError: something in the settings does not exist or does not fit.
            TrainingStopped: training cannot go on; the last good weights are saved where a file was asked for.
            WireError: the link failed.
        """
        config = self._config
        host, port = parse_address(config.server)
        wire = wire_config(config)
        with ExitStack() as resources:
            resources.callback(self._progress.finish)
            self._lanes = lanes = Lanes(self._tracer, config.threads or default_threads())
            resources.callback(lanes.close)
            try:
                async with open_link(host, port, self._tracer, wire) as self._link:
                    self._job = await lanes.run(COMPUTE, "prepare", prepare, config)
                    self._total_steps = self._job.total_steps
                    await self._open(resources)
                    stopped = await self._train_until_stopped()
                    state = await self._collect()
            except ConnectionLost as lost:
                raise ConnectionLost(f"the link to {config.server} was lost {self._when}: {lost}") from lost
            summary = self._summary()
            self._report(summary)
            if config.trace is not None:
                write_trace(self._tracer, config.trace)
                self._progress.note(f"the timeline is in {config.trace}; open it at https://ui.perfetto.dev")
        if stopped is not None:
            raise TrainingStopped(f"{stopped}; {self._kept()}") from stopped
        return TrainResult(
            steps=self._stats.steps,
            total_steps=self._job.total_steps,
            loss=self._loss,
            accuracy=self._accuracy,
            mcc=self._mcc,
            summary=summary,
            state=state,
        )

    async def _open(self, resources: ExitStack) -> None:
        job, config = self._job, self._config
        ready = await self._link.open(job.spec, job.middle_state)
        if config.metrics is not None:  # not before: a run that comes to nothing leaves the old file as it is
            writer = MetricsWriter(config.metrics, warn=self._progress.note)
            self._metrics = resources.enter_context(writer)
        self._link.on_committed = self._on_committed
        self._context = build_context(job, self._link, self._lanes, ready.memory_format)
        resources.callback(self._context.close)
        self._pipeline = Pipeline(
            self._context, clip_norm=config.clip_norm, skip_overflow=config.amp == "fp16"
        )
        self._channels_last = ready.memory_format == "channels_last"
        self._tuner = Tuner(config.chunks, config.depth)
        self._progress.note(describe(job, ready))

    async def _train_until_stopped(self) -> TrainingStopped | UserError | None:
        """Train; returns what ended it early: a loss that is not finite, or a sample that cannot be read."""
        try:
            await self._train()
        except (TrainingStopped, UserError) as stopped:
            return stopped
        return None

    async def _train(self) -> None:
        job, config = self._job, self._config
        per_epoch = job.steps_per_epoch
        epochs = -(-job.total_steps // per_epoch)
        evaluate_every = per_epoch if config.eval_every is None else config.eval_every
        self._progress.start(
            total_steps=job.total_steps, total_epochs=None if config.steps else config.epochs
        )
        batches = job.samples.train(
            batch_size=config.batch_size, epochs=epochs, channels_last=self._channels_last
        )
        loop = asyncio.get_running_loop()
        try:
            for step in range(1, job.total_steps + 1):
                if self._stop_asked:
                    return
                start_s = time.perf_counter()
                batch = await loop.run_in_executor(None, batches.get)
                assert batch is not None
                self.training = True
                await self._one_step(step, batch, start_s)
                is_due = evaluate_every and (step % evaluate_every == 0 or step == job.total_steps)
                if is_due and not self._stop_asked:
                    await self._evaluate(step)
        finally:
            await loop.run_in_executor(None, batches.close)

    async def _one_step(self, step: int, batch: Batch, start_s: float) -> None:
        config, connection = self._config, self._link.connection
        up, down = connection.sent_bytes, connection.received_bytes
        self._busy.begin(self._lanes, self._link)
        score, applied = await self._pipeline.train(
            step,
            batch.inputs,
            batch.labels,
            chunks=config.chunks,
            depth=self._tuner.plan.depth,
            sample_ids=batch.sample_ids,
        )
        await self._tune()
        if not applied:
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
            up_bytes=connection.sent_bytes - up,
            down_bytes=connection.received_bytes - down,
            # Activations and gradients.
            dense_bytes=2 * self._job.parts.dense_bytes(score.samples),
        )
        self._busy.end(self._lanes, self._link)
        self._loss = score.loss
        self._stats.add(report)
        self._progress.step(report)
        self._report(report)

    async def _tune(self) -> None:
        """Choose how to order a step, once enough has been seen."""
        tuner, link = self._tuner, self._link
        tuner.stepped()
        edge, sizes = self._lanes.take_means(), link.sent.take_sizes()
        if tuner.wants_measurements:
            await link.confirmed()
            model = measured_model(
                chunks=self._config.chunks,
                edge=edge,
                cloud=self._busy.cloud_detail,
                sizes=sizes,
                up_bit_s=link.sent.rate_bit_s,
                rtt_s=link.connection.rtt_s or 0.0,
                shared_cores=link.is_local,
            )
            plan = await asyncio.to_thread(tuner.choose, model)
            link.connection.lead(plan.lead)

    async def _evaluate(self, step: int) -> None:
        score = await evaluate(
            self._pipeline,
            self._job,
            step,
            channels_last=self._channels_last,
            progress=self._progress,
            stopping=lambda: self._stop_asked,
        )
        if score is None:
            return
        self._accuracy = score.accuracy
        self._mcc = score.mcc if self._job.samples.judged_by_mcc else None
        report = EvalReport(step=step, loss=score.loss, accuracy=score.accuracy, mcc=self._mcc)
        self._progress.evaluated(report)
        self._report(report)

    async def _collect(self) -> dict[str, Tensor]:
        """Bring the trained model together where it is wanted, and write it where it was asked for."""
        config, state = self._config, {}
        await self._link.confirmed()
        saves = (
            config.save is not None and self.steps > 0
        )  # an older file is worth more than an untrained model
        if self._keep_state or saves:
            state = await fetch_state(self._job, self._context)
        if saves:
            await self._lanes.run(COMPUTE, "save", save_state, state, config, self.steps)
            self._progress.note(f"the model is in {config.save}")
        return state

    def _kept(self) -> str:
        if self.steps == 0:
            return "no step had been made, so nothing was saved"
        save = self._config.save
        if save is None:
            return "give --save to keep the last good weights"
        return f"the weights of step {self.steps} are in {save}"

    @property
    def _when(self) -> str:
        return f"after step {self.steps} of {self.total_steps}" if self.training else "before the first step"

    def _summary(self) -> SummaryReport:
        connection, busy = self._link.connection, self._busy
        return self._stats.summary(
            link_busy_s=max(busy.up_s, busy.down_s),
            edge_busy_s=busy.edge_s,
            cloud_busy_s=busy.cloud_s,
            up_bytes=connection.sent_bytes,
            down_bytes=connection.received_bytes,
        )

    def _on_committed(self, message: Committed) -> None:
        self._busy.committed(message.detail)
        events = message.detail.get("events")
        if isinstance(events, list):
            try:
                self._tracer.merge("cloud", events, offset_ns=self._link.connection.clock_offset_ns)
            except ValueError as error:
                raise RemoteProtocolError(f"the server's timeline makes no sense: {error}") from error

    def _report(self, report: Report) -> None:
        if self._metrics is not None:
            self._metrics.write(report)


def train(config: TrainConfig, progress: Progress | None = None) -> TrainResult:
    """Train from code as ``edge-client`` does; the result holds the trained model.

    Args:
        config: what to do.
        progress: is shown what happens; silent by default.

    Raises:
        As `Trainer.run`.
    """
    return run(Trainer(config, progress or SilentProgress(), keep_state=True).run())

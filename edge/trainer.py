"""A whole run on the edge: connect, train, evaluate, report, save."""

import asyncio
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

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
from edge.data.loader import Batch, batch_count, eval_batches, train_batches
from edge.depth import DepthTuner, measured_model
from edge.job import Job, describe, prepare
from edge.link import Link, open_link
from edge.pipeline import Pipeline
from edge.progress import Progress, SilentProgress
from edge.result import TrainResult, fetch_state, save_state
from wire.errors import RemoteProtocolError
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
        self._keep_state = keep_state or config.save is not None
        self._tracer = Tracer("edge", enabled=config.trace is not None)
        self._stats = RunStats()
        self._stop_asked = False
        self._total_steps = 0
        self._loss: float | None = None
        self._accuracy: float | None = None
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
        with self._resources() as lanes:
            async with open_link(host, port, self._tracer) as link:
                self._lanes, self._link = lanes, link
                self._job = await lanes.run(COMPUTE, "prepare", prepare, config)
                self._total_steps = self._job.total_steps
                await self._open()
                try:
                    await self._train()
                except (TrainingStopped, UserError) as error:
                    # A loss that is not finite, or a sample that cannot be read: what was learnt is kept.
                    await self._collect()
                    kept = f"the weights of step {self.steps} are in {config.save}"
                    hint = "give --save to keep the last good weights"
                    raise TrainingStopped(f"{error}; {kept if config.save else hint}") from error
                state = await self._collect()
                summary = self._summary()
            self._report(summary)
        return TrainResult(
            steps=self._stats.steps,
            total_steps=self._job.total_steps,
            loss=self._loss,
            accuracy=self._accuracy,
            summary=summary,
            state=state,
        )

    @contextmanager
    def _resources(self) -> Iterator[Lanes]:
        config = self._config
        with ExitStack() as stack:
            stack.callback(self._progress.finish)
            if config.metrics is not None:
                self._metrics = stack.enter_context(MetricsWriter(config.metrics, warn=self._progress.note))
            lanes = Lanes(self._tracer, config.threads or default_threads())
            stack.callback(lanes.close)
            yield lanes

    async def _open(self) -> None:
        job, config = self._job, self._config
        ready = await self._link.open(job.spec, job.middle_state)
        self._link.on_committed = self._on_committed
        self._context = build_context(job, self._link, self._lanes, ready.memory_format)
        self._pipeline = Pipeline(
            self._context, clip_norm=config.clip_norm, skip_overflow=config.amp == "fp16"
        )
        self._channels_last = ready.memory_format == "channels_last"
        self._depth = DepthTuner(config.chunks, config.depth)
        self._progress.note(describe(job, ready))

    async def _train(self) -> None:
        job, config = self._job, self._config
        per_epoch = job.steps_per_epoch
        epochs = -(-job.total_steps // per_epoch)
        evaluate_every = per_epoch if config.eval_every is None else config.eval_every
        self._progress.start(
            total_steps=job.total_steps, total_epochs=None if config.steps else config.epochs
        )
        batches = train_batches(
            job.dataset.train,
            batch_size=config.batch_size,
            seed=config.seed,
            epoch=0,
            epochs=epochs,
            image_size=job.image_size,
            normalise=job.dataset.normalise,
            augment=job.dataset.augment if config.augment else None,
            channels_last=self._channels_last,
        )
        loop = asyncio.get_running_loop()
        try:
            for step in range(1, job.total_steps + 1):
                if self._stop_asked:
                    return
                start_s = time.perf_counter()
                batch = await loop.run_in_executor(None, batches.get)
                assert batch is not None
                await self._one_step(step, batch, start_s)
                if evaluate_every and (step % evaluate_every == 0 or step == job.total_steps):
                    await self._evaluate(step)
        finally:
            await loop.run_in_executor(None, batches.close)

    async def _one_step(self, step: int, batch: Batch, start_s: float) -> None:
        config, connection = self._config, self._link.connection
        up, down = connection.sent_bytes, connection.received_bytes
        self._busy.begin(self._lanes, self._link)
        score, applied = await self._pipeline.train(
            step,
            batch.inputs[0],
            batch.labels,
            chunks=config.chunks,
            depth=self._depth.depth,
        )
        await self._tune_depth()
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

    async def _tune_depth(self) -> None:
        """Choose how many chunks to keep in flight, once enough has been seen."""
        tuner, link = self._depth, self._link
        tuner.stepped()
        edge, sizes = self._lanes.take_means(), link.sent.take_sizes()
        if tuner.wants_measurements:
            await link.confirmed()
            tuner.choose(
                measured_model(
                    chunks=self._config.chunks,
                    edge=edge,
                    cloud=self._busy.cloud_detail,
                    sizes=sizes,
                    up_bit_s=link.sent.rate_bit_s,
                    rtt_s=link.connection.rtt_s or 0.0,
                    shared_cores=link.is_local,
                )
            )

    async def _evaluate(self, step: int) -> None:
        job, chunk_size = self._job, self._job.spec.chunk_size
        source = job.dataset.test
        chunks = batch_count(len(source), chunk_size)
        loop = asyncio.get_running_loop()
        batches = eval_batches(
            source,
            batch_size=chunk_size,
            image_size=job.image_size,
            normalise=job.dataset.normalise,
            channels_last=self._channels_last,
            ahead=4,
        )

        async def fetch(chunk: int) -> tuple[Tensor, Tensor]:
            self._progress.evaluating(chunk, chunks)
            batch = await loop.run_in_executor(None, batches.get)
            assert batch is not None
            return batch.inputs[0], batch.labels

        try:
            score = await self._pipeline.evaluate(step, chunks, fetch, depth=job.spec.in_flight)
        finally:
            await loop.run_in_executor(None, batches.close)
        self._accuracy = score.accuracy
        report = EvalReport(step=step, loss=score.loss, accuracy=score.accuracy)
        self._progress.evaluated(report)
        self._report(report)

    async def _collect(self) -> dict[str, Tensor]:
        """Bring the trained model together, and write the files that were asked for."""
        config, state = self._config, {}
        await self._link.confirmed()
        if self._keep_state:
            state = await fetch_state(self._job, self._context)
        if config.save is not None:
            await self._lanes.run(COMPUTE, "save", save_state, state, config, self._stats.steps)
            self._progress.note(f"the model is in {config.save}")
        if config.trace is not None:
            self._tracer.write(config.trace)
            self._progress.note(f"the timeline is in {config.trace}; open it at https://ui.perfetto.dev")
        return state

    def _kept(self) -> str:
        step, save = self._stats.steps, self._config.save
        return (
            f"the weights of step {step} are in {save}"
            if save
            else "give --save to keep the last good weights"
        )

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

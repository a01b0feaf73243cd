"""A whole run on the edge: connect, train, evaluate, save; taken up again as often as the link is lost."""

from contextlib import ExitStack

from torch import Tensor

from common.differences import check_same
from common.errors import TrainingStopped, UserError
from common.lanes import COMPUTE, Lanes
from common.runtime import default_threads
from common.trace import Tracer
from edge.claim import Claim
from edge.compress import parse_compress
from edge.config import TrainConfig
from edge.context import Context, build_context
from edge.evaluation import Evaluations
from edge.feed import Feed
from edge.job import Job, describe, prepare
from edge.link import Link
from edge.outcome import Outcome
from edge.pipeline import Pipeline
from edge.progress import Progress, SilentProgress
from edge.records import Records
from edge.result import TrainResult, fetch_state, kept, write_model, write_trace
from edge.run_folder import RunFolder, SessionKey, open_folder
from edge.saves import Saves, about
from edge.supervisor import Supervisor
from edge.tuner import Tuner
from wire.errors import RemoteProtocolError
from wire.messages import Ready
from wire.transport import run


class Trainer:
    """One run.

    Args:
        config: what to do.
        progress: is shown what happens.
        keep_state: fetch the trained model even where no file is asked for.
        resumed: the session of a run that goes on from the checkpoints in `config.checkpoint`; None for a new run.
    """

    def __init__(
        self,
        config: TrainConfig,
        progress: Progress,
        *,
        keep_state: bool = False,
        resumed: SessionKey | None = None,
    ) -> None:
        self._config = config
        self._progress = progress
        self._keep_state = keep_state
        self._tracer = Tracer("edge", enabled=config.trace is not None)
        self._records = Records(config, progress, self._tracer)
        self._supervisor = Supervisor(
            config,
            progress,
            self._tracer,
            lost=self._lost,
            come_back=lambda wire: self._claim.come_back(self._last, wire),
            begins_anew=lambda error: self._claim.begins_anew(error),
            where=lambda: self._where,
        )
        self._claim = Claim(config, resumed)
        self.training = False
        self._stopped: TrainingStopped | UserError | None = None
        self._job: Job | None = None
        self._context: Context | None = None
        self._saves: Saves | None = None
        self._folder: RunFolder | None = None

    def stop(self) -> None:
        """Ask the run to end after the step under way."""
        self._supervisor.stop()

    @property
    def steps(self) -> int:
        """Steps made so far, by earlier processes too."""
        return self._last.step - bool(self._last.reason)  # a step that ended training was not made

    @property
    def _last(self) -> Outcome:
        return Outcome() if self._context is None else self._context.outcome

    @property
    def total_steps(self) -> int:
        """Steps that were asked for; 0 before that is known."""
        return 0 if self._job is None else self._job.total_steps

    async def run(self) -> TrainResult:
        """Train to the end, or until `stop`.

        Raises:
            UserError: something in the settings does not exist or does not fit.
            TrainingStopped: training cannot go on; the last good weights are saved where a file was asked for.
            WireError: the link failed, for good.
        """
        config = self._config
        parse_compress(config.compress)  # what is wrong with it shows before there is a server
        with ExitStack() as resources:
            if config.checkpoint is not None:
                is_new = self._claim.remembers
                self._folder = await open_folder(config, resources, self._progress.note, is_new=is_new)
            resources.callback(self._progress.finish)
            self._lanes = lanes = Lanes(self._tracer, config.threads or default_threads())
            resources.callback(lanes.close)
            stopped, state = await self._supervisor.run(lambda link: self._use(link, resources))
            summary = self._records.summary()
            if config.trace is not None:
                write_trace(self._tracer, config.trace)
                self._progress.note(f"the timeline is in {config.trace}; open it at https://ui.perfetto.dev")
        if stopped is not None:
            raise TrainingStopped(f"{stopped}; {kept(self._config, self.steps)}") from stopped
        made = {"steps": self.steps, "total_steps": self.total_steps}
        return TrainResult(**made, **self._records.scores, summary=summary, state=state)

    async def _use(
        self, link: Link, resources: ExitStack
    ) -> tuple[TrainingStopped | UserError | None, dict[str, Tensor]]:
        await self._take_up(link, resources)
        if self._stopped is None:  # else only collecting failed, and is done again
            self._stopped = await self._train_until_stopped(link)
        return self._stopped, await self._collect(link)

    # Where a connection begins and ends.

    async def _take_up(self, link: Link, resources: ExitStack) -> None:
        """Ask for the job, or for the session of before, and go to the step that both sides go on from."""
        self._records.connected(link)
        if self._context is not None and link.is_back:
            self._claim.spend()
            self._context.link, link.on_ready = link, self._came_back
            return  # at once: the server's answer changes nothing
        if self._job is None:
            self._job = await self._lanes.run(COMPUTE, "prepare", prepare, self._config)
        job = self._job
        ready = await self._claim.ask(link, job.spec, self._last, self._folder)
        if self._folder is not None and not ready.saves:
            raise UserError(
                "the server keeps no checkpoints: start cloud-server with --state-dir, or leave out --checkpoint"
            )
        if ready.need_weights:
            await link.send_weights(job.middle_state())
        if self._context is None:
            self._context = build_context(job, link, self._lanes, ready.memory_format)
            self._set_up(job, self._context, ready, resources)
        self._context.link = link
        if ready.step != self._context.outcome.step or not self._claim.remembers:
            await self._go_back(job, self._context, ready.step)
        self._supervisor.taken_up()

    def _came_back(self, ready: Ready) -> None:
        assert self._context is not None
        self._claim.came_back(ready, self._context.link)
        self._supervisor.taken_up()

    def _set_up(self, job: Job, context: Context, ready: Ready, resources: ExitStack) -> None:
        """Make what lasts from the first connection to the end of the run."""
        config = self._config
        resources.callback(context.close)
        self._pipeline = Pipeline(context, clip_norm=config.clip_norm, skip_overflow=config.amp == "fp16")
        self._feed = Feed(job, channels_last=ready.memory_format == "channels_last")
        self._tuner = Tuner(config.chunks, config.depth)
        self._evaluations = Evaluations(job, self._progress, self._supervisor)
        if self._folder is not None:
            self._folder.update_settings(config)
            self._saves = Saves(self._folder, config.checkpoint_every, about(job), self._progress.note)
        self._records.open(job, resources, append=not self._claim.remembers)
        self._progress.note(describe(job, ready))
        self._progress.start(
            total_steps=job.total_steps,
            total_epochs=None if config.steps else config.epochs,
            first_step=ready.step,
        )

    async def _go_back(self, job: Job, context: Context, step: int) -> None:
        """Go on from a checkpoint, as the server does."""
        if self._folder is None:
            raise RemoteProtocolError(f"the server goes on after step {step}; here it is step {self.steps}")
        what = f"going {'back' if self._claim.remembers else 'on'} to step {step}, the newest checkpoint"
        self._claim.remembers = False  # until all is there: if the link is lost meanwhile, this is done again
        if self._saves is not None:
            await self._saves.written()
        state, its = await self._folder.read(step)
        check_same(about(job), its, f"the checkpoint in {self._folder.path}")
        await context.restore(step, state)
        await self._folder.went_back(step)
        self._records.went_back(step)
        self._evaluations.went_back()
        self._stopped = None
        self._progress.note(f"{what} that both sides have")
        self._claim.remembers = True

    async def _lost(self, link: Link | None) -> None:
        """Come to rest between steps, after a connection has gone."""
        if link is not None:
            self._records.disconnected(link)
        if self._context is not None:
            await self._context.rest()
            self._report()
        if self._saves is not None:
            self._saves.lost()

    # What a connection is for.

    async def _train_until_stopped(self, link: Link) -> TrainingStopped | UserError | None:
        """Train; returns what ended it early: a loss that is not finite, or a sample that cannot be read."""
        try:
            await self._train(link)
        except (TrainingStopped, UserError) as stopped:
            return stopped
        return None

    async def _train(self, link: Link) -> None:
        assert self._context is not None
        context = self._context
        while True:
            outcome = context.outcome
            if outcome.reason:
                raise TrainingStopped(outcome.reason)
            last = outcome.step == self.total_steps or self._supervisor.stopping
            if self._saves is not None and self._saves.wants(outcome.step, last=last):
                await self._saves.save(context, link)
            if self._evaluations.is_due(outcome.step):
                channels_last = self._feed.channels_last
                score = await self._evaluations.run(self._pipeline, outcome.step, channels_last=channels_last)
                if score is not None:
                    self._records.evaluated(outcome.step, score)
            elif last:
                break
            else:
                await self._one_step(link, outcome.step + 1)
        await self._feed.close()

    async def _one_step(self, link: Link, step: int) -> None:
        self._records.begin(step)
        self._batch = await self._feed.batch(step)
        self.training = True
        busy = self._records.busy
        busy.begin(self._lanes, link)
        await self._pipeline.train(
            step,
            self._batch.inputs,
            self._batch.labels,
            chunks=self._config.chunks,
            depth=self._tuner.plan.depth,
            sample_ids=self._batch.sample_ids,
        )
        await self._tuner.tune(self._lanes, link, busy)
        self._report()
        busy.end(self._lanes, link)

    def _report(self) -> None:
        """Report the last step, unless it was, and whatever came of the connection meanwhile."""
        if self._last.step > self._records.reported:
            self._records.concluded(self._last, self._batch)
            self._supervisor.progressed()
            if self._job is not None:
                self._job.parts.middle.free()  # the server has its weights: it has made a step with them

    async def _collect(self, link: Link) -> dict[str, Tensor]:
        """Bring the trained model together where it is wanted, and write it where it was asked for."""
        assert self._job is not None
        assert self._context is not None
        await link.confirmed()
        if self._saves is not None:
            await self._saves.settled(link)
        # An older file is worth more than an untrained model.
        saves = self._config.save is not None and self.steps > self._records.thrown_away
        state = await fetch_state(self._job, self._context) if self._keep_state or saves else {}
        if saves:
            await self._lanes.run(COMPUTE, "save", write_model, self._job, state, self.steps, self._stopped)
            self._progress.note(f"the model is in {self._config.save}")
        return state

    @property
    def _where(self) -> str:
        if self._config.only_evaluates:
            return "in the evaluation"
        return f"after step {self.steps} of {self.total_steps}" if self.training else "before the first step"


def train(config: TrainConfig, progress: Progress | None = None) -> TrainResult:
    """Train from code as ``edge-client`` does; the result holds the trained model.

    Args:
        config: what to do.
        progress: is shown what happens; silent by default.

    Raises:
        As `Trainer.run`.
    """
    from edge.auto import train_settled  # here, for it trains to find out

    return run(train_settled(config, progress or SilentProgress()))

"""Steps and evaluations over an open job.

A step is one transaction, applied on both sides or on neither::

    begin ── chunks up and down ── commit(scale) ──> the next step's chunks follow without waiting
                                        └──> committed, looked at before the next commit

A link that breaks anywhere in it leaves the server with the step in its hands or not begun; see
`cloud.session`.
"""

import asyncio
import math

from torch import Tensor

from common.errors import TrainingStopped
from common.groups import first_error
from common.lanes import COMPUTE
from common.optim import clip_scale
from common.schedule import Schedule, edge_schedule
from edge.context import Context
from edge.evaluation_pass import EvaluationPass, FetchChunk
from edge.outcome import Outcome, Score
from edge.passes import Pass, TrainingPass
from wire.messages import Abort, Begin, Commit


class Pipeline:
    """Trains and evaluates over one link.

    Args:
        context: what every pass works with.
        clip_norm: largest global gradient norm, or None.
        skip_overflow: throw away a step whose gradients are not finite (fp16), instead of stopping.
    """

    def __init__(self, context: Context, *, clip_norm: float | None, skip_overflow: bool) -> None:
        self._context = context
        self._clip_norm = clip_norm
        self._skip_overflow = skip_overflow

    async def train(
        self,
        step: int,
        inputs: tuple[Tensor, ...],
        labels: Tensor,
        *,
        chunks: int,
        depth: int,
        sample_ids: Tensor | None = None,
    ) -> Outcome:
        """Train on one batch.

        Args:
            step: its number, higher than any before.
            inputs: what the front takes, the samples along dimension 0.
            labels: ``[B]``, int64.
            chunks: how many chunks to cut it into, as `torch.chunk` does.
            depth: the most chunks in flight.
            sample_ids: ``[B]``, int64, the same for a sample in every epoch.

        Returns:
            How it ended; it was not applied where fp16 overflowed.

        Raises:
            TrainingStopped: loss or gradients are not finite; the step is undone on both sides.
            WireError: the link failed. Whether the step was concluded before, the context's outcome says.
        """
        context = self._context
        this = TrainingPass(context, step, inputs, labels, chunks, sample_ids)
        await context.link.send(Begin(step=step, chunks=this.count, evaluate=False))
        await context.lanes.run(COMPUTE, "begin", self._begin)
        try:
            await _run(this, edge_schedule(this.count, depth))
        except TrainingStopped as stop:
            await self._drop(Outcome(step, applied=False, score=this.score, reason=str(stop)))
            raise
        norm_sq = this.middle_norm_sq + await context.lanes.run(COMPUTE, "norm", self._norm_sq)
        if not math.isfinite(norm_sq):
            reason = f"the gradients of step {step}, or running statistics, are not finite"
            going_on = self._skip_overflow
            await self._drop(
                Outcome(step, applied=False, score=this.score, reason="" if going_on else reason)
            )
            if not going_on:
                raise TrainingStopped(reason)
            return context.outcome
        scale = clip_scale(norm_sq, self._clip_norm)
        await context.link.confirmed()
        # Decided, and the server is told; if that does not reach it, it is told when the link is back.
        concluding = context.conclude(Outcome(step, applied=True, scale=scale, score=this.score))
        await context.link.commit(Commit(step=step, scale=scale))
        await asyncio.shield(concluding)
        return context.outcome

    async def evaluate(self, step: int, chunks: int, fetch: FetchChunk, *, depth: int) -> Score:
        """Run `chunks` chunks forward in evaluation mode; nothing of the model changes."""
        this = EvaluationPass(self._context, step, fetch)
        await self._context.link.send(Begin(step=step, chunks=chunks, evaluate=True))
        await _run(this, edge_schedule(chunks, depth, evaluate=True))
        return this.score

    def _begin(self) -> None:
        self._context.front.begin_step()
        self._context.back.begin_step()

    def _norm_sq(self) -> float:
        return self._context.front.grad_norm_sq() + self._context.back.grad_norm_sq()

    async def _drop(self, outcome: Outcome) -> None:
        concluding = self._context.conclude(outcome)
        reason = outcome.reason or "the gradients are not finite"
        await self._context.link.abort(Abort(step=outcome.step, reason=reason))
        await asyncio.shield(concluding)


async def _run(this: Pass, schedule: Schedule) -> None:
    try:
        await this.run(schedule)
    except BaseExceptionGroup as group:
        raise first_error(group, TrainingStopped) from None

"""Going through the test set: whatever the link does, each sample counts once."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from common.errors import UserError
from edge.data.loader import Plan, in_order
from edge.evaluation import PIECE, Evaluations
from edge.outcome import Score
from edge.progress import SilentProgress
from wire.errors import ConnectionLost

CHUNK = 4
SAMPLES = CHUNK * (2 * PIECE + 5) - 1


class Batches:
    """A test set whose labels are the samples' numbers; one of them cannot be read, if any."""

    def __init__(self, start_batch: int, unreadable: int | None) -> None:
        self._plans = in_order(SAMPLES, CHUNK, start_batch)
        self._unreadable = unreadable

    def get(self) -> Any:
        plan: Plan = next(self._plans)
        if self._unreadable in plan.ids:
            raise UserError(f"sample {self._unreadable} is damaged")
        return SimpleNamespace(inputs=(torch.zeros(len(plan.ids)),), labels=torch.from_numpy(plan.ids))

    def close(self) -> None:
        pass


class Pipeline:
    """Scores chunks; the link is lost at some of them, counted over all that are ever sent."""

    def __init__(self, *lost_at: int) -> None:
        self.sent = 0
        self._lost_at = set(lost_at)

    async def evaluate(self, step: int, chunks: int, fetch: Any, *, depth: int) -> Score:
        score = Score()
        for chunk in range(chunks):
            _, labels = await fetch(chunk)
            self.sent += 1
            if self.sent in self._lost_at:
                raise ConnectionLost("gone")
            score.add(0.5, torch.zeros(len(labels), 2), labels)
        return score


class Run:
    """A run's part in an evaluation."""

    def __init__(self, unreadable: int | None = None) -> None:
        self.unreadable = unreadable
        self.stopping = False
        self.pieces = 0
        samples = SimpleNamespace(
            test_size=SAMPLES,
            test=lambda *, batch_size, channels_last, start_batch: Batches(start_batch, self.unreadable),
            filler=lambda: (torch.zeros(1),),
        )
        job: Any = SimpleNamespace(
            config=SimpleNamespace(eval_every=5),
            steps_per_epoch=5,
            total_steps=20,
            samples=samples,
            spec=SimpleNamespace(chunk_size=CHUNK, in_flight=2),
        )
        self.evaluations = Evaluations(job, SilentProgress(), self)  # type: ignore[arg-type]

    def progressed(self) -> None:
        self.pieces += 1

    def evaluate(self, pipeline: Pipeline) -> Score | None:
        return asyncio.run(self.evaluations.run(pipeline, 5, channels_last=False))  # type: ignore[arg-type]


def test_every_sample_counts_once_however_often_the_link_is_lost() -> None:
    run, pipeline = Run(), Pipeline(1, 3, PIECE + 7, PIECE + 8, 2 * PIECE + 10)
    losses = 0
    while True:
        try:
            score = run.evaluate(pipeline)
            break
        except ConnectionLost:
            losses += 1
            assert run.evaluations.is_due(5)
    assert losses == 5
    assert score is not None
    assert torch.cat(score.labels).tolist() == list(range(SAMPLES))
    assert score.loss == pytest.approx(0.5)
    assert run.pieces == 3
    assert not run.evaluations.is_due(5)
    assert pipeline.sent < 5 * PIECE + 5  # and not from the first chunk each time


def test_run_that_goes_back_scores_anew() -> None:
    run = Run()
    with pytest.raises(ConnectionLost):
        run.evaluate(Pipeline(PIECE + 1))
    run.evaluations.went_back()
    score = run.evaluate(Pipeline())
    assert score is not None
    assert score.samples == SAMPLES


def test_unreadable_sample_ends_it_and_the_next_one_begins_at_the_first_sample() -> None:
    run, pipeline = Run(unreadable=CHUNK * PIECE + 9), Pipeline()
    with pytest.raises(UserError, match="is damaged"):
        run.evaluate(pipeline)
    assert pipeline.sent == 2 * PIECE  # the server gets all chunks that it was promised
    run.unreadable = None
    score = run.evaluate(Pipeline())
    assert score is not None
    assert score.samples == SAMPLES


def test_run_that_is_stopped_has_no_score() -> None:
    run = Run()
    run.stopping = True
    pipeline = Pipeline()
    assert run.evaluate(pipeline) is None
    assert pipeline.sent == 0

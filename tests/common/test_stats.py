"""Sums, medians and rates over any steps."""

import math
from statistics import median

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.metrics import StepReport
from common.stats import RecentStats, RunStats, busy_fraction

BYTES = st.integers(0, 10**12)
STEPS = st.lists(
    st.builds(
        StepReport,
        step=st.integers(1, 100),
        epoch=st.just(0),
        loss=st.floats(0, 100),
        step_s=st.floats(0, 1e4),
        samples=st.integers(1, 512),
        up_bytes=BYTES,
        down_bytes=BYTES,
        dense_bytes=BYTES,
        accuracy=st.none() | st.floats(0, 1),
    ),
    max_size=30,
)


def stats_of(steps):
    stats = RunStats()
    for step in steps:
        stats.add(step)
    return stats


@settings(deadline=None)
@given(steps=STEPS)
def test_a_run_is_the_sum_of_its_steps(steps):
    stats = stats_of(steps)
    assert stats.steps == len(steps)
    assert stats.samples == sum(step.samples for step in steps)
    assert stats.wall_s == math.fsum(step.step_s for step in steps)
    summary = stats.summary(reconnects=3)
    assert (summary.steps, summary.reconnects) == (len(steps), 3)
    assert summary.up_bytes == sum(step.up_bytes for step in steps)
    assert summary.down_bytes == sum(step.down_bytes for step in steps)
    dense = sum(step.dense_bytes for step in steps)
    carried = summary.up_bytes + summary.down_bytes
    assert summary.compress_rate == (carried / dense if dense else None)
    assert summary.median_step_s == (median(step.step_s for step in steps) if steps else None)


@settings(deadline=None)
@given(steps=STEPS, extra=BYTES)
def test_what_the_socket_carried_besides_the_steps_leaves_the_compress_rate_alone(steps, extra):
    stats = stats_of(steps)
    plain, whole = (
        stats.summary(),
        stats.summary(up_bytes=stats.up_bytes + extra, down_bytes=stats.down_bytes),
    )
    assert whole.up_bytes == plain.up_bytes + extra
    assert whole.compress_rate == plain.compress_rate


@settings(deadline=None)
@given(steps=STEPS, busy_s=st.none() | st.floats(-1, 1e6))
def test_busy_shares_are_of_the_training_time_and_within_it(steps, busy_s):
    stats = stats_of(steps)
    summary = stats.summary(link_busy_s=busy_s, edge_busy_s=busy_s)
    assert summary.link_busy == summary.edge_busy == busy_fraction(busy_s, stats.wall_s)
    assert summary.cloud_busy is None
    if busy_s is None or stats.wall_s == 0:
        assert summary.link_busy is None
    else:
        assert summary.link_busy == pytest.approx(min(max(busy_s / stats.wall_s, 0), 1))


@settings(deadline=None)
@given(steps=STEPS, window=st.integers(1, 10))
def test_recent_figures_are_those_of_the_last_steps_only(steps, window):
    recent, last = RecentStats(window), RecentStats(window)
    for step in steps:
        recent.add(step)
    for step in steps[-window:]:
        last.add(step)
    for name in (
        "loss",
        "accuracy",
        "samples_per_s",
        "up_bytes_per_s",
        "down_bytes_per_s",
        "compress_rate",
    ):
        assert getattr(recent, name) == getattr(last, name)
    if steps:
        losses = [step.loss for step in steps[-window:]]
        assert min(losses) - 1e-9 <= recent.loss <= max(losses) + 1e-9
    counted = [step.accuracy for step in steps[-window:] if step.accuracy is not None]
    if counted:
        assert min(counted) - 1e-9 <= recent.accuracy <= max(counted) + 1e-9
    else:
        assert recent.accuracy is None

import json
import math
import os
import resource

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import UserError
from common.metrics import EvalReport, MetricsWriter, StepReport, SummaryReport, ratio
from common.stats import RecentStats, RunStats, busy_fraction


def a_step(step=1, **changes):
    fields = {
        "step": step,
        "epoch": 0,
        "loss": 2.0,
        "step_s": 0.5,
        "samples": 64,
        "up_bytes": 300,
        "down_bytes": 100,
        "dense_bytes": 4000,
        "accuracy": 0.25,
    }
    return StepReport(**(fields | changes))


def refuse(text):
    raise AssertionError(text)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_step_line_has_the_keys_that_programs_read(tmp_path):
    with MetricsWriter(tmp_path / "m", warn=refuse) as writer:
        writer.write(a_step())
    assert lines(tmp_path / "m") == [
        {
            "event": "step",
            "step": 1,
            "epoch": 0,
            "loss": 2.0,
            "step_s": 0.5,
            "samples_per_s": 128.0,
            "up_bytes": 300,
            "down_bytes": 100,
            "dense_bytes": 4000,
            "compress_rate": 0.1,
        }
    ]


def test_eval_line_has_the_keys_that_programs_read(tmp_path):
    with MetricsWriter(tmp_path / "m", warn=refuse) as writer:
        writer.write(EvalReport(step=3, loss=0.5, accuracy=0.75))
        writer.write(EvalReport(step=3, loss=0.5, accuracy=0.75, mcc=0.5))
    plain = {"event": "eval", "step": 3, "loss": 0.5, "accuracy": 0.75}
    assert lines(tmp_path / "m") == [plain, plain | {"mcc": 0.5}]


def test_summary_line_has_the_keys_that_programs_read(tmp_path):
    stats = RunStats()
    for step, seconds in enumerate((1.0, 9.0, 2.0)):
        stats.add(a_step(step, step_s=seconds))
    with MetricsWriter(tmp_path / "m", warn=refuse) as writer:
        writer.write(stats.summary(reconnects=1, link_busy_s=6.0, edge_busy_s=3.0, cloud_busy_s=12.5))
    assert lines(tmp_path / "m") == [
        {
            "event": "summary",
            "steps": 3,
            "median_step_s": 2.0,
            "up_bytes": 900,
            "down_bytes": 300,
            "compress_rate": 0.1,
            "reconnects": 1,
            "link_busy": 0.5,
            "edge_busy": 0.25,
            "cloud_busy": 1.0,
        }
    ]


def test_summary_of_no_steps_has_no_rates():
    summary = RunStats().summary()
    assert summary == SummaryReport(
        steps=0,
        median_step_s=None,
        up_bytes=0,
        down_bytes=0,
        compress_rate=None,
        reconnects=0,
        link_busy=None,
        edge_busy=None,
        cloud_busy=None,
    )


def test_summary_takes_the_sockets_own_totals():
    stats = RunStats()
    stats.add(a_step())
    summary = stats.summary(up_bytes=5000, down_bytes=4000)
    assert (summary.up_bytes, summary.down_bytes, summary.compress_rate) == (5000, 4000, 0.1)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_json_lacks_become_null(tmp_path, value):
    with MetricsWriter(tmp_path / "m", warn=refuse) as writer:
        writer.write(a_step(loss=value))
    assert lines(tmp_path / "m")[0]["loss"] is None


@pytest.mark.parametrize("change", [{"dense_bytes": 0}, {"step_s": 0.0}])
def test_rate_of_nothing_is_null(tmp_path, change):
    with MetricsWriter(tmp_path / "m", warn=refuse) as writer:
        writer.write(a_step(**change))
    key = "compress_rate" if "dense_bytes" in change else "samples_per_s"
    assert lines(tmp_path / "m")[0][key] is None


def test_every_line_is_there_at_once(tmp_path):
    with MetricsWriter(tmp_path / "m", warn=refuse) as writer:
        for step in range(3):
            writer.write(a_step(step))
            assert len(lines(tmp_path / "m")) == step + 1


def test_file_is_begun_anew_unless_told_to_append(tmp_path):
    for append, count in ((False, 1), (True, 2), (False, 1)):
        with MetricsWriter(tmp_path / "m", warn=refuse, append=append) as writer:
            writer.write(a_step())
        assert len(lines(tmp_path / "m")) == count


@pytest.mark.parametrize("name", ["missing/m", "."])
def test_file_that_cannot_be_written_is_refused_before_training(tmp_path, name):
    with pytest.raises(UserError, match="cannot write metrics to"):
        MetricsWriter(tmp_path / name, warn=refuse)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
def test_full_disk_is_said_once_and_training_goes_on():
    said = []
    with MetricsWriter("/dev/full", warn=said.append) as writer:
        for step in range(3):
            writer.write(a_step(step))
    assert len(said) == 1
    assert "METRICS ARE BEING LOST" in said[0]
    assert "No space left" in said[0]


@pytest.mark.parametrize("append", [False, True])
def test_line_that_does_not_fit_is_taken_back_whole(tmp_path, append):
    said = []
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with MetricsWriter(tmp_path / "m", warn=said.append, append=append) as writer:
        writer.write(a_step(1))
        room = (tmp_path / "m").stat().st_size + 10
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
            writer.write(a_step(2))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        writer.write(a_step(3))
    assert [line["step"] for line in lines(tmp_path / "m")] == [1, 3]
    assert len(said) == 1


@pytest.mark.parametrize("append", [False, True])
def test_file_is_brought_back_to_a_step_and_gone_on_with(tmp_path, append):
    path = tmp_path / "m"
    with MetricsWriter(path, warn=refuse, append=append) as writer:
        for step in range(1, 5):
            writer.write(a_step(step))
            writer.write(EvalReport(step=step, loss=1.0, accuracy=0.5))
        writer.rewind(3)
        writer.write(a_step(4))
    assert [(line["event"], line["step"]) for line in lines(path)] == [
        *(("step", 1), ("eval", 1), ("step", 2), ("eval", 2)),
        *(("step", 3), ("step", 4)),
    ]
    with path.open("a") as file:
        file.write('{"event": "step", "st')  # by a process that was killed
    with MetricsWriter(path, warn=refuse, append=True) as writer:
        writer.rewind(9)
    assert len(lines(path)) == 6


def test_going_back_on_a_full_disk_takes_no_room(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with MetricsWriter(tmp_path / "m", warn=refuse) as writer:
        for step in range(1, 4):
            writer.write(a_step(step))
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (10, before[1]))
            writer.rewind(2)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [line["step"] for line in lines(tmp_path / "m")] == [1, 2]


def test_file_that_cannot_be_brought_back_is_said_and_training_goes_on(tmp_path):
    said = []
    with MetricsWriter(tmp_path / "m", warn=said.append) as writer:
        writer.write(a_step(1))
        (tmp_path / "m").unlink()
        writer.rewind(0)
        writer.write(a_step(1))
    assert len(said) == 1
    assert "METRICS AFTER STEP 0" in said[0]


def test_device_is_not_brought_back():
    with MetricsWriter("/dev/null", warn=refuse) as writer:
        writer.rewind(0)


def test_closed_file_takes_no_more(tmp_path):
    writer = MetricsWriter(tmp_path / "m", warn=refuse)
    writer.close()
    writer.close()
    with pytest.raises(ValueError, match="closed"):
        writer.write(a_step())


@given(busy=st.floats(0, 1e6), wall=st.floats(0, 1e6))
def test_busy_fraction_lies_between_nought_and_one(busy, wall):
    share = busy_fraction(busy, wall)
    assert share is None if wall == 0 else 0 <= share <= 1


def test_ratio_to_nothing_is_unknown():
    assert ratio(1, 0) is None
    assert ratio(0, 1) == 0


def test_recent_figures_weigh_steps_by_size_and_forget_old_ones():
    recent = RecentStats(window=2)
    recent.add(a_step(loss=100.0))
    recent.add(a_step(loss=1.0, samples=30, step_s=1.0, accuracy=1.0))
    recent.add(a_step(loss=3.0, samples=10, step_s=3.0, accuracy=0.0))
    assert recent.loss == 1.5
    assert recent.accuracy == 0.75
    assert recent.samples_per_s == 10
    assert recent.up_bytes_per_s == 150
    assert recent.down_bytes_per_s == 50
    assert recent.compress_rate == 0.1


def test_recent_figures_of_nothing_are_unknown():
    recent = RecentStats()
    assert recent.loss is None
    recent.add(a_step(accuracy=None))
    assert recent.accuracy is None


def test_file_that_was_moved_away_is_not_cut(tmp_path):
    path, moved = tmp_path / "metrics.jsonl", tmp_path / "metrics.jsonl.1"
    path.write_text('{"event": "step", "step": 1}\n')
    with MetricsWriter(path, warn=pytest.fail, append=True) as writer:
        path.rename(moved)
        path.touch()
        writer.rewind(1)
    assert moved.read_text() == '{"event": "step", "step": 1}\n'

import io
import os
import sys
from dataclasses import replace

import pytest
from rich.console import Console

from common.metrics import EvalReport, StepReport
from edge.progress import LiveProgress, PlainProgress, SilentProgress, open_progress


class Clock:
    def __init__(self):
        self.now_s = 100.0

    def __call__(self):
        return self.now_s


def a_step(step, **changes):
    fields = {
        "step": step,
        "epoch": (step - 1) // 10,
        "loss": 0.5,
        "step_s": 2.0,
        "samples": 64,
        "up_bytes": 6_400_000,
        "down_bytes": 1_000_000,
        "dense_bytes": 74_000_000,
        "accuracy": 0.875,
    }
    return StepReport(**(fields | changes))


AN_EVAL = EvalReport(step=10, loss=0.25, accuracy=0.9123)


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def plain(clock):
    return PlainProgress(io.StringIO(), every_s=10, clock=clock)


@pytest.fixture
def live(clock):
    console = Console(file=io.StringIO(), force_terminal=True, width=120, height=20, color_system=None)
    progress = LiveProgress(console, clock=clock)
    yield progress
    progress.finish()


def said(plain):
    return plain._stream.getvalue().splitlines()


def shown(live):
    """The two lines as they stand at the foot of the terminal."""
    page = Console(file=io.StringIO(), width=live._console.width, color_system=None)
    page.print(live._render())
    return page.file.getvalue()


def test_plain_line_tells_everything(plain, clock):
    plain.start(total_steps=30, total_epochs=3)
    clock.now_s += 2
    plain.step(a_step(1))
    assert said(plain) == [
        "epoch 1/3, step 1/30: loss 0.500, accuracy 87.50 %, 32.0 samples/s, up 3.20 MB/s, down 0.500 MB/s, "
        "compress rate 0.100, time left 0:58"
    ]


def test_plain_lines_come_every_few_seconds_and_at_the_end(plain, clock):
    plain.start(total_steps=12)
    for step in range(1, 13):
        clock.now_s += 2
        plain.step(a_step(step))
    assert [line.split(":")[0] for line in said(plain)] == [
        "epoch 1, step 1/12",
        "epoch 1, step 6/12",
        "epoch 2, step 11/12",
        "epoch 2, step 12/12",
    ]


def test_plain_lines_tell_every_evaluation_and_note(plain):
    plain.start(total_steps=30)
    plain.note("connected to host:1 [cpu]")
    plain.evaluated(AN_EVAL)
    plain.evaluated(EvalReport(step=11, loss=0.25, accuracy=0.5, mcc=0.125))
    assert said(plain) == [
        "connected to host:1 [cpu]",
        "test after step 10: accuracy 91.23 %, loss 0.250",
        "test after step 11: accuracy 50.00 %, loss 0.250, Matthews correlation 0.125",
    ]


def test_plain_lines_show_that_a_long_evaluation_goes_on(plain, clock):
    plain.start(total_steps=30)
    for done in range(1, 13):
        clock.now_s += 1
        plain.evaluating(done, 12)
    assert said(plain) == ["evaluating: batch 1/12", "evaluating: batch 11/12"]


def test_time_left_counts_from_where_a_resumed_run_began(plain, clock):
    plain.start(total_steps=100, first_step=90)
    clock.now_s += 360
    plain.step(a_step(91))
    assert said(plain)[0].endswith("time left 54:00")
    clock.now_s += 360 * 30
    plain.step(a_step(92))
    assert said(plain)[1].endswith("time left 12:24:00")


def test_figures_that_are_not_known_are_left_out(plain):
    plain.start(total_steps=5)
    plain.step(a_step(1, accuracy=None, dense_bytes=0))
    assert "accuracy" not in said(plain)[0]
    assert "compress rate" not in said(plain)[0]


@pytest.mark.parametrize(
    ("loss", "text"),
    [
        (0.0, "0"),
        (1.0, "1.00"),
        (99.99, "100"),
        (1234.5, "1,234"),
        (1.234e-5, "1.23e-05"),
        (float("nan"), "nan"),
    ],
)
def test_loss_is_written_in_three_digits(plain, loss, text):
    plain.start(total_steps=5)
    plain.step(a_step(1, loss=loss))
    assert f"loss {text}," in said(plain)[0]


def test_live_display_tells_everything(live, clock):
    live.start(total_steps=30, total_epochs=3)
    clock.now_s += 20
    live.step(a_step(10))
    live.evaluated(AN_EVAL)
    place, figures = shown(live).splitlines()
    assert place.startswith("epoch 1/3, step 10/30")
    assert place.rstrip().endswith("33%  0:40 left")
    assert figures.rstrip() == (
        "loss 0.500   accuracy 87.50 %   test 91.23 %   32.0 samples/s   "
        "up 3.20 MB/s   down 0.500 MB/s   compress rate 0.100"
    )


def test_live_display_shows_how_far_an_evaluation_is(live):
    live.start(total_steps=30, total_epochs=3)
    live.step(a_step(10))
    live.evaluating(3, 12)
    assert shown(live).startswith("epoch 1/3, evaluating: batch 3/12")
    live.evaluated(AN_EVAL)
    assert shown(live).startswith("epoch 1/3, step 10/30")


def test_live_display_of_an_evaluation_alone_speaks_of_no_training(live):
    live.start(total_steps=0)
    assert shown(live).strip() == ""
    live.evaluating(3, 12)
    assert shown(live).startswith("evaluating: batch 3/12")
    live.evaluated(replace(AN_EVAL, step=0))
    assert shown(live).strip() == ""
    live.finish()
    assert "step" not in live._console.file.getvalue()
    assert "test: accuracy 91.23 %" in live._console.file.getvalue()


def test_figures_stay_whole_on_a_narrow_terminal(live):
    live._console.width = 50
    live.start(total_steps=30)
    live.step(a_step(10))
    assert "compress rate 0.100" in shown(live)
    assert max(map(len, shown(live).splitlines())) <= 50


def test_live_display_is_not_redrawn_for_every_one_of_many_steps(live, clock):
    live.start(total_steps=1000)
    live.step(a_step(1))
    size = len(live._console.file.getvalue())
    for step in range(2, 1000):
        live.step(a_step(step))
    assert len(live._console.file.getvalue()) == size
    clock.now_s += 1
    live.step(a_step(1000))
    assert "step 1000/1000" in live._console.file.getvalue()[size:]


def test_what_others_print_goes_above_the_live_display(live):
    live.start(total_steps=30)
    sys.stdout.write("a stray line\n")
    sys.stderr.write("another\n")
    live.note("a [note] with brackets")
    live.finish()
    written = live._console.file.getvalue()
    for text in ("a stray line\n", "another\n", "a [note] with brackets\n"):
        assert text in written.replace("\r\n", "\n")
    assert sys.stdout is not None
    assert not isinstance(sys.stdout, io.StringIO)


def test_live_display_shows_the_last_step_when_it_ends_and_gives_the_cursor_back(live):
    live.start(total_steps=30)
    live.step(a_step(1))
    live.step(a_step(2))
    live.finish()
    live.finish()
    written = live._console.file.getvalue()
    assert "step 2/30" in written
    assert written.rstrip().endswith("\x1b[?25h")


def test_finish_without_a_start_is_harmless(live, plain):
    for progress in (live, plain, SilentProgress()):
        progress.finish()


def test_terminal_gets_the_live_display_and_a_file_plain_lines(tmp_path, monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    controller, terminal = os.openpty()
    try:
        with open(terminal, "w", closefd=False) as stream:
            assert isinstance(open_progress(stream), LiveProgress)
            monkeypatch.setenv("TERM", "dumb")
            assert isinstance(open_progress(stream), PlainProgress)
        with open(tmp_path / "log", "w") as stream:
            assert isinstance(open_progress(stream), PlainProgress)
    finally:
        os.close(controller)
        os.close(terminal)

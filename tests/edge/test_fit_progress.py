"""What a calibration shows: lines in a log, a bar on a terminal."""

import io

from rich.console import Console

from edge.fit_progress import FitBar, FitLines, open_fit_progress


class Clock:
    now_s = 0.0

    def __call__(self):
        return self.now_s


def test_a_log_has_the_end_of_each_part_and_a_line_every_few_seconds():
    clock, stream = Clock(), io.StringIO()
    with FitLines(stream, every_s=10, clock=clock) as progress:
        for step in range(1, 11):
            clock.now_s += 3
            progress.at("fitting cut1, step", step, 10, "relative error 0.5000")
        progress.at("recording cut 2, batch", 1, 1)
        progress.note("done")
    assert stream.getvalue().splitlines() == [
        *(f"fitting cut1, step {step}/10: relative error 0.5000" for step in (1, 5, 9, 10)),
        "recording cut 2, batch 1/1",
        "done",
    ]


def test_a_terminal_has_a_bar_that_is_gone_in_the_end():
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=100, height=20, color_system=None)
    with FitBar(console) as progress:
        progress.at("recording cut 1, batch", 2, 4)
        progress.at("fitting cut1, step", 3, 10, "relative error 0.1234")
        progress.note("something to keep")
        progress._progress.refresh()
    shown = stream.getvalue()
    assert "fitting cut1, step 3/10" in shown
    assert "relative error 0.1234" in shown
    assert "something to keep" in shown
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")


def test_what_is_no_terminal_gets_lines():
    assert isinstance(open_fit_progress(io.StringIO()), FitLines)

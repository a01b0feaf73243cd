"""What people see while training runs: a live display on a terminal, plain lines elsewhere."""

import time
from collections.abc import Callable
from typing import Protocol, TextIO, TypeAlias

from rich.columns import Columns
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from common.metrics import EvalReport, StepReport
from common.stats import RecentStats

Clock: TypeAlias = Callable[[], float]

_UNKNOWN = "-"


class Progress(Protocol):
    """Told what happens in a run, shows it. Called from one thread, `note` from any."""

    def start(self, *, total_steps: int, total_epochs: int | None = None, first_step: int = 0) -> None:
        """Training begins.

        Args:
            total_steps: the last step's number.
            total_epochs: number of epochs, where the run is measured in them.
            first_step: steps made by an earlier run that this one goes on from.
        """
        ...

    def step(self, report: StepReport) -> None:
        """A step is done."""
        ...

    def evaluating(self, done: int, total: int) -> None:
        """So many of the test set's batches have been gone through. May be left out."""
        ...

    def evaluated(self, report: EvalReport) -> None:
        """The test set has been gone through."""
        ...

    def note(self, text: str) -> None:
        """Say one line that is no step: a reconnect, a warning, a file saved."""
        ...

    def finish(self) -> None:
        """The run is over, well or not: leave the terminal as it was. Harmless when repeated."""
        ...


def open_progress(stream: TextIO, *, every_s: float = 10.0) -> Progress:
    """Choose the display that suits a stream.

    Args:
        stream: where to show it, such as ``sys.stdout``.
        every_s: seconds between lines where the stream is no terminal.
    """
    if stream.isatty():
        console = Console(file=stream)
        if not console.is_dumb_terminal:
            return LiveProgress(console)
    return PlainProgress(stream, every_s=every_s)


class SilentProgress:
    """Shows nothing."""

    def start(self, *, total_steps: int, total_epochs: int | None = None, first_step: int = 0) -> None:
        """See `Progress`."""

    def step(self, report: StepReport) -> None:
        """See `Progress`."""

    def evaluating(self, done: int, total: int) -> None:
        """See `Progress`."""

    def evaluated(self, report: EvalReport) -> None:
        """See `Progress`."""

    def note(self, text: str) -> None:
        """See `Progress`."""

    def finish(self) -> None:
        """See `Progress`."""


class PlainProgress:
    """Lines for a log: one for the first step and the last, one every few seconds, one an evaluation.

    Args:
        stream: where they go.
        every_s: seconds between lines.
        clock: seconds that only grow.
    """

    def __init__(self, stream: TextIO, *, every_s: float = 10.0, clock: Clock = time.monotonic) -> None:
        self._stream = stream
        self._every_s = every_s
        self._clock = clock
        self._course = _Course(clock)
        self._due = -float("inf")

    def start(self, *, total_steps: int, total_epochs: int | None = None, first_step: int = 0) -> None:
        """See `Progress`."""
        self._course = _Course(self._clock, total_steps, total_epochs, first_step)

    def step(self, report: StepReport) -> None:
        """See `Progress`."""
        course = self._course
        course.add(report)
        if self._is_due() or course.step == course.total_steps:
            figures = ", ".join(" ".join(filter(None, words)) for words in course.figures())
            where = f"{course.epoch_text}, step {course.step}/{course.total_steps}"
            self.note(f"{where}: {figures}, time left {course.left_text}")

    def evaluating(self, done: int, total: int) -> None:
        """See `Progress`."""
        if done < total and self._is_due():
            self.note(f"evaluating: batch {done}/{total}")

    def evaluated(self, report: EvalReport) -> None:
        """See `Progress`."""
        self.note(eval_text(report))

    def note(self, text: str) -> None:
        """See `Progress`."""
        self._stream.write(f"{text}\n")
        self._stream.flush()

    def finish(self) -> None:
        """See `Progress`."""

    def _is_due(self) -> bool:
        now = self._clock()
        if now < self._due:
            return False
        self._due = now + self._every_s
        return True


class LiveProgress:
    """Two lines at the foot of a terminal that keep up to date; everything else scrolls by above them.

    Args:
        console: the terminal. While it runs, what is printed to standard output and error goes above, too.
        clock: seconds that only grow.
    """

    _REDRAW_S = 0.1  # redrawing costs a millisecond of Python, and no one reads faster

    def __init__(self, console: Console, *, clock: Clock = time.monotonic) -> None:
        self._console = console
        self._clock = clock
        self._course = _Course(clock)
        self._evaluating: tuple[int, int] | None = None
        self._due = -float("inf")
        self._live = Live(console=console, auto_refresh=False, get_renderable=self._render)

    def start(self, *, total_steps: int, total_epochs: int | None = None, first_step: int = 0) -> None:
        """See `Progress`."""
        self._course = _Course(self._clock, total_steps, total_epochs, first_step)
        self._live.start(refresh=True)

    def step(self, report: StepReport) -> None:
        """See `Progress`."""
        self._evaluating = None
        self._course.add(report)
        self._redraw()

    def evaluating(self, done: int, total: int) -> None:
        """See `Progress`."""
        self._evaluating = (done, total)
        self._redraw()

    def evaluated(self, report: EvalReport) -> None:
        """See `Progress`."""
        self._evaluating = None
        self._course.tested = report
        self.note(eval_text(report))

    def note(self, text: str) -> None:
        """See `Progress`."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def finish(self) -> None:
        """See `Progress`."""
        if self._live.is_started:
            self._live.refresh()
            self._live.stop()

    def _redraw(self) -> None:
        now = self._clock()
        if now >= self._due:
            self._due = now + self._REDRAW_S
            self._live.refresh()

    def _render(self) -> Group:
        course = self._course
        if self._evaluating is None and not course.total_steps:
            return Group()  # an evaluation alone, which begins or is over
        place = Table.grid(padding=(0, 2, 0, 0), expand=True)
        place.add_column(no_wrap=True)
        place.add_column(ratio=1)
        place.add_column(no_wrap=True)
        place.add_column(no_wrap=True)
        if self._evaluating is None:
            done, total, what = course.step, course.total_steps, f"{course.epoch_text}, step"
        else:
            training = f"{course.epoch_text}, " if course.total_steps else ""
            (done, total), what = self._evaluating, f"{training}evaluating: batch"
        bar = ProgressBar(total=max(total, 1), completed=done)
        place.add_row(
            f"{what} {done}/{total}", bar, f"{done / max(total, 1):.0%}", f"{course.left_text} left"
        )
        # Columns keep each figure in one piece where a narrow terminal wraps the line.
        figures = Columns(padding=(0, 3, 0, 0))
        for before, value, after in course.figures():
            words = [(before, "dim"), (value, "bold"), (after, "dim")]
            figures.add_renderable(Text(" ").join(Text(*word) for word in words if word[0]))
        return Group(place, figures)


class _Course:
    """How far a run has come, and how long the rest will take."""

    def __init__(
        self, clock: Clock, total_steps: int = 0, total_epochs: int | None = None, first_step: int = 0
    ) -> None:
        self.total_steps = total_steps
        self.step = first_step
        self.tested: EvalReport | None = None
        self._total_epochs = total_epochs
        self._first_step = first_step
        self._epoch = 0
        self._recent = RecentStats()
        self._clock = clock
        self._began = clock()

    def add(self, report: StepReport) -> None:
        self._recent.add(report)
        self.step, self._epoch = report.step, report.epoch

    @property
    def epoch_text(self) -> str:
        of = "" if self._total_epochs is None else f"/{self._total_epochs}"
        return f"epoch {self._epoch + 1}{of}"

    @property
    def left_text(self) -> str:
        done = self.step - self._first_step
        if done <= 0:
            return "-:--"
        # By the wall clock, so that evaluations and stalls count.
        return _duration((self._clock() - self._began) / done * max(self.total_steps - self.step, 0))

    def figures(self) -> list[tuple[str, str, str]]:
        """Words before, value and words after of every figure; smoothed over the last steps."""
        recent = self._recent
        figures = [
            ("loss", _number(recent.loss), ""),
            ("accuracy", _percent(recent.accuracy), ""),
            ("test", _percent(None if self.tested is None else self.tested.accuracy), ""),
            ("", _number(recent.samples_per_s), "samples/s"),
            ("up", _number(recent.up_bytes_per_s, 1e6), "MB/s"),
            ("down", _number(recent.down_bytes_per_s, 1e6), "MB/s"),
            ("compress rate", _number(recent.compress_rate), ""),
        ]
        return [figure for figure in figures if figure[1] != _UNKNOWN]


def eval_text(report: EvalReport) -> str:
    """Put an evaluation into words."""
    mcc = "" if report.mcc is None else f", Matthews correlation {report.mcc:.3f}"
    figures = f"accuracy {_percent(report.accuracy)}, loss {_number(report.loss)}{mcc}"
    return f"test{f' after step {report.step}' if report.step else ''}: {figures}"


def _number(value: float | None, unit: float = 1.0) -> str:
    """Write three digits, without an exponent where that can be helped."""
    if value is None:
        return _UNKNOWN
    scaled = value / unit
    if scaled == 0:
        return "0"
    return f"{scaled:,.0f}" if 99.95 <= abs(scaled) < 1e9 else f"{scaled:#.3g}"


def _percent(share: float | None) -> str:
    return _UNKNOWN if share is None else f"{100 * share:.2f} %"


def _duration(seconds: float) -> str:
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}" if hours else f"{m}:{s:02}"

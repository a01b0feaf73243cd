"""What people see while a bottleneck is calibrated: a bar on a terminal, plain lines elsewhere."""

import time
from collections.abc import Callable
from types import TracebackType
from typing import Protocol, Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn


class FitProgress(Protocol):
    """Told how far a calibration has come, shows it."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def at(self, what: str, done: int, total: int, detail: str = "") -> None:
        """So much of one part of the work is done.

        Args:
            what: the part; another one begins where it changes.
            done: of `total`.
            total: what there is to do.
            detail: a figure to show beside it.
        """
        ...

    def note(self, text: str) -> None:
        """Say one line that stays."""
        ...


class FitLines:
    """Lines for a log: one for the end of each part, and one every few seconds.

    Args:
        stream: where they go.
        every_s: seconds between lines.
        clock: seconds that only grow.
    """

    def __init__(
        self, stream: TextIO, *, every_s: float = 10.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._stream = stream
        self._every_s = every_s
        self._clock = clock
        self._due = -float("inf")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def at(self, what: str, done: int, total: int, detail: str = "") -> None:
        """See `FitProgress`."""
        now = self._clock()
        if done == total or now >= self._due:
            self._due = now + self._every_s
            self.note(f"{what} {done}/{total}{detail and f': {detail}'}")

    def note(self, text: str) -> None:
        """See `FitProgress`."""
        self._stream.write(f"{text}\n")
        self._stream.flush()


class FitBar:
    """One line at the foot of a terminal that keeps up to date; everything else scrolls by above it.

    Args:
        console: the terminal.
    """

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            TextColumn("{task.description} {task.completed}/{task.total}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[detail]}"),
            TimeRemainingColumn(),
            console=console,
            expand=True,
        )
        self._task: TaskID | None = None
        self._what = ""

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._task is not None:
            self._progress.remove_task(self._task)
        self._progress.stop()

    def at(self, what: str, done: int, total: int, detail: str = "") -> None:
        """See `FitProgress`."""
        if self._task is None or what != self._what:
            if self._task is not None:
                self._progress.remove_task(self._task)
            self._task, self._what = self._progress.add_task(what, total=total, detail=""), what
        self._progress.update(self._task, completed=done, detail=detail)

    def note(self, text: str) -> None:
        """See `FitProgress`."""
        self._progress.console.print(text, markup=False, highlight=False, soft_wrap=True)


def open_fit_progress(stream: TextIO) -> FitProgress:
    """Choose the display that suits a stream, such as ``sys.stdout``."""
    if stream.isatty():
        console = Console(file=stream)
        if not console.is_dumb_terminal:
            return FitBar(console)
    return FitLines(stream)

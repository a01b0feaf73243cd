"""A command on a terminal of its own, as a person sees it."""

import fcntl
import multiprocessing
import os
import pty
import select
import struct
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager

from tests.system.processes import PATIENCE_S

_FORKING = multiprocessing.get_context("forkserver")  # the one of tests.system.processes
_ROWS, _COLUMNS = 24, 100


class Terminal:
    """``edge-client`` under way on a pseudo-terminal.

    Args:
        arguments: of the command line.
    """

    def __init__(self, arguments: tuple[str, ...]) -> None:
        self._screen, line = pty.openpty()
        fcntl.ioctl(line, termios.TIOCSWINSZ, struct.pack("HHHH", _ROWS, _COLUMNS, 0, 0))
        self._text = b""
        self._process = _FORKING.Process(target=_main, args=(os.ttyname(line), arguments, os.getcwd()))
        self._process.start()
        self._line = line  # kept open, so that what was said can still be read after the end

    def until_the_end(self) -> tuple[int, str]:
        """Wait for the end; returns the exit status and everything that was shown."""
        deadline = time.monotonic() + PATIENCE_S
        while self._process.is_alive() and time.monotonic() < deadline:
            self._read(0.05)
        self._process.join(0)
        while self._read(0.0):
            pass
        assert self._process.exitcode is not None, f"it hung; it had shown {self._text!r}"
        return self._process.exitcode, self._text.decode()

    def _read(self, timeout_s: float) -> bool:
        readable, _, _ = select.select([self._screen], [], [], timeout_s)
        if readable:
            self._text += os.read(self._screen, 1 << 16)
        return bool(readable)

    def close(self) -> None:
        """End it if it still runs."""
        if self._process.is_alive():
            self._process.kill()
        self._process.join()
        self._process.close()
        os.close(self._screen)
        os.close(self._line)


@contextmanager
def on_terminal(*arguments: object) -> Iterator[Terminal]:
    """Run ``edge-client`` on a terminal while the block lasts."""
    terminal = Terminal(tuple(map(str, arguments)))
    try:
        yield terminal
    finally:
        terminal.close()


def _main(terminal: str, arguments: tuple[str, ...], folder: str) -> None:
    line = os.open(terminal, os.O_WRONLY | os.O_NOCTTY)
    for number in (1, 2):
        os.dup2(line, number)
    sys.stdout = os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    sys.argv = ["edge-client", *arguments]
    os.environ.update(TERM="xterm", COLUMNS=str(_COLUMNS))
    os.chdir(folder)
    from edge.cli import main

    main()

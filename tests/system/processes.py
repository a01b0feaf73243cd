"""The console scripts as real processes, with output and exit status; forked, so that torch is loaded once."""

import json
import multiprocessing
import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

PATIENCE_S = 60  # for whatever must end by itself; a busy machine is slow, a hang is for ever

TINY = (
    *("--import", "dropout_model", "--model", "dropout_net", "--cut", "stem", "--cut", "blocks"),
    *("--image-size", "16", "--batch-size", "8", "--chunks", "2", "--threads", "1", "--eval-every", "0"),
    *("--train-limit", "64", "--test-limit", "8"),
    # Measured anew, the faster one may be another the next time, and results then differ in rounding.
    *("--memory-format", "contiguous"),
)
"""A job that takes milliseconds a step."""

_FORKING = multiprocessing.get_context("forkserver")
_FORKING.set_forkserver_preload(["tests.system.preloaded"])


@dataclass(frozen=True)
class Ended:
    """A process that has ended; `status` is negative for the signal that killed it."""

    status: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line on standard error that a failed command leaves."""
        assert self.err.startswith("error: "), self.err
        assert self.err.endswith("\n"), self.err
        assert self.err.count("\n") == 1, self.err
        return self.err.removeprefix("error: ").rstrip("\n")


class Command:
    """A console script under way.

    Args:
        script: ``edge-client`` or ``cloud-server``.
        arguments: of the command line.
        folder: for what it writes on its outputs.
    """

    def __init__(self, script: str, arguments: tuple[str, ...], folder: Path) -> None:
        self._out, self._err = folder / "out", folder / "err"
        for path in (self._out, self._err):
            path.touch()
        self._process = _FORKING.Process(
            target=_main, args=(script, arguments, str(self._out), str(self._err), os.getcwd())
        )
        self._process.start()

    @property
    def out(self) -> str:
        """Standard output so far."""
        return self._out.read_text()

    @property
    def err(self) -> str:
        """Standard error so far."""
        return self._err.read_text()

    @property
    def pid(self) -> int:
        """The process's number."""
        assert self._process.pid is not None
        return self._process.pid

    def rss_bytes(self) -> int:
        """Memory resident now."""
        pages = Path(f"/proc/{self.pid}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def until(self, pattern: str) -> re.Match[str]:
        """Wait for a line of output that matches."""
        deadline = time.monotonic() + PATIENCE_S
        while (match := re.search(pattern, self.out, re.MULTILINE)) is None:
            assert self._process.is_alive(), f"it ended without {pattern!r}: {self.out}{self.err}"
            assert time.monotonic() < deadline, f"no {pattern!r} in {self.out!r}; {self.err!r}"
            self._process.join(0.02)
        return match

    @property
    def alive(self) -> bool:
        """Whether it still runs."""
        return self._process.is_alive()

    def wait(self, within_s: float = PATIENCE_S) -> Ended:
        """Wait for the end."""
        self._process.join(within_s)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
            raise AssertionError(f"it hung; it had said {self.out!r} and {self.err!r}")
        assert self._process.exitcode is not None
        return Ended(self._process.exitcode, self.out, self.err)

    def kill(self) -> None:
        """End it if it still runs."""
        if self._process.is_alive():
            self._process.kill()
        self._process.join()
        self._process.close()


@contextmanager
def running(script: str, *arguments: object) -> Iterator[Command]:
    """Run a console script while the block lasts; it is killed then if it has not ended."""
    with TemporaryDirectory() as folder:
        command = Command(script, tuple(map(str, arguments)), Path(folder))
        try:
            yield command
        finally:
            command.kill()


def run(script: str, *arguments: object) -> Ended:
    """Run a console script to its end."""
    with running(script, *arguments) as command:
        return command.wait()


def train(address: str, *arguments: object) -> Ended:
    """Train the tiny model; later options win over its own."""
    return run("edge-client", "--server", address, *TINY, *arguments)


def events(metrics: Path) -> list[dict[str, Any]]:
    """Return the lines of a metrics file."""
    return [json.loads(line) for line in metrics.read_text().splitlines()]


def assert_serves(address: str) -> None:
    """A server trains the next client's model."""
    ended = train(address, "--steps", 2)
    assert (ended.status, ended.err) == (0, ""), ended
    assert "done: 2 steps" in ended.out


@contextmanager
def serving(*arguments: object) -> Iterator[tuple[Command, str]]:
    """Run a server of one's own; gives it and its address."""
    with running("cloud-server", "--cpu", "--threads", 1, "--port", 0, *arguments) as server:
        yield server, server.until(r"^listening on (\S+)$")[1]


def _main(script: str, arguments: tuple[str, ...], out: str, err: str, folder: str) -> None:
    for path, number in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), number)
    sys.stdout = os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    sys.argv = [script, *arguments]
    os.chdir(folder)
    if script == "edge-client":
        from edge.cli import main
    else:
        from cloud.cli import main
    main()

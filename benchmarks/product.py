"""Runs the two commands against each other, over a shaped link or loopback, as a user would."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.links import Link, Shape, end

SCRIPTS = Path(sys.executable).parent


class RunFailed(Exception):
    """One of the two commands failed; what it wrote on standard error is the message."""


@dataclass(frozen=True)
class ProductRun:
    """What a finished run's metrics file says.

    Attributes:
        steps: the ``step`` events, in order.
        summary: the ``summary`` event.
    """

    steps: list[dict[str, Any]]
    summary: dict[str, Any]

    def median_step_s(self, warm_up: int) -> float:
        """Median seconds of the steps after the first few."""
        return float(statistics.median(step["step_s"] for step in self.steps[warm_up:]))

    def median_bytes(self, key: str) -> int:
        """Median over all steps of ``up_bytes`` or ``down_bytes``."""
        return int(statistics.median(step[key] for step in self.steps))


def loopback() -> Link:
    """The link between two processes of one host, unshaped."""
    return Link(Shape(float("inf")), "loopback", "", "127.0.0.1")


def clean_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """This environment without what tunes malloc or threads: the commands have to do that by themselves."""
    tuned = ("MALLOC_", "OMP_", "GOMP_", "MKL_", "LD_PRELOAD")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(tuned)}
    return kept | {"PYTHONUNBUFFERED": "1"} | dict(extra or {})


def run_product(
    link: Link,
    options: Sequence[str],
    *,
    timeout_s: float,
    watch: Callable[[str, int], None] | None = None,
    watch_every_s: float = 0.1,
) -> ProductRun:
    """Start ``cloud-server --cpu`` and let ``edge-client`` train with these options.

    Args:
        link: between the two.
        options: for edge-client, apart from ``--server`` and ``--metrics``.
        timeout_s: most seconds that the client may take.
        watch: called with ``edge`` or ``cloud`` and its process id again and again while it runs.
        watch_every_s: seconds between two calls.

    Raises:
        RunFailed: if either command fails or takes longer.
    """
    with tempfile.TemporaryDirectory() as name, open(Path(name, "server.log"), "w+") as server_log:
        metrics = Path(name, "metrics.jsonl")
        environment = clean_environment()
        serve = [str(SCRIPTS / "cloud-server"), "--cpu", "--host", link.server_host, "--port", "0"]
        serve.append("--insecure")  # the two network namespaces hold nobody else
        server = link.run_server(serve, stderr=server_log, env=environment)
        try:
            assert server.stdout is not None
            listening = server.stdout.readline().strip()
            if not listening.startswith("listening on "):
                server_log.seek(0)
                raise RunFailed(f"cloud-server did not start: {server_log.read()}")
            host, port = link.route(int(listening.rpartition(":")[2]))
            train = [str(SCRIPTS / "edge-client"), "--server", f"{host}:{port}", "--metrics", str(metrics)]
            client = link.run_client([*train, *options], stderr=subprocess.PIPE, env=environment)
            finished = threading.Event()
            watcher = threading.Thread(
                target=_watch, args=(watch, watch_every_s, {"edge": client, "cloud": server}, finished)
            )
            watcher.start()
            try:
                output, errors = client.communicate(timeout=timeout_s)
            except subprocess.TimeoutExpired as late:
                raise RunFailed(f"edge-client {' '.join(options)}: not done in {timeout_s:.0f} s") from late
            finally:
                finished.set()
                watcher.join()
                end(client)
            if client.returncode != 0:
                server_log.seek(0)
                raise RunFailed(f"edge-client {' '.join(options)}:\n{output}{errors}{server_log.read()}")
        finally:
            end(server)
        events = [json.loads(line) for line in metrics.read_text().splitlines()]
    steps = [event for event in events if event["event"] == "step"]
    return ProductRun(steps, next(event for event in events if event["event"] == "summary"))


def _watch(
    watch: Callable[[str, int], None] | None,
    every_s: float,
    processes: Mapping[str, subprocess.Popen[str]],
    finished: threading.Event,
) -> None:
    while watch is not None and not finished.wait(every_s):
        for side, process in processes.items():
            if process.poll() is None:
                watch(side, process.pid)


def run_json(argv: Sequence[str], environment: Mapping[str, str]) -> dict[str, Any]:
    """Run one of the benchmarks' own modules in a process of its own; the JSON it prints last."""
    done = subprocess.run(
        [sys.executable, "-m", *argv], env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def machine() -> str:
    """The processor's model, cores, memory and kernel, in one line."""
    model = "unknown processor"
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    cores = len(os.sched_getaffinity(0))
    return f"{model}, {cores} cores, {memory:.0f} GiB, {os.uname().sysname} {os.uname().release}"


def today() -> str:
    """The date, as results carry it."""
    return time.strftime("%Y-%m-%d")

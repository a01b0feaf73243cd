"""Many clients at once on one server, some of them hostile, against quiet runs of the same seeds."""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.fault_runs import (
    IMPORTS,
    PATIENCE_S,
    Job,
    Memory,
    Quiet,
    problems_of,
    quiet_run,
    train_to_end,
)
from benchmarks.intruder import Intruder, Refused, record
from benchmarks.mutations import RealFrame
from tests.system.processes import serving

Hostile = Callable[[str, Sequence[RealFrame], random.Random, threading.Event], None]


@dataclass
class Crowd:
    """What came of it.

    Attributes:
        finished: honest trainings that came to the quiet run's weights.
        attacks: connections of each hostile client.
        problems: what went wrong.
        before_bytes: the server's resident memory before, after one training.
        most_bytes: the most at any time.
        after_bytes: once all had gone.
    """

    finished: int = 0
    attacks: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    before_bytes: int = 0
    most_bytes: int = 0
    after_bytes: int = 0


def read_slowly(
    address: str, frames: Sequence[RealFrame], draw: random.Random, stop: threading.Event
) -> None:
    """Send evaluations without end and take a byte of the answers now and then."""
    with Intruder(address, frames, draw) as one:
        one.greet()
        one.open()
        forward = next(frame for frame in frames if frame.kind == "forward")
        begin = RealFrame({"kind": "begin", "step": 0, "chunks": 1 << 20, "evaluate": True}, b"")
        one.socket.sendall(begin.encode())
        one.socket.settimeout(0.1)
        for chunk in range(1 << 20):
            header = {**forward.header, "step": 0, "chunk": chunk, "evaluate": True}
            unsent = memoryview(forward._replace(header=header).encode())
            while unsent and not stop.is_set():
                with contextlib.suppress(TimeoutError):
                    unsent = unsent[one.socket.send(unsent) :]
                if draw.random() < 0.01:
                    one.socket.recv(1)
            if stop.is_set():
                return


def write_slowly(
    address: str, frames: Sequence[RealFrame], draw: random.Random, stop: threading.Event
) -> None:
    """A byte at a time, of a greeting or of a step."""
    with Intruder(address, frames, draw) as one:
        if draw.random() < 0.5:
            one.greet()
            one.open()
            data = b"".join(frame.encode() for frame in frames[2:])
        else:
            data = frames[0].encode()
        for byte in data:
            one.socket.sendall(bytes([byte]))
            if stop.wait(draw.uniform(0.05, 0.5)):
                return


def flood(address: str, frames: Sequence[RealFrame], draw: random.Random, stop: threading.Event) -> None:
    """Pings, as many as go, with no answer read; or as many as go of connections."""
    if draw.random() < 0.3:
        for _ in range(200):
            with contextlib.suppress(OSError), Intruder(address, frames, draw):
                pass
        return
    with Intruder(address, frames, draw) as one:
        one.greet()
        ping = RealFrame({"kind": "ping", "t_ns": 1}, b"").encode() * 500
        while not stop.is_set():
            one.socket.sendall(ping)


def close_early(
    address: str, frames: Sequence[RealFrame], draw: random.Random, stop: threading.Event
) -> None:
    """Go away at any point of a session."""
    with Intruder(address, frames, draw) as one:
        place = draw.randrange(-2, min(20, len(frames) - 2))
        if place > -2:
            one.greet()
        if place > -1:
            one.open()
            one.play(frames[2 : 2 + place])


HOSTILE: tuple[Hostile, ...] = (read_slowly, write_slowly, flood, close_early)


def crowd(job: Job, *, clients: int, minutes: float, steps: int, seed: int, seeds: int = 4) -> Crowd:
    """Let honest clients train one job after another until the time is over, beside the hostile ones.

    Args:
        job: what to train.
        clients: at once, the hostile ones among them.
        minutes: no honest training begins later.
        steps: of one training.
        seed: of the hostile ones' randomness.
        seeds: different trainings.
    """
    result, lock, stop = Crowd(), threading.Lock(), threading.Event()
    options = (*IMPORTS, "--max-sessions", clients + 8, "--park-after", 5, "--forget-after", 60)
    with TemporaryDirectory() as name, serving(*options) as (server, address):
        quiet = {number: quiet_run(address, job, steps, number) for number in range(seeds)}
        frames = record(address, lambda through: train_to_end(through, job, 4, 0))
        until = time.monotonic() + 60 * minutes

        def honest(number: int) -> None:
            while time.monotonic() < until:
                problems = _train_once(address, job, steps, number % seeds, quiet, Path(name, f"{number}"))
                with lock:
                    result.finished += not problems
                    result.problems += problems

        def hostile(attack: Hostile) -> None:
            draw = random.Random(f"{seed} {attack.__name__}")
            while not stop.is_set():
                with contextlib.suppress(OSError, Refused):
                    attack(address, frames, draw, stop)
                with lock:
                    result.attacks[attack.__name__] = result.attacks.get(attack.__name__, 0) + 1
                stop.wait(0.02)

        with Memory(server) as memory, ThreadPoolExecutor(clients) as pool:
            attackers = [pool.submit(hostile, attack) for attack in HOSTILE]
            for done in [pool.submit(honest, number) for number in range(clients - len(HOSTILE))]:
                done.result()
            stop.set()
            for done in attackers:
                done.result()
        result.before_bytes, result.most_bytes = memory.before, memory.most
        result.problems += _train_once(address, job, steps, 0, quiet, Path(name, "last"))
        result.after_bytes = server.rss_bytes()
        if "Traceback" in server.err:
            result.problems.append("a traceback in the server's log")
    return result


def _train_once(
    address: str, job: Job, steps: int, seed: int, quiet: dict[int, Quiet], saved: Path
) -> list[str]:
    ended = train_to_end(address, job, steps, seed, "--save", saved, within_s=PATIENCE_S)
    return problems_of(ended, saved, quiet[seed])

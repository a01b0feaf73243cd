"""Training under faults against a quiet run: the runs that `benchmarks.faults` makes many of, and tests a few.

Processes are those of the tests, `tests.system.processes`: forked from one that has loaded torch, for many starts
here are after a kill. Every run is compared with an undisturbed one of the same seed, tensor by tensor, bit by bit.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from safetensors.torch import load_file
from torch import Tensor

from benchmarks.fault_plans import DOWN, UP, CutFrames, FrameCut, RandomFaults, mean_gap
from benchmarks.faulty_proxy import FaultyProxy
from tests.system.processes import Command, Ended, running, serving

MODELS = Path(__file__).resolve().parent.parent / "tests" / "system" / "models"
if str(MODELS) not in sys.path:  # forked processes find models where this one does
    sys.path.insert(0, str(MODELS))

HEARTBEAT_S = 0.4
TIMEOUT_S = 3 * HEARTBEAT_S
NOTICES_SOON = ("--heartbeat", HEARTBEAT_S)
PATIENCE_S = 600.0
_COMMON = (
    *("--batch-size", "8", "--chunks", "2", "--threads", "1", "--eval-every", "0"),
    *("--train-limit", "64", "--test-limit", "8", "--memory-format", "contiguous"),
)
IMPORTS = ("--import", "dropout_model", "--import", "token_model")


@dataclass(frozen=True)
class Job:
    """Something to train that takes milliseconds a step.

    Attributes:
        chain: what ``--compress`` stands for in the tables.
        options: of ``edge-client``.
    """

    chain: str
    options: tuple[str, ...]

    def arguments(self, steps: int, seed: int) -> tuple[str, ...]:
        """Options for so many steps."""
        return (*IMPORTS, *self.options, *_COMMON, "--steps", str(steps), "--seed", str(seed))


_IMAGES = ("--model", "wide_net", "--cut", "stem", "--cut", "blocks", "--image-size", "32")
_TOKENS = ("--model", "token_net", "--cut", "embed", "--cut", "blocks", "--image-size", "16")
TINY_JOB = Job(
    "conv+int8",
    (
        *("--model", "dropout_net", "--cut", "stem", "--cut", "blocks.1", "--image-size", "16"),
        *("--compress", "conv+int8"),
    ),
)
"""One that is built soon, too."""
_DECAY = "decay:rate=0.9,steps=10,iterations=5"
JOBS = {
    job.chain: job
    for job in (
        Job("none", (*_IMAGES, "--compress", "none")),
        Job("conv+int8", (*_IMAGES, "--compress", "conv+int8")),
        Job("lowrank:8+int4", (*_IMAGES, "--compress", "lowrank:8+int4")),
        Job("decay", (*_TOKENS, "--compress", _DECAY)),
        Job("delta+int4", (*_IMAGES, "--compress", "delta+int4", "--no-augment")),
    )
}


@dataclass(frozen=True)
class Quiet:
    """What a run came to that nothing disturbed.

    Attributes:
        state: the trained model.
        step_bytes: of one step, in both directions.
        heads: bytes of prelude and header, the most that a message of each kind had.
    """

    state: Mapping[str, Tensor]
    step_bytes: float
    heads: Mapping[str, int]


@dataclass
class Trial:
    """One disturbed run.

    Attributes:
        what: of which table and row it is.
        seed: of the training and of the faults.
        faults: how many were made, by kind.
        problems: what is wrong; empty where all is right.
    """

    what: str
    seed: int
    faults: Mapping[str, int]
    problems: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        made = ", ".join(f"{count} {kind}" for kind, count in sorted(self.faults.items()))
        verdict = "PASS" if not self.problems else "FAIL: " + "; ".join(self.problems)
        return f"{self.what}, seed {self.seed}: {made}: {verdict}"


@contextmanager
def server_for_faults(*arguments: object) -> Iterator[tuple[Command, str]]:
    """A server whose clients may come back, and that notices soon when one is gone."""
    with serving(*IMPORTS, "--max-sessions", 32, *NOTICES_SOON, *arguments) as started:
        yield started


def train_to_end(
    address: str, job: Job, steps: int, seed: int, *options: object, within_s: float = PATIENCE_S
) -> Ended:
    """Run a client to its end."""
    given = ("--give-up-after", PATIENCE_S, *job.arguments(steps, seed), *options)
    with running("edge-client", "--server", address, *given) as client:
        return client.wait(within_s)


def quiet_run(address: str, job: Job, steps: int, seed: int) -> Quiet:
    """Train undisturbed.

    Raises:
        AssertionError: the run failed.
    """
    watch = CutFrames()
    with TemporaryDirectory() as folder, FaultyProxy(address, watch) as proxy:
        saved = Path(folder, "quiet.safetensors")
        ended = train_to_end(proxy.address, job, steps, seed, "--save", saved)
        assert ended.status == 0, ended.err
        state = load_file(saved)
    heads = {kind: max(watch.sizes(kind)) for kind in {seen.kind for seen in watch.seen}}
    return Quiet(state, (proxy.carried[UP] + proxy.carried[DOWN]) / steps, heads)


def differing(expected: Mapping[str, Tensor], came: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors that are not the same to the bit, or that only one of the two has."""
    return sorted(
        name
        for name in expected.keys() | came.keys()
        if name not in expected
        or name not in came
        or expected[name].dtype != came[name].dtype
        or expected[name].shape != came[name].shape
        or expected[name].numpy().tobytes() != came[name].numpy().tobytes()
    )


def problems_of(ended: Ended, saved: Path, quiet: Quiet) -> list[str]:
    """What is wrong with a run that should have come to what the quiet one did."""
    if ended.status != 0:
        return [f"the client ended with status {ended.status}: {ended.err.strip()[-300:]}"]
    names = differing(quiet.state, load_file(saved))
    return [f"{len(names)} of {len(quiet.state)} tensors differ, {names[0]} first"] if names else []


def faulty_run(address: str, job: Job, quiet: Quiet, *, steps: int, seed: int, faults: int) -> Trial:
    """Train while a proxy makes random faults, and compare."""
    # A little denser than they should be, so that all of them come before the end, and a few more, for one that falls
    # into a stall which a cut ends is never made.
    gap = 0.6 * mean_gap(quiet.step_bytes, faults / steps)
    plan = RandomFaults(seed, faults + 2 + faults // 25, gap, timeout_s=TIMEOUT_S)
    with TemporaryDirectory() as folder, FaultyProxy(address, plan) as proxy:
        saved = Path(folder, "model.safetensors")
        ended = train_to_end(proxy.address, job, steps, seed, "--save", saved)
        problems = problems_of(ended, saved, quiet)
        made = sum(proxy.faults.values())
        if made < 0.9 * faults and not problems:
            problems.append(f"only {made} of {faults} faults were made")
    return Trial(f"cuts, {job.chain}", seed, dict(proxy.faults), problems)


@dataclass(frozen=True)
class Exchange:
    """A kind of frame to cut at every byte, and what brings it about.

    Attributes:
        kind: of the message.
        after: it comes only once connections were lost: these cuts are made before it each time.
    """

    kind: str
    after: tuple[FrameCut, ...] = ()

    def cuts(self, offsets: Sequence[int]) -> list[FrameCut]:
        """Cuts at these bytes, with an undisturbed exchange between two of them."""
        cuts: list[FrameCut] = []
        for offset in offsets:
            first, *others = [*self.after, FrameCut(self.kind, offset)]
            cuts += [replace(first, skip=1), *others]
        return cuts


WHOLE = 1 << 30
_LOST = FrameCut("commit", WHOLE)
EXCHANGES = (
    Exchange("commit"),
    Exchange("committed"),
    Exchange("rejoin", after=(_LOST,)),
    Exchange("ready", after=(_LOST,)),
    Exchange(
        "resume", after=(_LOST, FrameCut("ready", 10))
    ),  # the ticket has been used, the next did not come
)


def head_sizes(address: str, job: Job) -> dict[str, int]:
    """Bytes of the frames of `EXCHANGES`, the longest of each, in a run in which connections were lost."""
    watch = CutFrames([FrameCut("commit", WHOLE, skip=2), FrameCut("ready", 10)])
    with FaultyProxy(address, watch) as proxy:
        ended = train_to_end(proxy.address, job, 6, 0)
    assert ended.status == 0, ended.err
    return {exchange.kind: max(watch.sizes(exchange.kind)) for exchange in EXCHANGES}


def cut_once(address: str, job: Job, quiet: Quiet, cut: FrameCut, *, steps: int, seed: int) -> Trial:
    """Train while one frame is cut, and compare."""
    plan = CutFrames([cut], keep=())
    with TemporaryDirectory() as folder, FaultyProxy(address, plan) as proxy:
        saved = Path(folder, "model.safetensors")
        ended = train_to_end(proxy.address, job, steps, seed, "--save", saved)
        problems = problems_of(ended, saved, quiet)
        problems += ["the cut was not reached"] if plan.cuts and not problems else []
    return Trial(f"{cut}, {job.chain}", seed, dict(proxy.faults), problems)


def cut_exchange(address: str, job: Job, exchange: Exchange, offsets: Sequence[int], *, seed: int) -> Trial:
    """Train while one frame after another is cut, each at the next offset, and compare.

    Args:
        address: the server's.
        job: what to train.
        exchange: which frames.
        offsets: bytes of the frame that still pass; beyond its length is right after it.
        seed: of the training.
    """
    steps = 2 * len(offsets) + 3
    quiet = quiet_run(address, job, steps, seed)
    plan = CutFrames(exchange.cuts(offsets), keep=())
    with TemporaryDirectory() as folder, FaultyProxy(address, plan) as proxy:
        saved = Path(folder, "model.safetensors")
        ended = train_to_end(proxy.address, job, steps, seed, "--save", saved)
        problems = problems_of(ended, saved, quiet)
        if plan.cuts and not problems:
            problems.append(f"{len(plan.cuts)} cuts were not reached, the next is {plan.cuts[0]}")
    what = f"{exchange.kind}, {job.chain}, bytes {min(offsets)} to {max(offsets)}"
    return Trial(what, seed, dict(proxy.faults), problems)


class Restartable:
    """A command that is killed and started again; what its incarnations wrote on standard error is kept."""

    def __init__(self, script: str, folder: Path) -> None:
        self._script, self._folder = script, folder
        self._starts = 0
        self.command: Command | None = None
        self.errors: list[str] = []

    def start(self, *arguments: object) -> Command:
        """Start it, which must not be running."""
        self._starts += 1
        folder = self._folder / f"{self._script}-{self._starts}"
        folder.mkdir(parents=True)
        self.command = Command(self._script, tuple(map(str, arguments)), folder)
        return self.command

    def kill(self) -> None:
        """End it by SIGKILL."""
        if self.command is not None:
            self.command.kill()
            self.errors.append(self.command.err)
            self.command = None


class Memory:
    """The most and the last that a process has resident while the block runs."""

    def __init__(self, command: Command, every_s: float = 0.2) -> None:
        self._command, self._every_s = command, every_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> Memory:
        self.before = self.most = self._command.rss_bytes()
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()
        self.after = self._command.rss_bytes()

    def _watch(self) -> None:
        while not self._stop.wait(self._every_s):
            self.most = max(self.most, self._command.rss_bytes())

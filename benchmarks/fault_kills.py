"""SIGKILL of the client, the server or both, again and again in one training, against a quiet run."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.fault_plans import CutFrames
from benchmarks.fault_runs import (
    IMPORTS,
    NOTICES_SOON,
    PATIENCE_S,
    Job,
    Quiet,
    Restartable,
    Trial,
    problems_of,
)
from benchmarks.faulty_proxy import FaultyProxy
from tests.system.processes import Ended

VICTIMS = (("client",), ("server",), ("client", "server"))
EARLY = 1 / 3
"""So many kills come soon after a start, whatever has been reached by then; the others as training goes on."""
SOON_S, SHORTLY_S = 0.8, 0.06
CHECKPOINT_EVERY = 3


class KilledTraining:
    """A client and a server that are started again whenever they were killed, as their owners would.

    Args:
        job: what to train.
        steps: in all.
        seed: of the training.
        folder: for everything that is written.

    Attributes:
        saved: the model, once training has ended.
        resumed: how often the client went on from a checkpoint.
    """

    def __init__(self, job: Job, steps: int, seed: int, folder: Path) -> None:
        self._job, self._steps, self._seed, self._folder = job, steps, seed, folder
        self._checkpoints = folder / "checkpoints"
        self.saved = folder / "model.safetensors"
        self.client = Restartable("edge-client", folder)
        self.server = Restartable("cloud-server", folder)
        self._port = 0
        self._starts = self.resumed = 0
        self._watch = CutFrames(keep={"commit"})
        self._proxy: FaultyProxy | None = None

    def __enter__(self) -> KilledTraining:
        try:
            self.start_server()
            self._proxy = FaultyProxy(f"127.0.0.1:{self._port}", self._watch)
            self._proxy.__enter__()
            self.start_client()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.client.kill()
        if self._proxy is not None:
            self._proxy.__exit__()
        self.server.kill()

    @property
    def progress(self) -> int:
        """The highest step that the client has committed."""
        return max((seen.step or 0 for seen in self._watch.seen), default=0)

    def start_server(self) -> None:
        """Start it on the port and the folder that it had before."""
        state = ("--state-dir", self._folder / "server", "--max-sessions", 32, *NOTICES_SOON)
        command = self.server.start("--cpu", "--threads", 1, "--port", self._port, *state, *IMPORTS)
        self._port = int(command.until(r"^listening on \S+:(\d+)$")[1])

    def start_client(self) -> None:
        """Start it where it was, or anew where it has written nothing to go on from."""
        assert self._proxy is not None
        common = ("--server", self._proxy.address, "--give-up-after", PATIENCE_S, "--save", self.saved)
        if any(self._checkpoints.glob("step-*")):
            self.resumed += 1
            self.client.start("--resume", self._checkpoints, *common, *IMPORTS)
            return
        # As a user would: nothing was lost yet, so begin again, in another folder.
        self._starts += 1
        self._checkpoints = self._folder / f"checkpoints-{self._starts}"
        every = ("--checkpoint", self._checkpoints, "--checkpoint-every", CHECKPOINT_EVERY)
        self.client.start(*common, *every, *self._job.arguments(self._steps, self._seed))

    def until(self, condition: Callable[[], bool]) -> bool:
        """Wait for something; False where the client ends, or the time is over, before."""
        deadline = time.monotonic() + PATIENCE_S
        while not condition():
            if self.ended() is not None or time.monotonic() > deadline:
                return False
            time.sleep(0.005)
        return True

    def ended(self) -> Ended | None:
        """How the client ended; None while it runs.

        One that could not connect at its start says so and ends, and its owner starts it again.
        """
        command = self.client.command
        assert command is not None
        if command.alive:
            return None
        ended = command.wait()
        if ended.status == 0 or not ended.err.startswith("error: cannot connect"):
            return ended
        self.client.kill()
        self.start_client()
        return None

    def kill(self, victims: tuple[str, ...]) -> None:
        """Kill them, and start them again."""
        if "client" in victims:
            self.client.kill()
        if "server" in victims:
            self.server.kill()
            self.start_server()
        if "client" in victims:
            self.start_client()


def killed_run(job: Job, quiet: Quiet, *, steps: int, seed: int, kills: int) -> Trial:
    """Train while one side or both are killed at random moments, and compare.

    Args:
        job: what to train.
        quiet: the same without kills.
        steps: of the training.
        seed: of the training and of the moments.
        kills: how many.
    """
    draw = random.Random(seed)
    made: Counter[str] = Counter()
    problems: list[str] = []
    with TemporaryDirectory() as name, KilledTraining(job, steps, seed, Path(name)) as training:
        for number in range(kills):
            due = steps * number / (kills + 2)
            if draw.random() < EARLY:
                time.sleep(draw.uniform(0, SOON_S))
            elif training.until(lambda due=due: training.progress >= due):
                time.sleep(draw.uniform(0, SHORTLY_S))
            else:
                break
            victims = draw.choice(VICTIMS)
            training.kill(victims)
            made["both" if len(victims) == 2 else victims[0]] += 1
        training.until(lambda: False)
        ended = training.ended()
        problems += ["it hung"] if ended is None else problems_of(ended, training.saved, quiet)
        training.client.kill()
        training.server.kill()
        errors = [*training.client.errors, *training.server.errors]
        problems += ["a traceback in the log"] if any("Traceback" in text for text in errors) else []
        if made["client"] + made["both"] > 2 and not training.resumed:
            problems.append("the client never went on from a checkpoint")
        if made.total() < kills and not problems:
            problems.append(f"{made.total()} of {kills} kills came before the end")
    return Trial(f"kills, {job.chain}", seed, dict(made), problems)

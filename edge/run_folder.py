"""What a run keeps on disk to go on from: its settings, its session on the server, and checkpoints.

::

    DIR/run.json               the settings, and what resuming the session on the server takes
       /step-….safetensors     checkpoints, the last few

Both sides write the checkpoint of the same step. The newest that is known to be on both is *common*: neither
side removes it before there is a newer one.
"""

import asyncio
import json
import os
import secrets
import warnings
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from common.checkpoints import CheckpointFolder
from common.disk import sole_user, write_private
from common.errors import CheckpointFailed, UserError
from edge.config import TrainConfig

_SETTINGS = "run.json"
_VERSION = 2

MAY_CHANGE = (
    *("server", "checkpoint", "checkpoint_every", "keep_checkpoints", "give_up_after"),
    *("save", "metrics", "trace", "threads", "depth", "data_root", "eval_every"),
    *("token_file", "tls", "tls_fingerprint", "tls_ca", "tls_cert", "tls_key"),
)
"""Settings that change no result of training."""


@dataclass(frozen=True)
class SessionKey:
    """A session on the server, and what resuming it takes; both at random, and known to nobody else."""

    session: bytes
    secret: bytes

    @classmethod
    def new(cls) -> "SessionKey":
        """Choose one."""
        return cls(secrets.token_bytes(16), secrets.token_bytes(32))


class RunFolder:
    """A run's checkpoints on this side, and what is known of those on the other.

    Args:
        path: the folder; it is made.
        keep: how many checkpoints stay.
        warn: tells people.

    Raises:
        CheckpointFailed: it cannot be made or read.
    """

    def __init__(self, path: Path, *, keep: int, warn: Callable[[str], object] = warnings.warn) -> None:
        self.path = path
        self._warn = warn
        self._checkpoints = CheckpointFolder(path, keep=keep)
        self._here = set(self._checkpoints.steps())
        self._there: set[int] = set()

    @property
    def steps(self) -> list[int]:
        """Steps that there are checkpoints of, here."""
        return sorted(self._here)

    @property
    def common(self) -> int:
        """The newest step known to be saved on both sides; 0 before the first."""
        return max(self._here & self._there, default=0)

    @property
    def has_common(self) -> bool:
        """Whether there is such a step."""
        return bool(self._here & self._there)

    @property
    def came_to(self) -> int:
        """The highest step that there is a file of here, whole or damaged; 0 where there is none."""
        return max(self._checkpoints.named(), default=0)

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Keep other processes from going on with the same run while the block lasts.

        Raises:
            UserError: one does.
        """
        folder = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        with sole_user(folder, f"another edge-client goes on with the run in {self.path}; end that first"):
            yield

    async def check(self) -> None:
        """Read all checkpoints through, so that none is gone on from that the disk has damaged.

        Raises:
            CheckpointFailed: the folder cannot be read.
        """
        damaged: list[str] = []
        await asyncio.to_thread(self._checkpoints.check, damaged.append)
        self._here = set(self._checkpoints.steps())
        for line in damaged:
            self._warn(line)

    def check_unused(self) -> None:
        """See that a new run may begin here.

        Raises:
            UserError: the folder holds another.
        """
        if self._here or (self.path / _SETTINGS).exists():
            raise UserError(
                f"{self.path} holds a run already; go on with it by --resume {self.path}, or name another folder"
            )

    def write_settings(self, config: TrainConfig, key: SessionKey) -> None:
        """Write down what resuming takes, for the owner's eyes alone.

        Raises:
            CheckpointFailed: it cannot be written.
        """
        described = {
            "version": _VERSION,
            "session": key.session.hex(),
            "secret": key.secret.hex(),
            "settings": _plain(config),
        }
        self._there = set()  # it is a new session
        path = self.path / _SETTINGS
        try:
            write_private(path, json.dumps(described, indent=1))
        except OSError as error:
            raise CheckpointFailed(f"{path} cannot be written: {error.strerror or error}") from error

    def update_settings(self, config: TrainConfig) -> None:
        """Write down what was given anew when the run was resumed, so that it need not be given again.

        Where it cannot be written that is said, and the run goes on.
        """
        path = self.path / _SETTINGS
        try:
            text = path.read_text()
            updated = json.dumps({**json.loads(text), "settings": _plain(config)}, indent=1)
            if updated != text:
                write_private(path, updated)
        except (OSError, ValueError) as error:
            self._warn(
                f"{path} CANNOT BE BROUGHT UP TO DATE: {error}; give the same options to the next --resume"
            )

    async def write(self, step: int, snapshot: Awaitable[Any], about: Mapping[str, Any]) -> None:
        """Write a checkpoint, beside whatever goes on.

        Raises:
            CheckpointFailed: it cannot be written; those that there were stay.
        """
        state = await snapshot
        await asyncio.to_thread(self._checkpoints.write, step, state, about)
        self._here.add(step)

    async def prune(self) -> None:
        """Remove the oldest checkpoints, down to the last few and the newest common one.

        Raises:
            CheckpointFailed: one cannot be removed.
        """
        try:
            await asyncio.to_thread(self._checkpoints.prune, self.common)
        finally:
            self._here = set(await asyncio.to_thread(self._checkpoints.steps))

    def saved_there(self, step: int) -> None:
        """The server has written its checkpoint of a step."""
        self._there.add(step)

    def is_saved(self, step: int) -> bool:
        """Whether both sides have written theirs of a step."""
        return step in self._here & self._there

    async def read(self, step: int) -> tuple[Any, dict[str, Any]]:
        """Read a checkpoint.

        Raises:
            UserError: it is damaged.
        """
        return await asyncio.to_thread(self._checkpoints.read, step)

    async def went_back(self, step: int) -> None:
        """Both sides go on from a step: later checkpoints are of a future that will not be."""
        await asyncio.to_thread(self._checkpoints.drop_after, step)
        self._there.add(step)
        self._here = set(self._checkpoints.steps())
        self._there = {saved for saved in self._there if saved <= step}


async def open_folder(
    config: TrainConfig, resources: ExitStack, warn: Callable[[str], object], *, is_new: bool
) -> RunFolder:
    """Open the folder of a run, for this process alone until `resources` are closed.

    Args:
        config: of the run, which is to be kept.
        resources: end the claim to it.
        warn: tells people.
        is_new: the run begins here; else it goes on from what is there, but for what the disk has damaged.

    Raises:
        UserError: there is another run already, or another process goes on with it.
        CheckpointFailed: it cannot be made or read.
    """
    assert config.checkpoint is not None
    folder = RunFolder(config.checkpoint, keep=config.keep_checkpoints, warn=warn)
    if is_new:
        folder.check_unused()
    resources.enter_context(folder.claimed())
    await folder.check()
    return folder


def read_settings(path: Path, changes: Mapping[str, Any]) -> tuple[TrainConfig, SessionKey]:
    """Read what a run was started with.

    Args:
        path: its folder.
        changes: settings that are given anew.

    Raises:
        UserError: there is no run, or a change would make it another; names the difference.
    """
    try:
        described = json.loads((path / _SETTINGS).read_text())
        key = SessionKey(bytes.fromhex(described["session"]), bytes.fromhex(described["secret"]))
        stored = described["settings"]
        known = {field.name for field in fields(TrainConfig)}
        if described["version"] != _VERSION or not set(stored) <= known:
            raise UserError(f"{path} holds a run of another version of Isthmus")
        settings = {name: _typed(name, value) for name, value in stored.items()}
    except FileNotFoundError:
        raise UserError(
            f"--resume {path}: there is no run in that folder; name one that --checkpoint made"
        ) from None
    except OSError as error:
        raise UserError(f"--resume {path}: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"--resume {path}: {_SETTINGS} in it is damaged") from error
    for name, value in changes.items():
        given, its = (value.absolute() if isinstance(value, Path) else value), settings.get(name)
        if name not in MAY_CHANGE and given != its:
            option = "cut" if name == "cuts" else name.replace("_", "-")
            raise UserError(
                f"--{option} is {_said(its)} in the run in {path}, and {_said(given)} was given; a run goes on as it "
                "began: leave the option out, or start a new run"
            )
    return TrainConfig(**{**settings, **changes, "checkpoint": path}), key


_PATHS = {field.name for field in fields(TrainConfig) if "Path" in str(field.type)}
_TUPLES = {"cuts", "compress"}


def _plain(config: TrainConfig) -> dict[str, Any]:
    return {
        name: str(value.absolute()) if isinstance(value, Path) else value
        for name, value in asdict(config).items()
    }


def _said(value: Any) -> str:
    if isinstance(value, tuple):
        return " ".join(map(str, value)) or "left out"
    return "left out" if value is None else str(value)


def _typed(name: str, value: Any) -> Any:
    if value is None:
        return None
    if name in _PATHS:
        return Path(value)
    return tuple(value) if name in _TUPLES else value

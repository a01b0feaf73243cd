"""A folder of checkpoints: each appears whole or not at all, whatever is killed and whenever (invariant 3).

A checkpoint is one safetensors file, ``step-0000000120.safetensors``. Its tensors are those of the state; its
metadata hold the rest of it, and what the run is, as JSON. It is written under another name, brought to the disk
and only then renamed, so that a file of that form is complete; it is written tensor by tensor, so that no second
copy of the state is in memory. Its last four bytes, a tensor of their own, are the CRC-32 of all before them: what the
disk has damaged since is found out when a run goes on.

Several processes may use a folder at once; a file that is still being written belongs to its writer alone.
"""

from __future__ import annotations

import json
import os
import re
import secrets
from collections.abc import Callable, Iterable, Mapping
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from safetensors import SafetensorError, safe_open

from common.checksum import CHECKSUM_BYTES, is_sound, summed
from common.disk import Disk
from common.errors import CheckpointFailed, UserError
from common.safetensors_file import Header, data_of, header_of, read_header
from common.snapshot import CHECKSUM_NAME, flatten, unflatten

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["CheckpointFolder"]

VERSION: Final = 2
"""Of what is in a checkpoint; files of another one are as good as none."""

_NAME: Final = re.compile(r"step-([0-9]{10,19})\.safetensors")
_TEMPORARY: Final = re.compile(r"\.step-[0-9]{10,19}\.safetensors\.[0-9a-f]+\.tmp")
_FORMAT: Final = "isthmus checkpoint"


class CheckpointFolder:
    """The checkpoints of one run on one side.

    Args:
        path: the folder; made, for its owner alone, where it does not exist. What dead writers have left in it is
            removed.
        keep: how many checkpoints `prune` leaves.
        disk: what writes; tests give one that fails.

    Raises:
        CheckpointFailed: there cannot be such a folder, or it cannot be read.
    """

    def __init__(self, path: Path, keep: int = 3, disk: Disk | None = None) -> None:
        assert keep >= 1
        self.path = path
        self._keep = keep
        self._disk = disk or Disk()
        self._sound: set[int] = set()  # checked, or written by this object
        self._damaged: set[int] = set()
        self._unread: set[int] = set()  # the last check could not read them, which may pass
        with self._failing(f"there can be no checkpoints in {path}"):
            self._disk.make_folder(path)
            names = os.listdir(path)
        for name in names:
            if _TEMPORARY.fullmatch(name):
                self._remove_if_dead(path / name)

    def steps(self) -> list[int]:
        """Return the steps of all whole checkpoints, ascending. Files that are none are passed over.

        Raises:
            CheckpointFailed: the folder cannot be read.
        """
        passed_over = self._damaged | self._unread
        return [step for step in self.named() if step not in passed_over and self._is_whole(step)]

    def named(self) -> list[int]:
        """Return the steps that files here are named after, ascending, whether they are any good or not.

        Raises:
            CheckpointFailed: the folder cannot be read.
        """
        with self._failing(f"the checkpoints in {self.path} cannot be listed"):
            names = os.listdir(self.path)
        return sorted({int(found[1]) for name in names if (found := _NAME.fullmatch(name))})

    def check(self, warn: Callable[[str], None]) -> None:
        """Read all checkpoints through, unless that was done, and from now on pass over those that are damaged.

        Call before a step to go on from is chosen: it takes as long as reading the files. They are left as they are.

        Args:
            warn: is told of each that is damaged.

        Raises:
            CheckpointFailed: the folder cannot be read.
        """
        self._unread = set()
        for step in self.named():
            if step in self._sound or step in self._damaged:
                continue
            try:
                sound = self._header(step) is not None and is_sound(self.file_of(step))
            except OSError as error:
                self._unread.add(step)
                warn(f"{self.file_of(step)} CANNOT BE READ: {error.strerror or error}; it is passed over")
                continue
            (self._sound if sound else self._damaged).add(step)
            if not sound:
                warn(
                    f"{self.file_of(step)} IS DAMAGED, or of another version: it is passed over, and left there"
                )

    def file_of(self, step: int) -> Path:
        """Return where the checkpoint of a step is, or would be."""
        return self.path / f"step-{step:010}.safetensors"

    def write(self, step: int, state: Any, about: Mapping[str, Any]) -> None:
        """Write the checkpoint of a step, in the place of one that is there.

        Args:
            step: committed steps.
            state: as `common.snapshot.flatten` takes it; not changed meanwhile by other threads.
            about: what the run is, of values that JSON has: model, cuts, optimizer, codecs.

        Raises:
            CheckpointFailed: the disk is full, or the folder is gone or not ours; all older checkpoints are still
                there.
        """
        tensors, plain = flatten(state)
        metadata = {
            "format": _FORMAT,
            "version": str(VERSION),
            "step": str(step),
            "about": json.dumps(about),
            "state": json.dumps(plain),
        }
        checksum = torch.empty(CHECKSUM_BYTES, dtype=torch.uint8)  # the last one, for no element is narrower
        header, (*ordered, _) = header_of({**tensors, CHECKSUM_NAME: checksum}, metadata)
        path = self.file_of(step)
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
        with self._failing(f"the checkpoint of step {step} could not be written in {self.path}"):
            try:
                self._write_file(temporary, summed(chain((header,), map(data_of, ordered))))
                self._disk.rename(temporary, path)
            except BaseException:
                with suppress(OSError):
                    self._disk.remove(temporary)
                raise
            self._sound.add(step)
            self._damaged.discard(step)
            self._unread.discard(step)
            self._disk.sync_folder(self.path)

    def read(self, step: int) -> tuple[Any, dict[str, Any]]:
        """Read a checkpoint back.

        Returns:
            The state, in memory of its own, and what the run is.

        Raises:
            UserError: there is none of that step, or it is damaged or of another version.
            CheckpointFailed: the disk does not give it.
        """
        path = self.file_of(step)
        with self._failing(f"{path} cannot be read"):
            try:
                header = self._header(step)
                if header is None:
                    raise UserError(f"{path} is no checkpoint of step {step} that can be read")
                if not is_sound(path):
                    self._sound.discard(step)
                    raise UserError(f"{path} is damaged: its checksum is not that of what it holds")
                with safe_open(path, "pt") as file:
                    # Copied, for what the library gives is the file itself, which may fail or go away.
                    tensors = {
                        name: file.get_tensor(name).clone() for name in header.names if name != CHECKSUM_NAME
                    }
                state = unflatten(tensors, json.loads(header.metadata["state"]))
                return state, json.loads(header.metadata["about"])
            except FileNotFoundError:
                there = ", ".join(map(str, self.steps())) or "none"
                raise UserError(
                    f"there is no checkpoint of step {step} in {self.path}; there are: {there}"
                ) from None
            except (SafetensorError, ValueError, KeyError) as error:
                raise UserError(f"{path} is damaged: {' '.join(str(error).split())[:200]}") from error

    def prune(self, keep_step: int | None = None) -> None:
        """Remove the oldest checkpoints, down to the last few.

        Args:
            keep_step: one that stays in any case: the newest that the other side has, too.

        Raises:
            CheckpointFailed: one cannot be removed.
        """
        steps = self.steps()
        self._remove(step for step in steps[: -self._keep] if step != keep_step)

    def drop_after(self, step: int) -> None:
        """Remove all checkpoints after a step: those of a future that is given up.

        Raises:
            CheckpointFailed: one cannot be removed.
        """
        # The last one first, so that those which are left, if this is cut short, have no gap.
        self._remove(later for later in reversed(self.steps()) if later > step)

    def drop(self, step: int) -> None:
        """Remove the checkpoint of one step, where there is one.

        Raises:
            CheckpointFailed: it cannot be removed.
        """
        self._remove((step,))

    def _remove(self, steps: Iterable[int]) -> None:
        with self._failing(f"old checkpoints in {self.path} could not be removed"):
            for step in steps:
                with suppress(FileNotFoundError):
                    self._disk.remove(self.file_of(step))
            self._disk.sync_folder(self.path)

    def _write_file(self, path: Path, pieces: Iterable[memoryview]) -> None:
        descriptor = self._disk.create(path)
        try:
            self._disk.lock(descriptor)
            for piece in pieces:
                while piece.nbytes:
                    piece = piece[self._disk.write(descriptor, piece) :]
            self._disk.sync(descriptor)
        finally:
            self._disk.close(descriptor)

    def _remove_if_dead(self, path: Path) -> None:
        with suppress(OSError):  # in use, or gone already, or not ours: it harms nobody
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            try:
                self._disk.lock(descriptor)
                self._disk.remove(path)
            finally:
                os.close(descriptor)

    def _is_whole(self, step: int) -> bool:
        try:
            return self._header(step) is not None
        except OSError:
            return False

    def _header(self, step: int) -> Header | None:
        """Return the header of a whole checkpoint of that step; None if the file is none."""
        header = read_header(self.file_of(step))
        wanted = {"format": _FORMAT, "version": str(VERSION), "step": str(step)}
        is_ours = header is not None and wanted.items() <= header.metadata.items()
        return header if is_ours else None

    @contextmanager
    def _failing(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise CheckpointFailed(f"{what}: {(error.strerror or str(error)).lower()}") from error

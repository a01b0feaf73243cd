"""What writing a file safely asks of the operating system: one method a call, so that tests can fail every one.

A file that replaces another goes through them in this order::

    create · lock · write … · sync · rename · sync_folder      and close, whatever happens
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from common.errors import UserError


class Disk:
    """The real one. Every method raises OSError."""

    def make_folder(self, path: Path) -> None:
        """Make a folder for its owner alone, where there is none, and those above it."""
        path.mkdir(mode=0o700, parents=True, exist_ok=True)

    def create(self, path: Path) -> int:
        """Make a file, for its owner alone, and return its descriptor."""
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)

    def lock(self, descriptor: int) -> None:
        """Show that the file has a living writer; the lock goes with the descriptor, however the process ends.

        Raises:
            BlockingIOError: it has another one.
        """
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def write(self, descriptor: int, data: memoryview) -> int:
        """Write some of the data; return how many bytes."""
        return os.write(descriptor, data)

    def sync(self, descriptor: int) -> None:
        """Wait until the file's data are on the disk."""
        os.fsync(descriptor)

    def close(self, descriptor: int) -> None:
        """Close a file."""
        os.close(descriptor)

    def rename(self, path: Path, to: Path) -> None:
        """Give a file another name in its folder, in the place of a file that has it."""
        os.replace(path, to)

    def sync_folder(self, path: Path) -> None:
        """Wait until the names in a folder are on the disk."""
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def remove(self, path: Path) -> None:
        """Remove a file."""
        path.unlink()


@contextmanager
def sole_user(descriptor: int, otherwise: str) -> Iterator[None]:
    """Keep other processes that ask the same of a file or a folder out while the block runs, and close it then.

    Args:
        descriptor: of the file or folder; a file on a network has to be open for writing.
        otherwise: what is said to those who come later.

    Raises:
        UserError: another process has it.
    """
    try:
        try:
            Disk().lock(descriptor)
        except BlockingIOError:
            raise UserError(otherwise) from None
        except OSError:  # a network's file system may not know of locks
            pass
        yield
    finally:
        os.close(descriptor)


def write_private(path: Path, text: str) -> None:
    """Write a small file for its owner alone, in the place of one that is there.

    Raises:
        OSError: it cannot be written; the old one stays.
    """
    temporary = path.with_suffix(".tmp")
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)

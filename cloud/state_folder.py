"""Where sessions are kept on disk, one folder each: how much they take, and how they go.

::

    STATE_DIR/lock                  held by the server that uses it
             /<session id>          a session, as `cloud.tenant` writes it
             /<session id>.gone     one that is being removed: nobody finds it any more
"""

import contextlib
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from common.errors import UserError

_KEY_BYTES = 16
_GONE = ".gone"


@dataclass(frozen=True)
class Kept:
    """A session on disk.

    Attributes:
        key: its id.
        used_s: when something was last written there, in seconds since the epoch.
        nbytes: what its files take.
        unfinished: how much of that those take that are being written.
    """

    key: bytes
    used_s: float
    nbytes: int
    unfinished: int


class StateFolder:
    """The sessions of one server on disk.

    Args:
        path: the folder, which is there.
        most_bytes: that all sessions may take; None for half of the disk's space that nothing else takes, or for what
            they take now where that is more.

    Attributes:
        most_bytes: that all sessions may take.

    Raises:
        UserError: the folder cannot be read.
    """

    def __init__(self, path: Path, most_bytes: int | None = None) -> None:
        self._path = path
        try:
            kept_bytes = sum(kept.nbytes for kept in self.look())
            if most_bytes is None:
                most_bytes = max(kept_bytes, (shutil.disk_usage(path).free + kept_bytes) // 2)
        except OSError as error:
            raise UserError(f"--state-dir {path} cannot be used: {error.strerror or error}") from error
        self.most_bytes = most_bytes

    def of(self, key: bytes) -> Path:
        """Return where a session is, or would be."""
        return self._path / key.hex()

    def look(self) -> list[Kept]:
        """Find all sessions, the one first that was not used for longest; in any thread.

        Raises:
            OSError: the folder cannot be read.
        """
        found = []
        for name in os.listdir(self._path):
            key = _key_of(name)
            if key is not None:
                with contextlib.suppress(OSError):  # it has gone meanwhile, or is none
                    found.append(_kept(key, self._path / name))
        return sorted(found, key=lambda kept: kept.used_s)

    def set_aside(self, key: bytes) -> None:
        """Take a session out, in one piece; `clear` removes it, which takes longer.

        Raises:
            OSError: it is not there, or the folder may not be written.
        """
        self.of(key).replace(self._path / (key.hex() + _GONE))

    def clear(self) -> None:
        """Remove what was set aside, by this process or one before; in any thread.

        Raises:
            OSError: the folder cannot be read.
        """
        for name in os.listdir(self._path):
            if name.endswith(_GONE) and _key_of(name.removesuffix(_GONE)) is not None:
                shutil.rmtree(self._path / name, ignore_errors=True)


def _key_of(name: str) -> bytes | None:
    try:
        key = bytes.fromhex(name)
    except ValueError:
        return None
    return key if len(key) == _KEY_BYTES and key.hex() == name else None


def _kept(key: bytes, folder: Path) -> Kept:
    nbytes = unfinished = 0
    with os.scandir(folder) as files:
        for file in files:
            with contextlib.suppress(FileNotFoundError):  # one that was being written
                size = file.stat(follow_symlinks=False).st_size
                nbytes += size
                unfinished += size * file.name.startswith(".")
    return Kept(key, folder.stat().st_mtime, nbytes, unfinished)

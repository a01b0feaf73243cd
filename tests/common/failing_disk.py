"""A disk that fails, or a process that is killed, at one call of those that writing a checkpoint makes."""

import errno
import os

from common.disk import Disk


class Killed(BaseException):
    """The process is no more: nothing that it would have done afterwards happens."""


class WatchedDisk(Disk):
    """Names the calls that are made.

    Args:
        piece: the most bytes that one write takes.
    """

    def __init__(self, piece=1 << 30):
        self.calls = []
        self.open = set()
        self._piece = piece

    def around(self, name, call, *arguments):
        self.calls.append(name)
        return call(*arguments)

    def make_folder(self, path):
        return self.around("make_folder", super().make_folder, path)

    def create(self, path):
        descriptor = self.around("create", super().create, path)
        self.open.add(descriptor)
        return descriptor

    def lock(self, descriptor):
        return self.around("lock", super().lock, descriptor)

    def write(self, descriptor, data):
        return self.around("write", super().write, descriptor, data[: self._piece])

    def sync(self, descriptor):
        return self.around("sync", super().sync, descriptor)

    def close(self, descriptor):
        return self.around("close", self._close, descriptor)

    def _close(self, descriptor):
        self.open.discard(descriptor)
        super().close(descriptor)

    def rename(self, path, to):
        return self.around("rename", super().rename, path, to)

    def sync_folder(self, path):
        return self.around("sync_folder", super().sync_folder, path)

    def remove(self, path):
        return self.around("remove", super().remove, path)


class KilledDisk(WatchedDisk):
    """That of a process which is killed at one call.

    Args:
        at: the number of the call, from 0.
        when: ``before`` it, ``after`` it, or when a write has come to its ``middle``.
        piece: the most bytes that one write takes.
    """

    def __init__(self, at, when, piece):
        super().__init__(piece)
        self._at, self._when = at, when
        self.is_dead = False

    def around(self, name, call, *arguments):
        if self.is_dead:
            raise Killed
        self.is_dead = len(self.calls) == self._at
        if self.is_dead and self._when == "before":
            raise Killed
        if self.is_dead and self._when == "middle":
            if name == "write":
                super().around(name, call, arguments[0], arguments[1][: len(arguments[1]) // 2])
            raise Killed
        done = super().around(name, call, *arguments)
        if self.is_dead:
            if name == "create":
                self.open.add(done)
            raise Killed
        return done

    def bury(self):
        """What the system does with the files of a dead process."""
        while self.open:
            os.close(self.open.pop())


class FailingDisk(WatchedDisk):
    """One that fails.

    Args:
        number: the system's number of the error.
        fails: by a call's number, from 0, and its name, whether it does.
        piece: the most bytes that one write takes.
    """

    def __init__(self, number, fails, piece):
        super().__init__(piece)
        self._number, self._fails = number, fails

    def around(self, name, call, *arguments):
        if not self._fails(len(self.calls), name):
            return super().around(name, call, *arguments)
        if name == "close":  # it is closed whatever it says
            super().around(name, call, *arguments)
        else:
            self.calls.append(name)
        raise OSError(self._number, os.strerror(self._number))


ERRORS = {name: getattr(errno, name) for name in ("ENOSPC", "EIO", "EDQUOT", "EACCES", "EROFS")}

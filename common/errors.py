"""The errors that people meet.

    IsthmusError
    ├── UserError         what was asked for cannot be done; the message says what exists or what to do
    ├── CheckpointFailed  the disk did not take or give a checkpoint; what was there before still is
    └── TrainingStopped   training ended early on purpose; the message says why and what was kept

Every message is one line, so that a command line can print it as it is.
"""


class IsthmusError(Exception):
    """The root of everything that Isthmus raises on purpose, outside the wire."""


class UserError(IsthmusError):
    """Bad input: one line that names what is wrong, and what exists or what to do instead."""


class CheckpointFailed(IsthmusError):
    """A disk is full, broken or not ours to write on: one line that says where; older checkpoints stay."""


class TrainingStopped(IsthmusError):
    """Training cannot go on (a loss that is not a number, say); the last good state has been kept."""

"""The errors that people meet.

    IsthmusError
    ├── UserError        what was asked for cannot be done; the message says what exists or what to do
    └── TrainingStopped  training ended early on purpose; the message says why and what was kept

Every message is one line, so that a command line can print it as it is.
"""


class IsthmusError(Exception):
    """The root of everything that Isthmus raises on purpose, outside the wire."""


class UserError(IsthmusError):
    """Bad input: one line that names what is wrong, and what exists or what to do instead."""


class TrainingStopped(IsthmusError):
    """Training cannot go on (a loss that is not a number, say); the last good state has been kept."""

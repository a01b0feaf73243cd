"""What the sessions of one server may take, and how those are refused for whom there is no room."""

from dataclasses import dataclass

from common.errors import IsthmusError


class Refused(IsthmusError):
    """A client cannot be served.

    Args:
        code: one word for the client's program.
        message: one line for people.
    """

    def __init__(self, code: str, message: str) -> None:
        self.code = code
        super().__init__(message)


class TooLarge(Refused):
    """A session takes more memory than all of them may have."""

    def __init__(self, message: str) -> None:
        super().__init__("refused", message)


class Crowded(Refused):
    """There is no memory for a session while others have theirs."""

    def __init__(self, message: str) -> None:
        super().__init__("busy", message)


class DiskFull(Refused):
    """There is no room on disk to keep a session.

    Args:
        message: one line for people.
        for_good: as below.

    Attributes:
        for_good: nor would there be without the others.
    """

    def __init__(self, message: str, *, for_good: bool = False) -> None:
        self.for_good = for_good
        super().__init__("refused" if for_good else "busy", message)


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What sessions may take.

    Attributes:
        sessions: at work or at rest in memory.
        memory_bytes: that all sessions in memory may take.
        disk_bytes: of disk that one client's codecs may take.
        park_s: seconds without a word from a client until its session leaves memory.
        forget_s: seconds until nothing is left of it.
        state_bytes: of disk that all sessions may take where they are kept; None for half of what there is,
            or for what they take at the start where that is more.
    """

    sessions: int
    memory_bytes: int
    disk_bytes: int
    park_s: float
    forget_s: float
    state_bytes: int | None = None

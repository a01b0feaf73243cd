"""What every message is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True, slots=True)
class Message:
    """Base of all messages."""

    kind: ClassVar[str]

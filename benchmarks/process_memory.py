"""Resident memory of a process, as Linux tells it."""

from __future__ import annotations

from pathlib import Path

RESIDENT, PEAK = "VmRSS", "VmHWM"


def status_bytes(pid: int, key: str) -> int:
    """Bytes that a process has resident now (RESIDENT) or had at most (PEAK); 0 when it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:")), 0)

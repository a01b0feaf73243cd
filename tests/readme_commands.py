"""Runs the commands that a Markdown file shows, so that they keep working.

A fenced ``sh`` or ``python`` block with the line ``<!-- ci -->`` right above it is run, from the directory
that holds the file, with the interpreter's own scripts first on PATH. A block fails when its script exits
non-zero or runs longer than LIMIT_S; what it left running in the background is ended with it.

    python tests/readme_commands.py README.md
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

LIMIT_S = 600
MARKED_BLOCK = re.compile(
    r"^<!-- ci -->[ \t]*\n+```(?P<language>sh|python)[ \t]*\n(?P<script>.*?)^```[ \t]*$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    """One block to run: where it stands, in which language, and its text."""

    line: int
    language: str
    script: str

    @property
    def argv(self) -> list[str]:
        if self.language == "python":
            return [sys.executable, "-c", self.script]
        return ["bash", "-euo", "pipefail", "-c", self.script]


def marked_blocks(text: str) -> list[Block]:
    """The marked blocks of a Markdown text, in its order."""
    return [
        Block(text.count("\n", 0, match.start("script")) + 1, match["language"], match["script"])
        for match in MARKED_BLOCK.finditer(text)
    ]


def run_block(block: Block, directory: Path) -> int:
    """Run one block in a process group of its own; the exit status, 124 when it ran too long."""
    # Not resolved: a virtual environment's python is a link to another directory's.
    scripts = Path(sys.executable).parent
    environment = os.environ | {"PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}"}
    process = subprocess.Popen(block.argv, cwd=directory, env=environment, start_new_session=True)
    try:
        return process.wait(LIMIT_S)
    except subprocess.TimeoutExpired:
        return 124
    finally:
        with contextlib.suppress(ProcessLookupError):  # raised when nothing is left in the background
            os.killpg(process.pid, signal.SIGTERM)
        process.wait()


def main(paths: list[str]) -> int:
    """Run every marked block of every file; the exit status is 1 at the first that fails."""
    passed = 0
    for path in map(Path, paths):
        for block in marked_blocks(path.read_text(encoding="utf-8")):
            sys.stdout.write(f"-- {path}:{block.line}\n{block.script}")
            sys.stdout.flush()
            status = run_block(block, path.resolve().parent)
            if status != 0:
                sys.stderr.write(f"{path}:{block.line}: the commands here exited with status {status}\n")
                return 1
            passed += 1
    if passed == 0:
        sys.stderr.write(f"no block is marked <!-- ci --> in {' '.join(paths)}\n")
        return 1
    sys.stdout.write(f"{passed} passed, 0 failed\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

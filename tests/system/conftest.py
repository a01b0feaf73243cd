import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

MODELS = Path(__file__).parent / "models"


@dataclass
class CloudServer:
    """A server in a process of its own."""

    arguments: list[str] = field(default_factory=list)
    address: str = ""

    def __enter__(self) -> "CloudServer":
        self.log = self.process_log()
        self.process = subprocess.Popen(
            [
                sys.executable,
                "-c",
                "from cloud.cli import main; main()",
                "--port",
                "0",
                "--cpu",
                *self.arguments,
            ],
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env={**os.environ, "PYTHONPATH": str(MODELS)},
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line.startswith("listening on "), line
        self.address = line.removeprefix("listening on ").strip()
        return self

    def __exit__(self, *error: object) -> None:
        self.process.terminate()
        assert self.process.wait(timeout=30) == 0, self.log_text()
        assert self.process.stdout is not None
        self.process.stdout.close()
        self.log.close()

    def process_log(self) -> "tempfile._TemporaryFileWrapper[str]":
        return tempfile.TemporaryFile("w+")

    def log_text(self) -> str:
        self.log.flush()
        self.log.seek(0)
        return self.log.read()


@pytest.fixture(scope="session")
def cloud_server() -> Iterator[CloudServer]:
    with CloudServer(["--threads", "1", "--import", "dropout_model"]) as server:
        yield server

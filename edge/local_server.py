"""A cloud server of one's own on loopback, in a process of its own: for the demo, for tests of a set-up, for code."""

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from common.errors import IsthmusError

_STARTED = "listening on "


@contextmanager
def local_server(modules: Sequence[str] = (), *, cpu: bool = False) -> Iterator[str]:
    """Run ``cloud-server`` while the block runs; yields its ``HOST:PORT``.

    Args:
        modules: what it imports, to know the models that they register.
        cpu: compute on the CPU even where there is a GPU.

    Raises:
        IsthmusError: it did not start; the message is its own.
    """
    # `edge` does not import `cloud`: the server is a program that happens to be installed here, too.
    command = [sys.executable, "-c", "from cloud.cli import main; main()", "--port", "0"]
    command += [word for module in modules for word in ("--import", module)]
    command += ["--cpu"] if cpu else []
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
    with (
        # Ctrl-C is for this process, which ends the server when it is done with it: a session of its own.
        subprocess.Popen(
            [*command, "--quiet", "--owned"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env=environment,
        ) as server
    ):
        try:
            assert server.stdout is not None
            first = server.stdout.readline().strip()
            if not first.startswith(_STARTED):
                raise IsthmusError("the local server did not start; its own message stands above")
            yield first.removeprefix(_STARTED)
        finally:
            server.terminate()

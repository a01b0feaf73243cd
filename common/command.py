"""What both commands do around their work: set the process up, turn errors into one line and an exit status."""

import os
import sys
import traceback
from collections.abc import Callable

import click

# By name, and not by type: `common` does not import `wire`.
_WRONG_COMMAND_LINE = {"UserError", "SpecError"}
_FAILED_RUN = {"IsthmusError", "WireError"}


def run_cli(command: click.Command) -> None:
    """Run a click command as a console script; a wrong command line is one line and exit status 2."""
    try:
        status = command.main(standalone_mode=False)
    except click.ClickException as error:
        name = error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else command.name
        _fail(f"{error.format_message()} (see {name} --help)", status=2)
    except (click.Abort, KeyboardInterrupt):
        _fail("interrupted", status=130)
    sys.exit(status if isinstance(status, int) else 0)


def run_command(work: Callable[[], None], *, debug: bool) -> None:
    """Run a command's work in a process set up for computing.

    An error that was raised on purpose becomes one line on standard error: exit status 2 where the command
    line asked for what cannot be, 1 where the run failed. Any other is a defect and shows its traceback.

    Args:
        work: does everything; imports torch itself.
        debug: show its traceback as well.
    """
    from common.runtime import prepare_process

    prepare_process()
    try:
        work()
    except BrokenPipeError:
        # Whoever read our output has gone; Python would complain about it once more when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        names = {kind.__name__ for kind in type(error).__mro__}
        if not (names & (_WRONG_COMMAND_LINE | _FAILED_RUN) or isinstance(error, OSError)):
            raise
        if debug:
            traceback.print_exc()
        _fail(str(error), status=2 if names & _WRONG_COMMAND_LINE else 1)


def _fail(text: str, *, status: int) -> None:
    sys.stderr.write(f"error: {' '.join(text.split())}\n")
    sys.exit(status)

"""Commands end with one line on standard error and the right exit status."""

import signal
import subprocess
import sys
from pathlib import Path

import click
import pytest

from common.command import run_cli, run_command
from common.errors import IsthmusError, TrainingStopped, UserError
from wire.errors import ConnectFailed, CorruptPayload, PeerError, SpecError, WireError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def unprepared(monkeypatch):
    """The process of the tests stays as it is."""
    monkeypatch.setattr("common.runtime.prepare_process", lambda: None)


def raising(error):
    def work():
        raise error

    return work


def outcome_of(work, capsys, *, debug=False):
    with pytest.raises(SystemExit) as ended:
        run_command(work, debug=debug)
    written = capsys.readouterr()
    assert written.out == ""
    return ended.value.code, written.err


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (UserError("unknown model 'x'"), 2),
        (SpecError("unknown codec 'x' at character 1", "x"), 2),
        (IsthmusError("the local server did not start"), 1),
        (TrainingStopped("the loss is nan"), 1),
        (WireError("the link failed"), 1),
        (CorruptPayload("that is no tensor"), 1),
        (PeerError("refused", "no such model"), 1),
        (ConnectFailed("host", 1, "nobody there"), 1),
        (FileNotFoundError(2, "No such file or directory", "x"), 1),
        (PermissionError(13, "Permission denied"), 1),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
def test_an_error_raised_on_purpose_is_one_line_and_a_status(error, status, capsys):
    code, text = outcome_of(raising(error), capsys)
    assert (code, text) == (status, f"error: {error}\n")


def test_a_message_of_several_lines_becomes_one(capsys):
    assert outcome_of(raising(UserError("one\n  two\ttabs ")), capsys) == (2, "error: one two tabs\n")


@pytest.mark.parametrize("error", [ValueError("a defect"), KeyError("x"), AssertionError("never")])
def test_a_defect_shows_its_traceback(error):
    with pytest.raises(type(error)) as caught:
        run_command(raising(error), debug=False)
    assert caught.value is error


@pytest.mark.parametrize(
    ("error", "status"),
    [(UserError("x"), 2), (WireError("x"), 1), (SpecError("x", "x"), 2), (OSError("x"), 1)],
)
def test_debugging_shows_every_traceback_before_the_same_line_and_status(error, status, capsys):
    with pytest.raises(SystemExit) as ended:
        run_command(raising(error), debug=True)
    assert ended.value.code == status
    shown = capsys.readouterr().err
    assert shown.startswith("Traceback")
    assert shown.endswith("\nerror: x\n")


def test_work_that_succeeds_says_nothing_and_returns(capsys):
    done = []
    run_command(lambda: done.append(True), debug=False)
    assert done == [True]
    assert capsys.readouterr() == ("", "")


def test_the_process_is_prepared_before_the_work(monkeypatch):
    order = []
    monkeypatch.setattr("common.runtime.prepare_process", lambda: order.append("prepared"))
    run_command(lambda: order.append("work"), debug=False)
    assert order == ["prepared", "work"]


@click.group("isthmus", invoke_without_command=True)
@click.option("--number", type=int)
@click.pass_context
def command(context, number):
    if context.invoked_subcommand is None:
        if number == 3:
            raise KeyboardInterrupt
        context.exit(number or 0)


@command.command()
@click.argument("name")
def sub(name):
    click.echo(name)


def run_as_script(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["isthmus", *arguments])
    monkeypatch.setattr(sys.modules["__main__"], "__package__", None)  # a script, and not `python -m`
    with pytest.raises(SystemExit) as ended:
        run_cli(command)
    return ended.value.code, *capsys.readouterr()


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--nunber", "1"], "No such option"),
        (["--number", "many"], "not a valid integer"),
        (["nothing"], "No such command"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_status_2(arguments, complaint, monkeypatch, capsys):
    status, out, err = run_as_script(monkeypatch, capsys, *arguments)
    assert (status, out) == (2, "")
    assert err.startswith("error: ")
    assert complaint in err
    assert err.endswith("(see isthmus --help)\n")
    assert err.count("\n") == 1


def test_the_hint_names_the_subcommand_that_was_meant(monkeypatch, capsys):
    status, _, err = run_as_script(monkeypatch, capsys, "sub")
    assert status == 2
    assert err.endswith("(see isthmus sub --help)\n")


def test_a_command_that_ends_well_has_status_0_and_its_own_output(monkeypatch, capsys):
    assert run_as_script(monkeypatch, capsys, "sub", "hello") == (0, "hello\n", "")
    status, out, err = run_as_script(monkeypatch, capsys, "--help")
    assert (status, err) == (0, "")
    assert out.startswith("Usage: isthmus")


def test_a_status_that_the_command_chose_is_kept(monkeypatch, capsys):
    assert run_as_script(monkeypatch, capsys, "--number", "7")[0] == 7


def test_an_interrupt_is_status_130(monkeypatch, capsys):
    status, out, err = run_as_script(monkeypatch, capsys, "--number", "3")
    assert (status, out, err.strip()) == (130, "", "error: interrupted")


SCRIPT = """
import click, sys
from common.command import run_cli, run_command
from common.errors import UserError

@click.command("script")
@click.option("--debug", is_flag=True)
@click.argument("what")
def script(debug, what):
    def work():
        if what == "user":
            raise UserError("give another")
        if what == "defect":
            raise ValueError("a defect")
        while True:
            print("line", flush=True)
    run_command(work, debug=debug)

run_cli(script)
"""


def run_script(*arguments, **options):
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


@pytest.mark.parametrize(
    ("arguments", "status", "last", "traceback"),
    [
        (["user"], 2, "error: give another", False),
        (["user", "--debug"], 2, "error: give another", True),
        (["defect"], 1, "ValueError: a defect", True),
    ],
)
def test_a_script_shows_a_traceback_for_a_defect_or_when_asked_to(arguments, status, last, traceback):
    with run_script(*arguments) as script:
        _, err = script.communicate(timeout=60)
    assert script.returncode == status
    assert err.splitlines()[-1] == last
    assert ("Traceback" in err) is traceback


@pytest.mark.skipif(sys.platform == "win32", reason="pipes break in another way there")
def test_a_reader_that_goes_away_ends_the_script_without_a_word():
    # As in a shell, where Python's own choice to ignore SIGPIPE makes a broken pipe an exception.
    assert signal.getsignal(signal.SIGPIPE) == signal.SIG_IGN
    with run_script("forever") as script:
        assert script.stdout.readline() == "line\n"
        script.stdout.close()
        assert script.stderr.read() == ""
    assert script.returncode == 1

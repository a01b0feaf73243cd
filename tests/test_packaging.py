"""The systemd unit: systemd takes it, and it asks of the server only what the server knows."""

import configparser
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest

from cloud.cli import cli

UNIT = Path(__file__).resolve().parents[1] / "packaging" / "cloud-server.service"


def unit():
    """The unit's sections, with options that come several times as lists."""
    text = UNIT.read_text(encoding="utf-8").replace("\\\n", " ")
    parser = configparser.RawConfigParser(strict=False, interpolation=None, delimiters=("=",))
    parser.optionxform = str
    parser.read_string(text)
    found = {name: dict(parser[name]) for name in parser.sections()}
    found["Service"]["LoadCredential"] = [
        line.partition("=")[2] for line in text.splitlines() if line.startswith("LoadCredential=")
    ]
    return found


def command():
    return shlex.split(unit()["Service"]["ExecStart"])


def test_systemd_takes_it_without_a_word(tmp_path):
    if sys.platform != "linux" or not (analyze := shutil.which("systemd-analyze")):
        pytest.skip("there is no systemd here")
    copy = tmp_path / UNIT.name
    # Its program is not installed where the tests run.
    copy.write_text(UNIT.read_text(encoding="utf-8").replace(command()[0], sys.executable), encoding="utf-8")
    done = subprocess.run([analyze, "verify", "--man=no", copy], capture_output=True, text=True, timeout=60)
    about_it = [line for line in (done.stdout + done.stderr).splitlines() if UNIT.name in line]
    assert about_it == []


def test_it_has_the_sections_that_a_service_has():
    assert list(unit()) == ["Unit", "Service", "Install"]
    assert unit()["Install"]["WantedBy"] == "multi-user.target"


def test_every_option_of_its_command_is_one_of_the_server():
    program, *arguments = command()
    assert Path(program).is_absolute()
    assert Path(program).name == "cloud-server"
    known = {name: option for option in cli.params for name in option.opts}
    given = dict(zip(arguments[::2], arguments[1::2], strict=True))
    assert sorted(given.keys() - known.keys()) == []
    for name in given:
        option = known[name]
        assert isinstance(option, click.Option)
        assert not option.is_flag
        assert option.expose_value


def test_the_server_takes_the_values_of_its_command(tmp_path):
    """Each as click reads it, with files in place of the credentials."""
    values = [value.replace("%d", str(tmp_path)).replace("%S", str(tmp_path)) for value in command()[1:]]
    for name in ("token", "cert", "key"):
        (tmp_path / name).write_text("any")
    (tmp_path / "isthmus").mkdir()
    context = cli.make_context("cloud-server", values)
    assert context.params["host"] == "0.0.0.0"
    assert context.params["port"] == 7433


def test_each_secret_is_loaded_and_used():
    loaded = [credential.partition(":")[0] for credential in unit()["Service"]["LoadCredential"]]
    assert loaded == ["token", "cert", "key"]
    assert [f"%d/{name}" for name in loaded] == [word for word in command() if word.startswith("%d/")]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("DynamicUser", "yes"),
        ("StateDirectory", "isthmus"),
        ("ProtectSystem", "strict"),
        ("NoNewPrivileges", "yes"),
        ("Restart", "on-failure"),
        ("KillSignal", "SIGTERM"),
        ("CapabilityBoundingSet", ""),
    ],
)
def test_it_is_confined_and_comes_back(key, value):
    assert unit()["Service"][key] == value


def test_what_it_keeps_lies_in_its_state_directory_and_a_drain_has_time():
    service = unit()["Service"]
    assert f"%S/{service['StateDirectory']}" in command()
    assert int(service["TimeoutStopSec"]) >= 120

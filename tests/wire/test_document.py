"""docs/protocol.md says what the program does: its tables are compared with the program's own."""

import re
from pathlib import Path

import pytest

from common.spec import STREAMS
from tests.wire.test_golden import GOLDEN
from wire.auth import CLIENT_TOKEN, REJOIN, REJOINED, RESUME, SERVER_TOKEN
from wire.codecs.layout import DTYPES
from wire.codecs.registry import always_on, codec_names
from wire.config import DEFAULT_LIMITS, PROTOCOL_VERSIONS, WireConfig
from wire.errors import RemoteProtocolError
from wire.frames import FRAME_FORMAT, HANDSHAKE_LIMITS, MAX_SPLIT
from wire.messages import MESSAGE_TYPES, RULES
from wire.outbox import _URGENT, NUMBERS
from wire.protocol import TRANSITIONS, Phase, Role
from wire.token_file import LEAST_TOKEN

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "protocol.md").read_text(encoding="utf-8")


def section(heading: str) -> str:
    """What stands between a heading and the next one."""
    match = re.search(rf"^#+ {re.escape(heading)}$(.*?)(?=^#+ |\Z)", TEXT, re.MULTILINE | re.DOTALL)
    assert match is not None, heading
    return match[1]


def table(text: str) -> list[list[str]]:
    """The first table's rows, without its head."""
    lines: list[str] = []
    for line in text.splitlines():
        if line.startswith("|"):
            lines.append(line)
        elif lines:
            break
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def quoted(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text)


def first_keys(text: str) -> list[str]:
    return [name for row in table(text) for name in quoted(row[0])]


@pytest.mark.parametrize("kind", MESSAGE_TYPES)
def test_fields_of_every_message_are_listed_in_their_order(kind: str) -> None:
    match = re.search(rf"^\*\*{kind}\*\*, (.*?)(?=^\*\*|^## )", TEXT, re.MULTILINE | re.DOTALL)
    assert match is not None
    assert first_keys(match[1]) == list(RULES[MESSAGE_TYPES[kind]])


@pytest.mark.parametrize("kind", MESSAGE_TYPES)
def test_sender_of_every_message_is_named(kind: str) -> None:
    senders = {role for rows in TRANSITIONS.values() for role in Role if kind in rows[role]}
    match = re.search(rf"^\*\*{kind}\*\*, (client|server|either)", TEXT, re.MULTILINE)
    assert match is not None
    assert match[1] == ("either" if len(senders) == 2 else senders.pop().value)


def test_phases_and_what_may_be_said_in_them_are_listed() -> None:
    listed: dict[tuple[Phase, Role], dict[str, Phase]] = {}
    for phase, *cells in table(section("Phases")):
        for role, cell in zip(Role, cells, strict=True):
            row = listed[Phase(phase), role] = {}
            for part in cell.split(";"):
                names, _, after = part.partition("→")
                row.update(dict.fromkeys(quoted(names), Phase(after.strip() or phase)))
    always = {"ping", "pong", "error", "bye"}
    for phase, rows in TRANSITIONS.items():
        for role, row in rows.items():
            assert listed[phase, role] == {kind: after for kind, after in row.items() if kind not in always}


def test_every_code_of_an_error_is_listed() -> None:
    listed = {code for row in table(section("Errors")) for code in quoted(row[0])}
    codes = {cls.code for cls in [RemoteProtocolError, *RemoteProtocolError.__subclasses__()]}
    of_sessions = {"unknown_session", "wrong_secret", "no_common_step", "session_exists"}
    of_servers = {"refused", "busy", "draining", "stopped", "internal_error", "tls_wanted"}
    assert listed == codes | of_sessions | of_servers


def test_rules_of_priority_name_every_message() -> None:
    urgent, ordering, ranked = re.findall(
        r"^\d\. (.*?)(?=^\d\. |\n\n)", section("Order and priority"), re.M | re.S
    )
    assert set(quoted(urgent)) == set(_URGENT)
    assert set(quoted(ranked)) == set(NUMBERS)
    assert set(quoted(ordering)) == set(MESSAGE_TYPES) - _URGENT - set(NUMBERS)


def test_numbers_are_those_of_the_program() -> None:
    assert f"version {PROTOCOL_VERSIONS[0]}, frame format {FRAME_FORMAT}" in TEXT
    assert (HANDSHAKE_LIMITS.max_header, HANDSHAKE_LIMITS.max_payload) == (4096, 0)
    assert "4096 bytes of header, no payload" in TEXT
    assert f"At most {MAX_SPLIT} frames" in TEXT
    assert (DEFAULT_LIMITS.max_header, DEFAULT_LIMITS.max_payload) == (1 << 20, 1 << 30)
    assert "1 MiB of header and 1 GiB of payload" in " ".join(TEXT.split())
    settings = WireConfig()
    assert f"has {settings.handshake_s:g} s for TLS and for the whole greeting" in TEXT
    assert f"has {settings.open_s:g} s to open or resume a job" in TEXT
    assert f"at most {settings.max_strangers} connections that are not welcomed yet" in TEXT
    for least, over in (
        (settings.least_bytes_per_s, settings.slow_s),
        (settings.least_bytes_per_s, settings.unread_s),
    ):
        assert f"at least {least} bytes/s, on average over {over:g} s" in " ".join(TEXT.split())
    assert f"at least {LEAST_TOKEN} bytes" in TEXT
    assert (settings.send_queue, settings.receive_queue, settings.close_s, settings.handshake_s) == (
        8,
        8,
        10,
        10,
    )


def test_proofs_are_made_as_they_are_described() -> None:
    made = {row[0]: quoted(row[2])[0] for row in table(section("Proofs"))}
    assert made == {
        "`proof.mac`": CLIENT_TOKEN.decode(),
        "`welcome.mac`": SERVER_TOKEN.decode(),
        "`resume.mac`": RESUME.decode(),
        "`rejoin.mac`": REJOIN.decode(),
        "`ready.mac`": REJOINED.decode(),
    }


def test_types_and_codecs_are_all_described() -> None:
    tensors = section("Tensors")
    (dtypes,) = [row[1] for row in table(tensors) if row[0] == "`dtype`"]
    assert quoted(dtypes) == list(DTYPES)
    headings = re.findall(r"^#### (.*)$", TEXT, re.MULTILINE)
    assert {name for heading in headings for name in quoted(heading)} == {*codec_names(), *always_on()}


def test_every_key_of_a_job_is_listed() -> None:
    spec = GOLDEN["open"]["message"]["spec"]
    job, model, optim = re.split(r"^\| `(?:model|optim)` key", section("The job's map"), flags=re.MULTILINE)
    assert first_keys(job) == list(spec)
    assert first_keys("| key" + model) == list(spec["model"])
    assert set(first_keys("| key" + optim)) == set(spec["optim"])
    (streams,) = [row[2] for row in table(job) if row[0] == "`codecs`"]
    assert quoted(streams) == list(STREAMS)

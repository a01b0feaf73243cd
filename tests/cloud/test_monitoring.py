"""Metrics count what they are told, apart for each server, and have names that stay."""

import json
import re
import threading
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from cloud.monitoring import REFUSALS, RESUMES, Monitor


def samples(monitor):
    """Every sample by name and labels."""
    _, text = monitor.metrics()
    return {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
    }


def value(monitor, name, **labels):
    return samples(monitor)[(f"isthmus_{name}", *sorted(labels.items()))]


@pytest.mark.parametrize(
    ("tell", "name", "labels", "expected"),
    [
        (lambda m: m.connected(), "connections_total", {}, 1),
        (lambda m: m.authentication_failed(), "authentication_failures_total", {}, 1),
        (lambda m: m.set_sessions(active=3, parked=2), "sessions", {"state": "active"}, 3),
        (lambda m: m.set_sessions(active=3, parked=2), "sessions", {"state": "parked"}, 2),
        (lambda m: m.stepped(0.3), "steps_total", {}, 1),
        (lambda m: m.stepped(0.3), "step_seconds_sum", {}, 0.3),
        (lambda m: m.stepped(0.3), "step_seconds_bucket", {"le": "0.5"}, 1),
        (lambda m: m.stepped(0.3), "step_seconds_bucket", {"le": "0.25"}, 0),
        (lambda m: m.transferred(received=10, sent=20), "received_bytes_total", {}, 10),
        (lambda m: m.transferred(received=10, sent=20), "sent_bytes_total", {}, 20),
        (lambda m: m.computed(1.5), "compute_seconds_total", {}, 1.5),
        (lambda m: m.checkpoint_written(2.0, ok=True), "checkpoint_writes_total", {"result": "ok"}, 1),
        (lambda m: m.checkpoint_written(2.0, ok=False), "checkpoint_writes_total", {"result": "failed"}, 1),
        (lambda m: m.checkpoint_written(2.0, ok=True), "checkpoint_write_seconds_sum", {}, 2),
        (lambda m: m.drain(), "draining", {}, 1),
        *((lambda m, r=r: m.refused(r), "refused_total", {"reason": r}, 1) for r in REFUSALS),
        *((lambda m, s=s: m.resumed(s), "resumes_total", {"source": s}, 1) for s in RESUMES),
    ],
)
def test_what_it_is_told_shows(tell, name, labels, expected):
    monitor = Monitor()
    if not name.endswith("_sum"):
        assert value(monitor, name, **labels) == 0  # and is there before anything happens
    tell(monitor)
    assert value(monitor, name, **labels) == pytest.approx(expected)


def test_what_a_client_says_becomes_no_label():
    monitor = Monitor()
    before = samples(monitor).keys()
    monitor.refused('a"reason\nof its own')
    assert samples(monitor).keys() == before
    assert value(monitor, "refused_total", reason="other") == 1


def test_two_servers_count_apart():
    one, other = Monitor("cpu"), Monitor("cuda:0")
    one.connected()
    assert (value(one, "connections_total"), value(other, "connections_total")) == (1, 0)
    devices = [dict(key[1:])["device"] for m in (one, other) for key in samples(m) if "build_info" in key[0]]
    assert devices == ["cpu", "cuda:0"]


def test_threads_lose_no_count():
    monitor = Monitor()

    def count():
        for _ in range(1000):
            monitor.transferred(received=1)

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert value(monitor, "received_bytes_total") == 4000


def test_health_tells_how_many_sessions_there_are_and_whether_more_are_welcome():
    monitor = Monitor()
    monitor.set_sessions(active=2, parked=1)
    is_well, text = monitor.health()
    found = json.loads(text)
    assert is_well
    assert (found["status"], found["sessions"], found["parked"]) == ("ok", 2, 1)
    assert found["uptime_s"] >= 0
    monitor.drain()
    is_well, text = monitor.health()
    assert not is_well
    assert json.loads(text)["status"] == "draining"


def test_every_metric_and_reason_is_described():
    text = (Path(__file__).parents[2] / "docs" / "operating.md").read_text(encoding="utf-8")
    _, exposed = Monitor().metrics()
    names = {line.split()[2] for line in exposed.decode().splitlines() if line.startswith("# TYPE isthmus_")}
    described = set(re.findall(r"`(isthmus_\w+)", text))
    assert {name for name in names if not name.endswith("_created")} == described
    assert {*REFUSALS, "other"} == set(re.findall(r"^\| `(\w+)` \| [^|]*\|$", text, re.MULTILINE))

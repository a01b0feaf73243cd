"""The trace file: valid, named, in order, both sides on one clock; a peer's events are checked."""

import json
import math
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.trace import LANES, Tracer, clock_offset_ns


def load(tracer: Tracer, path: Path) -> list[dict[str, Any]]:
    tracer.write(path)
    events: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    return events


def test_a_trace_of_both_sides_loads_with_every_lane_named_and_times_in_order(tmp_path: Path) -> None:
    cloud = Tracer("cloud")
    cloud.record("compute", "1F0", 5_000_300, 5_000_400)
    edge = Tracer("edge")
    for lane in reversed(LANES):
        edge.record(lane, "0F0", 1_000, 2_000, bytes=64)
    edge.record("loader", "batch 3", 500, 600)
    edge.merge("cloud", cloud.to_plain(), offset_ns=5_000_000)
    events = load(edge, tmp_path / "trace.json")

    processes = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    lanes = {(processes[e["pid"]], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert sorted(processes.values()) == ["cloud", "edge"]
    assert [lanes["edge", tid] for tid in range(1, len(LANES) + 2)] == [*LANES, "loader"]

    spans = [e for e in events if e["ph"] == "X"]
    assert all((processes[e["pid"]], e["tid"]) in lanes for e in spans)
    times = [e["ts"] for e in spans]
    assert times == sorted(times)
    assert times[0] == 0
    assert all(e["dur"] >= 0 for e in spans)
    assert [(processes[e["pid"]], e["name"], e["ts"], e["dur"]) for e in spans][:2] == [
        ("cloud", "1F0", 0.0, 0.1),
        ("edge", "batch 3", 0.2, 0.1),
    ]
    assert spans[2]["args"] == {"bytes": 64}


def test_nothing_recorded_is_still_a_trace(tmp_path: Path) -> None:
    assert [e["ph"] for e in load(Tracer("edge"), tmp_path / "trace.json")] == ["M"]


def test_a_tracer_that_is_not_enabled_records_nothing() -> None:
    tracer = Tracer("edge", enabled=False)
    tracer.record("compute", "0F0", 1, 2)
    with tracer.span("compute", "0F1"):
        pass
    tracer.merge("cloud", [["compute", "1F0", 1, 2, {}]], offset_ns=0)
    assert tracer.events == tracer.to_plain() == []


def test_a_span_covers_its_body_even_if_that_raises() -> None:
    tracer = Tracer("edge")
    with pytest.raises(RuntimeError), tracer.span("compute", "0F0", chunk=0):
        raise RuntimeError
    (event,) = tracer.events
    assert (event.lane, event.name, event.args) == ("compute", "0F0", {"chunk": 0})
    assert event.end_ns >= event.start_ns > 0


def test_threads_record_at_once_and_nothing_is_lost() -> None:
    tracer = Tracer("edge")
    start = threading.Barrier(4)

    def work(lane: str) -> None:
        start.wait()
        for i in range(500):
            tracer.record(lane, str(i), i, i + 1)

    threads = [threading.Thread(target=work, args=(lane,)) for lane in LANES[:4]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for lane in LANES[:4]:
        assert [event.start_ns for event in tracer.events if event.lane == lane] == list(range(500))


def test_cleared_events_are_shipped_once() -> None:
    tracer = Tracer("cloud")
    tracer.record("compute", "1F0", 1, 2)
    assert tracer.to_plain(clear=True) == [["compute", "1F0", 1, 2, {}]]
    assert tracer.to_plain() == []


def test_events_of_several_steps_gather_in_one_trace(tmp_path: Path) -> None:
    edge = Tracer("edge")
    for step in range(3):
        edge.merge("cloud", [["compute", f"1F{step}", step, step + 1, {}]], offset_ns=0)
    names = [e["name"] for e in load(edge, tmp_path / "trace.json") if e["ph"] == "X"]
    assert names == ["1F0", "1F1", "1F2"]


@pytest.mark.parametrize(
    "plain",
    [
        ["no event"],
        [["compute", "1F0", 1, 2]],
        [[1, "1F0", 1, 2, {}]],
        [["compute", "1F0", 2, 1, {}]],
        [["compute", "1F0", 1.0, 2.0, {}]],
        [["compute", "1F0", True, 2, {}]],
        [["compute", "1F0", 1, 2, {"a": []}]],
        [["compute", "1F0", 1, 2, {"a": math.nan}]],
        [["compute", "1F0", 1, 2, {3: 4}]],
    ],
)
def test_a_peer_s_events_are_checked_and_taken_whole_or_not_at_all(plain: list[Any], tmp_path: Path) -> None:
    edge = Tracer("edge")
    with pytest.raises(ValueError, match="a trace event"):
        edge.merge("cloud", [["compute", "1F0", 1, 2, {}], *plain], offset_ns=0)
    assert [e["ph"] for e in load(edge, tmp_path / "trace.json")] == ["M"]


@given(
    offset_ns=st.integers(-(10**18), 10**18), there_ns=st.integers(0, 10**9), work_ns=st.integers(0, 10**9)
)
def test_the_offset_is_exact_when_both_ways_take_as_long(offset_ns: int, there_ns: int, work_ns: int) -> None:
    sent_ns = 10**12
    received_ns = sent_ns + there_ns + offset_ns
    answered_ns = received_ns + work_ns
    back_ns = sent_ns + 2 * there_ns + work_ns
    assert clock_offset_ns(sent_ns, received_ns, answered_ns, back_ns) == offset_ns


def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "trace.json"
    Tracer("edge").write(path)
    old = path.read_bytes()

    def fail(source: str, target: Path) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("common.trace.os.replace", fail)
    tracer = Tracer("edge")
    tracer.record("compute", "0F0", 1, 2)
    with pytest.raises(OSError, match="no space"):
        tracer.write(path)
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]

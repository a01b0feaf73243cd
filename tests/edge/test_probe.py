"""How fast both sides are, as a comparison with this machine."""

import json
import math
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.cost import ChunkCost, Message
from common.trace import Tracer
from edge.probe import Steps
from edge.speeds import Speeds
from wire.errors import RemoteProtocolError

LOCAL = ChunkCost(
    seconds={"0F": 1.0, "1F": 2.0, "2T": 3.0, "1B": 4.0, "0B": 5.0},
    messages={
        "0F": Message(size_bytes=10, encode_s=0.1, decode_s=0.2),
        "1F": Message(size_bytes=20, encode_s=0.3, decode_s=0.4),
        "2T": Message(size_bytes=30, encode_s=0.5, decode_s=0.6),
        "1B": Message(size_bytes=40, encode_s=0.7, decode_s=0.8),
    },
)


def test_each_side_s_work_takes_its_own_time():
    scaled = Speeds(edge=2, cloud=10, edge_codecs=3, cloud_codecs=5).scaled(LOCAL)
    assert scaled.seconds == {"0F": 2, "1F": 20, "2T": 6, "1B": 40, "0B": 10}
    assert [message.size_bytes for message in scaled.messages.values()] == [10, 20, 30, 40]
    # What goes up the edge encodes and the cloud decodes.
    encoded = [scaled.messages[kind].encode_s for kind in ("0F", "2T", "1F", "1B")]
    assert encoded == pytest.approx([0.3, 1.5, 1.5, 3.5])
    decoded = [scaled.messages[kind].decode_s for kind in ("0F", "2T", "1F", "1B")]
    assert decoded == pytest.approx([1.0, 3.0, 1.2, 2.4])


SHARES = st.floats(1e-3, 1e3)


@given(speeds=st.builds(Speeds, edge=SHARES, cloud=SHARES, edge_codecs=SHARES, cloud_codecs=SHARES))
def test_what_was_scaled_compares_as_it_was_scaled(speeds):
    found = Speeds.between(speeds.scaled(LOCAL), LOCAL)
    assert vars(found) == pytest.approx(vars(speeds))


def test_what_was_not_measured_is_taken_for_this_machine_s():
    silent = replace(LOCAL, seconds={**LOCAL.seconds, "1F": 0.0, "1B": 0.0})
    assert Speeds.between(silent, LOCAL).cloud == 1
    nothing = ChunkCost(seconds=LOCAL.seconds, messages=dict.fromkeys(LOCAL.messages, Message()))
    assert Speeds.between(LOCAL, nothing).edge_codecs == 1


def timeline(delay_s=0.02, clock_s=0.0, chunks=2, steps=3):
    """Two chunks a step, one after the other: 40 kB up and 10 down first, 20 kB up and 80 down then, at 8 and 4 Mbit/s.

    The first step takes ten times as long. The cloud's clock is off by so much.
    """
    tracer, cloud, now = Tracer("edge"), Tracer("cloud"), 0.0
    work = {"0F": 0.1, "1F": 0.2, "2T": 0.3, "1B": 0.4, "0B": 0.5}
    ways = {"0F": (40_000, 8e6), "1F": (10_000, 4e6), "2T": (20_000, 8e6), "1B": (80_000, 4e6)}

    def does(on, lane, name, seconds, **args):
        nonlocal now
        ahead_s = clock_s if on is cloud else 0.0
        on.record(lane, name, int((now + ahead_s) * 1e9), int((now + ahead_s + seconds) * 1e9), **args)
        now += seconds

    for step in range(steps):
        slow = 10 if step == 0 else 1
        for chunk in range(chunks):
            for kind, seconds in work.items():
                side = cloud if kind[0] == "1" else tracer
                if kind != "0F":
                    does(side, "decode", f"{kind}{chunk}", 0.02 * slow)
                does(side, "compute", f"{kind}{chunk}", seconds * slow)
                if kind in ways:
                    size, rate = ways[kind]
                    does(side, "encode", f"{kind}{chunk}", 0.01 * slow)
                    # The kernel takes it at once, whatever the link does.
                    does(side, "send", f"{kind}{chunk}", 1e-6, bytes=size)
                    now += (size * 8 / rate + delay_s) * slow - 1e-6
    tracer.merge("cloud", cloud.to_plain(), offset_ns=0)
    with TemporaryDirectory() as folder:
        tracer.write(Path(folder, "timeline"))
        return json.loads(Path(folder, "timeline").read_text())["traceEvents"]


def test_a_timeline_tells_what_work_and_ways_take():
    steps = Steps.of_timeline(timeline(), 0.02)
    assert steps.cost.seconds == pytest.approx({"0F": 0.1, "1F": 0.2, "2T": 0.3, "1B": 0.4, "0B": 0.5})
    assert {kind: message.size_bytes for kind, message in steps.cost.messages.items()} == {
        "0F": 40_000,
        "1F": 10_000,
        "2T": 20_000,
        "1B": 80_000,
    }
    for message in steps.cost.messages.values():
        assert (message.encode_s, message.decode_s) == pytest.approx((0.01, 0.02))
    assert steps.link.up_bit_s == pytest.approx(8e6, rel=1e-3)
    assert steps.link.down_bit_s == pytest.approx(4e6, rel=1e-3)
    assert steps.link.delay_s == 0.02
    assert steps.moving_s == pytest.approx(0.04 + 0.02 + 0.02 + 0.16, rel=1e-3)


@pytest.mark.parametrize("clock_s", [-0.005, 0.005])
def test_clocks_that_differ_a_little_change_little(clock_s):
    steps = Steps.of_timeline(timeline(clock_s=clock_s), 0.02)
    assert steps.link.up_bit_s == pytest.approx(8e6, rel=0.25)
    assert steps.link.down_bit_s == pytest.approx(4e6, rel=0.1)


def test_clocks_that_differ_a_lot_make_no_way_shorter_than_none():
    steps = Steps.of_timeline(timeline(clock_s=-5), 0.02)
    assert math.isfinite(steps.link.up_bit_s)
    assert steps.moving_s > 0


def test_a_server_that_tells_nothing_is_told_so():
    spans = [span for span in timeline() if span["ph"] != "X" or span["pid"] == 1]
    with pytest.raises(RemoteProtocolError, match="timeline lacks what came of 0F"):
        Steps.of_timeline(spans, 0.02)


def test_what_a_server_calls_its_events_names_nobody():
    spans = timeline()
    cloud = next(span for span in spans if span["ph"] == "X" and span["pid"] == 2)
    named = {**cloud, "name": "process_name", "args": {}}
    assert Steps.of_timeline([*spans, named], 0.02) == Steps.of_timeline(spans, 0.02)


@pytest.mark.parametrize("said", [None, "many", -1, 0, math.inf, 10**400])
def test_whatever_a_server_says_that_it_sent_there_is_a_link(said):
    spans = timeline()
    for span in spans:
        if span["ph"] == "X" and span["pid"] == 2 and span["cat"] == "send":
            span["args"] = {} if said is None else {"bytes": said}
    steps = Steps.of_timeline(spans, 0.02)
    assert 0 < steps.link.down_bit_s < math.inf
    assert steps.link.up_bit_s == pytest.approx(8e6, rel=1e-3)

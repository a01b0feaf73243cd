"""What a run tells of itself: metrics, the timeline, and what people see."""

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.system.counting_relay import counting_relay
from tests.system.processes import TINY, events, run, serving, train
from tests.system.terminal import on_terminal

STEP_KEYS = [
    *("event", "step", "epoch", "loss", "step_s", "samples_per_s"),
    *("up_bytes", "down_bytes", "dense_bytes", "compress_rate"),
]
EVAL_KEYS = ["event", "step", "loss", "accuracy"]
SUMMARY_KEYS = [
    *("event", "steps", "median_step_s", "up_bytes", "down_bytes", "compress_rate", "reconnects"),
    *("link_busy", "edge_busy", "cloud_busy"),
]


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with serving("--import", "dropout_model") as (server, address):
        yield address
        assert "Traceback" not in server.err


# The metrics file.


@pytest.fixture(scope="module")
def measured(address: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], int, int]:
    """The lines of a run of six steps in two epochs, and the bytes that a relay counted up and down."""
    metrics = tmp_path_factory.mktemp("run") / "metrics.jsonl"
    with counting_relay(address) as relay:
        limits = ("--train-limit", 20, "--epochs", 2, "--eval-every", 2, "--compress", "int8")
        ended = train(relay.address, *limits, "--metrics", metrics)
    assert ended.status == 0, ended
    return events(metrics), relay.up_bytes, relay.down_bytes


def test_every_line_has_the_keys_that_programs_read(measured: Any) -> None:
    lines, _, _ = measured
    expected = {"step": STEP_KEYS, "eval": EVAL_KEYS, "summary": SUMMARY_KEYS}
    assert [line["event"] for line in lines] == [*["step", "step", "eval"] * 3, "summary"]
    for line in lines:
        assert list(line) == expected[line["event"]]
        assert None not in line.values()


def test_steps_and_epochs_are_numbered(measured: Any) -> None:
    steps = [line for line in measured[0] if line["event"] == "step"]
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
    assert [line["epoch"] for line in steps] == [0, 0, 0, 1, 1, 1]
    assert [line["step"] for line in measured[0] if line["event"] == "eval"] == [2, 4, 6]


def test_numbers_of_a_step_fit_together(measured: Any) -> None:
    for line in measured[0]:
        if line["event"] == "step":
            assert line["compress_rate"] == (line["up_bytes"] + line["down_bytes"]) / line["dense_bytes"]
            samples = round(line["samples_per_s"] * line["step_s"])
            assert samples == (4 if line["step"] % 3 == 0 else 8)
            assert (
                line["dense_bytes"] == samples * 2 * 2 * 8 * 8 * 8 * 4
            )  # both cuts, both ways, [8, 8, 8] fp32
            assert 0.25 < line["compress_rate"] < 0.5


def test_numbers_of_the_summary_fit_those_of_the_steps(measured: Any) -> None:
    *lines, summary = measured[0]
    steps = [line for line in lines if line["event"] == "step"]
    sums = {key: sum(line[key] for line in steps) for key in ("up_bytes", "down_bytes", "dense_bytes")}
    assert summary["steps"] == len(steps)
    assert sums["up_bytes"] < summary["up_bytes"]  # the handshake, the evaluations and the goodbye besides
    assert sums["down_bytes"] < summary["down_bytes"]
    assert summary["compress_rate"] == (sums["up_bytes"] + sums["down_bytes"]) / sums["dense_bytes"]
    assert (
        min(line["step_s"] for line in steps)
        <= summary["median_step_s"]
        <= max(line["step_s"] for line in steps)
    )
    assert summary["reconnects"] == 0
    assert all(0 < summary[key] <= 1 for key in ("link_busy", "edge_busy", "cloud_busy"))


def test_bytes_are_what_the_socket_carried(measured: Any) -> None:
    lines, up_bytes, down_bytes = measured
    assert (lines[-1]["up_bytes"], lines[-1]["down_bytes"]) == (up_bytes, down_bytes)


# The timeline.

Span = dict[str, Any]


class Timeline:
    """A trace file.

    Attributes:
        spans: in order of time, each with its side and lane.
    """

    def __init__(self, path: Path) -> None:
        self.events = json.loads(path.read_text())["traceEvents"]
        names = {
            (event["name"], event["pid"], event.get("tid")): event["args"].get("name")
            for event in self.events
            if event["ph"] == "M"
        }
        self.spans: list[Span] = [
            {
                **event,
                "side": names["process_name", event["pid"], None],
                "lane": names["thread_name", event["pid"], event["tid"]],
                "end": event["ts"] + event["dur"],
            }
            for event in self.events
            if event["ph"] == "X"
        ]

    def of(self, side: str, lane: str, name: str = "") -> list[Span]:
        """The spans of one lane whose name begins so."""
        return [
            s for s in self.spans if (s["side"], s["lane"]) == (side, lane) and s["name"].startswith(name)
        ]


@pytest.fixture(scope="module")
def timeline(address: str, tmp_path_factory: pytest.TempPathFactory) -> Timeline:
    trace = tmp_path_factory.mktemp("run") / "trace.json"
    big = ("--image-size", 64, "--batch-size", 32, "--chunks", 4, "--depth", 4, "--steps", 3)
    ended = train(address, *big, "--trace", trace)
    assert ended.status == 0, ended
    assert f"the timeline is in {trace}" in ended.out
    return Timeline(trace)


def test_trace_is_a_chrome_trace(timeline: Timeline) -> None:
    assert {event["ph"] for event in timeline.events} == {"M", "X"}
    for span in timeline.spans:
        assert {"name", "cat", "ph", "pid", "tid", "ts", "dur", "args"} <= span.keys()
        assert isinstance(span["pid"], int)
        assert isinstance(span["tid"], int)
        assert span["ts"] >= 0
        assert span["dur"] >= 0
    assert min(span["ts"] for span in timeline.spans) == 0


def test_trace_shows_every_chunk_of_every_step_on_both_sides(timeline: Timeline) -> None:
    counts = Counter((span["side"], span["lane"], span["name"]) for span in timeline.spans)
    for chunk in range(4):
        for side, computed, sent in (
            ("edge", ("0F", "2T", "0B"), ("0F", "2T")),
            ("cloud", ("1F", "1B"), ("1F", "1B")),
        ):
            assert [counts[side, "compute", f"{kind}{chunk}"] for kind in computed] == [3] * len(computed)
            # The cloud's last ones may be under way when it reports; they come with the next step.
            assert all(counts[side, "send", f"{kind}{chunk}"] >= 2 for kind in sent)


def test_clouds_spans_lie_within_their_step_on_the_edges_clock(timeline: Timeline) -> None:
    begins = timeline.of("edge", "compute", "0F0")
    ends = timeline.of("edge", "compute", "0B3")
    computed = [s for kind in ("1F", "1B") for s in timeline.of("cloud", "compute", kind)]
    inside = [
        [s for s in computed if begin["ts"] < s["ts"] and s["end"] < end["end"]]
        for begin, end in zip(begins, ends, strict=True)
    ]
    assert [len(spans) for spans in inside] == [8, 8, 8]


def test_sending_overlaps_computing(timeline: Timeline) -> None:
    computed = timeline.of("edge", "compute") + timeline.of("cloud", "compute")
    sent = timeline.of("edge", "send") + timeline.of("cloud", "send")
    assert any(s["ts"] < c["end"] and c["ts"] < s["end"] for s in sent for c in computed)


def test_both_sides_compute_at_once(timeline: Timeline) -> None:
    pairs = [(e, c) for e in timeline.of("edge", "compute") for c in timeline.of("cloud", "compute")]
    assert any(e["ts"] < c["end"] and c["ts"] < e["end"] for e, c in pairs)


def test_busy_shares_are_those_of_the_timeline(address: str, tmp_path: Path) -> None:
    trace, metrics = tmp_path / "trace.json", tmp_path / "metrics.jsonl"
    # With most of the weights in the middle, a step begins before the cloud has applied the one before.
    large = ("--server", address, "--model", "mobilenet_v2", "--image-size", 32, "--batch-size", 16)
    many = ("--chunks", 2, "--threads", 1, "--steps", 4, "--eval-every", 0)
    assert run("edge-client", *large, *many, "--trace", trace, "--metrics", metrics).status == 0
    timeline, lines = Timeline(trace), events(metrics)
    wall_s = sum(line["step_s"] for line in lines if line["event"] == "step")
    kinds = ("0F", "1F", "2T", "1B", "0B", "begin", "norm", "commit")
    for side in ("edge", "cloud"):
        spans = [span for kind in kinds for span in timeline.of(side, "compute", kind)]
        computed_s = sum(span["dur"] for span in spans) / 1e6
        assert lines[-1][f"{side}_busy"] == pytest.approx(computed_s / wall_s, rel=0.2), side


def test_server_without_a_trace_to_write_sends_none(address: str, tmp_path: Path) -> None:
    down_bytes = {}
    for name, options in (("traced", ("--trace", tmp_path / "trace.json")), ("plain", ())):
        metrics = tmp_path / f"{name}.jsonl"
        assert train(address, "--steps", 4, *options, "--metrics", metrics).status == 0
        down_bytes[name] = events(metrics)[-1]["down_bytes"]
    assert down_bytes["plain"] < down_bytes["traced"]


# What people see.


def test_without_a_terminal_progress_is_plain_lines(address: str) -> None:
    ended = train(address, "--epochs", 2, "--eval-every", 8)
    assert (ended.status, ended.err) == (0, "")
    first, *rest, last = ended.out.splitlines()
    assert first.startswith(
        "dropout_net on digits (64 training and 8 test samples, images of 16 px, 10 classes)"
    )
    assert "cut after stem and blocks" in first
    assert "the server computes on cpu" in first
    assert rest[0].startswith("epoch 1/2, step 1/16: loss ")
    assert any(line.startswith("epoch 2/2, step 16/16: loss ") for line in rest)
    assert re.fullmatch(r"done: 16 steps, test accuracy \d+\.\d\d%", last)
    assert sum(line.startswith("test after step ") for line in rest) == 2
    assert "\x1b" not in ended.out


def test_on_a_terminal_progress_is_live(address: str) -> None:
    with on_terminal("--server", address, *TINY, "--steps", 30, "--eval-every", 15) as terminal:
        status, shown = terminal.until_the_end()
    assert status == 0, shown
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown)
    assert "\x1b[?25l" in shown, "the cursor is hidden"
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l"), "and shown again"
    assert "\x1b[1A" in shown, "lines are drawn over"
    assert "step 30/30" in plain
    assert "samples/s" in plain
    assert "test after step 15: accuracy" in plain
    assert plain.rstrip().splitlines()[-1].startswith("done: 30 steps, test accuracy ")


def test_on_a_terminal_a_failure_is_still_one_line_below_the_display(address: str) -> None:
    with on_terminal("--server", address, *TINY, "--steps", 30, "--lr", "1e38") as terminal:
        status, shown = terminal.until_the_end()
    assert status == 1
    assert shown.rindex("error: the ") > shown.rindex("\x1b[?25h")
    assert shown.count("error: ") == 1

"""A plan: what is compared, how long steps would take, and which way is the one to take."""

import json
from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

import dropout_model  # noqa: F401  (registers its model)
from common.cost import Link
from common.errors import UserError
from edge.chunk_costs import ChunkCosts
from edge.cli import cli
from edge.opened import open_model
from edge.plan_report import ENOUGH, Row, figure, mildest
from edge.planner import PlanConfig, Planner
from edge.probe import Surroundings
from edge.speeds import Speeds
from tests.tiny_job import TINY_JOB

TINY = (
    "--model",
    "dropout_net",
    "--image-size",
    "16",
    "--batch-size",
    "8",
    "--chunks",
    "2",
    "--threads",
    "1",
)
TINY += ("--memory-format", "contiguous")
CUTS = ("stem", "blocks")


@pytest.fixture(autouse=True)
def as_it_was(monkeypatch, one_thread):
    """The process of the tests stays as it is."""
    monkeypatch.setattr("common.runtime.prepare_process", lambda: None)


def plan(*arguments):
    return CliRunner().invoke(cli, ["plan", *TINY, *arguments])


def reported(*arguments):
    done = plan("--json", *arguments)
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def planner(rate_bit_s, *, cloud=1.0, shared_cores=False):
    config = replace(TINY_JOB, threads=1)
    opened = open_model(config)
    link = Link(up_bit_s=rate_bit_s, down_bit_s=rate_bit_s)
    around = Surroundings(link=link, speeds=Speeds(cloud=cloud), shared_cores=shared_cores)
    return Planner(opened, config, ChunkCosts(opened, config), around)


def test_json_has_these_keys_and_types():
    report = reported(
        "--rate", "10", "--delay", "5", "--cloud-speed", "4", *("--cut", "stem", "--cut", "blocks")
    )
    assert report.keys() == {
        *("title", "link", "measured", "cloud_speed", "alone_s", "cuts", "rows", "moved", "best"),
    }
    assert report["link"] == {"up_bit_s": 1e7, "down_bit_s": 1e7, "delay_s": 0.005}
    assert report["measured"] is False
    assert report["cloud_speed"] == 4
    assert report["cuts"] == ["stem", "blocks"]
    assert [row["compress"] for row in report["rows"]] == [
        [spec] for spec in ("none", "fp16", "int8", "conv+int8", "conv2+int8")
    ]
    for row in report["rows"]:
        assert row.keys() == Row.__dataclass_fields__.keys()
        assert row["cuts"] == ["stem", "blocks"]
        assert row["samples_per_s"] == pytest.approx(8 / row["step_s"])
    assert report["best"] in report["rows"]
    assert report["moved"] == []  # the cuts were given


def test_on_a_slow_link_a_step_takes_what_its_bytes_take_and_less_where_they_are_fewer():
    slow = planner(1e5)
    none, int8 = slow.row(("none",), CUTS), slow.row(("int8",), CUTS)
    for row in (none, int8):
        link_s = max(row.up_bytes, row.down_bytes) * 8 / 1e5
        assert row.bound_by in ("up", "down")
        assert link_s < row.step_s < 2 * link_s  # fill and drain of two chunks
    assert int8.compress_rate < none.compress_rate / 3
    assert none.compress_rate == pytest.approx(1, abs=0.02)
    assert int8.step_s < none.step_s / 2


def test_a_faster_cloud_takes_its_share_of_the_time_and_no_other():
    slow, fast = planner(1e12), planner(1e12, cloud=0.01)
    before, after = slow.row(("none",), CUTS), fast.row(("none",), CUTS)
    assert before.cloud_s > before.edge_s / 10
    assert after.cloud_s < before.cloud_s / 10
    shared = planner(1e12, shared_cores=True).row(("none",), CUTS)
    assert shared.bound_by == "cores"
    assert shared.step_s >= shared.edge_s + shared.cloud_s


def test_a_slow_link_moves_the_cuts_to_where_less_crosses():
    report = reported("--rate", "1", "--compress", "none")
    (row,), (moved,) = report["rows"], report["moved"]
    # This model has no preset: cut after its first layer with its normalization, and before what pools.
    assert row["cuts"] == report["cuts"]
    assert moved["cuts"] == [report["cuts"][0], "head.0"]  # the pooled values are 64 times fewer
    assert moved["step_s"] < row["step_s"]
    assert report["best"] == moved
    text = plan("--rate", "1", "--compress", "none").stdout
    assert f"take: --compress none --cut {report['cuts'][0]} --cut head.0" in text


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        ((), 2, "say where the server is, to measure it: --server HOST:PORT; or what to assume: --rate"),
        (("--delay", "20"), 2, "--server HOST:PORT"),
        (("--server", "127.0.0.1:1", "--delay", "20"), 2, "--delay comes with --rate"),
        (
            ("--server", "127.0.0.1:1", "--cloud-speed", "2"),
            2,
            "--cloud-speed is for a plan without a server",
        ),
        (("--rate", "0"), 2, "--rate must be from"),
        (("--rate", "nan"), 2, "--rate must be from"),
        (("--rate", "10", "--compress", "int9"), 2, "int9"),
        (("--rate", "10", "--compress", "auto"), 2, "auto is for training alone"),
        (("--rate", "10", "--compress", "none", "--compress", "linear"), 2, "linear needs tokens"),
        (("--rate", "10", "--compress", "delta+int4"), 2, "--no-augment"),
        (("--rate", "10", "--cut", "stem"), 2, "two points"),
        (("--server", "127.0.0.1:1"), 1, "nothing is listening there"),
    ],
)
def test_what_cannot_be_is_one_line_that_says_what_to_do(arguments, status, said):
    done = plan(*arguments)
    assert done.exit_code == status, done.output
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert said in errors[0]
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("batch", "chunks", "sizes"), [(9, 8, (2, 2, 2, 2, 1)), (8, 2, (4, 4)), (7, 2, (4, 3))]
)
def test_a_batch_is_planned_in_the_chunks_that_it_will_be_cut_into(batch, chunks, sizes):
    assert sizes == tuple(len(chunk) for chunk in torch.zeros(batch).chunk(chunks))
    report = reported(
        *("--rate", "10", "--batch-size", str(batch), "--chunks", str(chunks), "--compress", "none"),
        *("--cut", "stem", "--cut", "blocks", "--depth", "64"),
    )
    (none,) = report["rows"]
    assert none["compress_rate"] == pytest.approx(1, abs=0.15)  # the heads of small messages come on top
    dense = batch * 2 * 8 * 8 * 8 * 4
    assert dense < none["up_bytes"] < dense + 2 * len(sizes) * 300
    assert none["depth"] <= chunks


@pytest.mark.parametrize(
    ("value", "written"),
    [(0.00123, "0.00123"), (2.849, "2.85"), (999.4, "999"), (999.9, "1000"), (12345.6, "12346")],
)
def test_figures_have_no_exponent(value, written):
    assert figure(value) == written


def test_fast_links_are_told_in_larger_units():
    text = plan("--rate", "1000", "--compress", "none", "--cut", "stem", "--cut", "blocks").stdout
    assert "link: 1 Gbit/s up, 1 Gbit/s down, 0 ms each way" in text


def row(step_s):
    return Row(
        compress=("none",),
        cuts=CUTS,
        step_s=step_s,
        samples_per_s=1,
        depth=1,
        bound_by="up",
        up_bytes=1,
        down_bytes=1,
        compress_rate=1,
        edge_s=1,
        cloud_s=1,
    )


@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=8))
def test_the_mildest_is_hardly_slower_than_the_fastest_and_nothing_milder_is(seconds):
    rows = [row(step_s) for step_s in seconds]
    best = mildest(rows)
    assert best.step_s <= ENOUGH * min(seconds)
    place = next(i for i, one in enumerate(rows) if one is best)
    assert all(step_s > ENOUGH * min(seconds) for step_s in seconds[:place])


def test_a_configuration_in_code_is_checked_too():
    with pytest.raises(UserError, match="say where the server is"):
        PlanConfig(training=TINY_JOB, asks_server=False)
    assert PlanConfig(training=TINY_JOB).link is None

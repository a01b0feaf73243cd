"""`edge-client flops`: its numbers as a table, as JSON and as a picture, and what it refuses."""

import json
import sys

import pytest
from click.testing import CliRunner

from common.choices import COUNTINGS
from common.errors import UserError
from common.flops import Counting
from common.model_spec import ModelSpec
from common.models import build_model
from edge.cli import cli
from edge.flops import FlopsConfig, count_flops, flops_command
from tests.tiny_text import write_model

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def one_thread(monkeypatch):
    """The process of the tests stays as it is."""
    monkeypatch.setattr("common.runtime.prepare_process", lambda: None)


def flops(*arguments):
    return CliRunner().invoke(cli, ["flops", *arguments])


def reported(*arguments):
    done = flops("--json", *arguments)
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def test_json_has_these_keys_and_types():
    report = reported("--image-size", "64", "--compress", "conv+int8", "--batch-size", "4")
    assert [part["name"] for part in report["partitions"]] == ["front", "middle", "back"]
    for part in report["partitions"]:
        assert part.keys() == {"name", "macs", "params"}
        assert type(part["macs"]) is type(part["params"]) is int
    assert report["cuts"] == [
        {"cut": 1, "name": "features.0.1", "shape": [4, 20, 10, 10], "dtype": "float32", "bytes": 32000},
        {"cut": 2, "name": "features.18.2", "shape": [4, 360, 2, 2], "dtype": "float32", "bytes": 23040},
    ]
    assert report["macs"] == sum(part["macs"] for part in report["partitions"])
    assert report["params"] == sum(part["params"] for part in report["partitions"])
    rest = {key: report[key] for key in report.keys() - {"partitions", "cuts", "macs", "params", "rate"}}
    assert rest == {
        "model": "mobilenet_v2",
        "image_size": 64,
        "tokens": None,
        "num_classes": 1000,
        "batch_size": 4,
        "compress": ["conv+int8"],
        "count": "true",
        "cut_points": ["features.0.1", "features.18"],
        "final_width": False,
    }


@pytest.mark.parametrize(("compress", "rate"), [("none", 1.0), ("conv", 0.097), ("conv2", 0.038)])
def test_defaults_are_those_of_the_published_table(compress, rate):
    assert reported("--compress", compress)["rate"] == pytest.approx(rate, abs=0.0006)


def test_published_counts_are_asked_for():
    middle = {
        count: reported("--compress", "conv", "--count", count)["partitions"][1]["macs"]
        for count in COUNTINGS
    }
    assert middle == pytest.approx({"true": 2.12e10, "published": 2.53e10}, rel=0.01)


VIT = ("--model", "vit_b_16", "--image-size", "32", "--batch-size", "2")


def test_linear_pairs_are_counted_on_both_sides():
    plain, narrow = reported(*VIT), reported(*VIT, "--compress", "linear:64,32")
    assert [cut["shape"] for cut in narrow["cuts"]] == [[2, 5, 64], [2, 32]]
    tokens, features = 2 * 5 * 768 * 64, 2 * 768 * 32
    added = [
        after["macs"] - before["macs"]
        for before, after in zip(plain["partitions"], narrow["partitions"], strict=True)
    ]
    assert added == [tokens, tokens + features, features]
    assert narrow["rate"] == pytest.approx((5 * 64 + 32) / (6 * 768))


def test_decay_is_counted_at_its_final_width_and_says_so():
    plain, narrow = (
        reported(*VIT),
        reported(*VIT, "--compress", "cut1=decay:rate=0.9,rate2=0.8,steps=300,iterations=2"),
    )
    assert [cut["shape"] for cut in narrow["cuts"]] == [[2, 3, 621], [2, 768]]
    assert narrow["final_width"] is True
    hidden, sequence = 2 * 5 * 768 * 621, 2 * 5 * 3 * 621
    assert narrow["partitions"][0]["macs"] - plain["partitions"][0]["macs"] == hidden + sequence
    done = flops(*VIT, "--compress", "cut1=decay")
    assert "decay is counted at its final width; training begins at the full one" in done.stdout
    assert "final width" not in flops(*VIT, "--compress", "linear").stdout


def test_every_way_of_counting_is_offered():
    assert {counting.value for counting in Counting} == set(COUNTINGS)


def test_parameters_without_a_bottleneck_are_the_plain_models():
    model = build_model(ModelSpec(name="resnet18", num_classes=7))
    report = reported("--model", "resnet18", "--num-classes", "7", "--image-size", "32")
    assert report["params"] == sum(p.numel() for p in model.parameters())


def test_cuts_are_where_they_are_asked_for():
    report = reported("--model", "resnet18", "--image-size", "32", "--cut", "relu", "--cut", "layer3")
    assert report["cut_points"] == ["relu", "layer3"]
    assert [cut["shape"] for cut in report["cuts"]] == [[64, 64, 16, 16], [64, 256, 2, 2]]


def test_every_tensor_of_a_cut_inside_a_block_is_listed():
    report = reported(
        "--model", "resnet18", "--image-size", "32", "--cut", "layer1.0.conv1", "--cut", "layer3"
    )
    assert [cut["cut"] for cut in report["cuts"]] == [1, 1, 2]


def test_the_table_shows_parts_and_cuts():
    done = flops("--image-size", "64", "--batch-size", "4")
    assert done.exit_code == 0
    for word in ("front", "middle", "back", "total", "4x32x32x32", "float32", "1.000 of the bytes"):
        assert word in done.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--model", "resnet5"), "unknown model 'resnet5'; close names: resnet50"),
        (("--cut", "features.0.1"), "give --cut twice"),
        (("--cut", "features.0.1", "--cut", "features.99"), "unknown cut 'features.99'"),
        (("--cut", "features.18", "--cut", "features.0.1"), "must come before cut 2"),
        (("--compress", "int9"), "unknown codec 'int9'"),
        (("--compress", "conv:1x99"), "kernel 99 of conv is larger than the map"),
        (
            ("--compress", "linear"),
            "linear needs tokens [B,S,H] or features [B,H], and [B,32,112,112] crosses cut 1",
        ),
        (("--batch-size", "0"), "--batch-size must be at least 1"),
        (("--image-size", "0"), "--image-size must be at least 1"),
        (("--image-size", "5000"), "the image size must be from 1 to 4096"),
        (("--num-classes", "0"), "the number of classes must be from 1"),
        (("--plot", "nowhere/a.png"), "there is no directory nowhere"),
        (("--import", "no_such_module_here"), "--import no_such_module_here"),
        (("--model", "inception_v3", "--image-size", "16"), "does not run on inputs of shape"),
    ],
)
def test_what_cannot_be_counted_is_one_line_and_status_2(arguments, words):
    done = flops(*arguments)
    assert done.exit_code == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert words in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_a_picture_is_drawn(tmp_path, capsys, suffix):
    pytest.importorskip("matplotlib")
    path = tmp_path / f"along.{suffix}"
    flops_command(FlopsConfig(image_size=32, compress=("conv",), plot=path))
    assert path.stat().st_size > 5000
    assert "front" in capsys.readouterr().out


def test_a_picture_shows_every_operation_and_the_cuts(tmp_path):
    report, along = count_flops(FlopsConfig(image_size=32, plot=tmp_path / "a.png"))
    assert along is not None
    assert sum(operation.macs for operation in along.operations) == report.macs
    assert [along.operations[cut].name for cut in along.cuts] == [cut.name for cut in report.cuts]
    assert [along.operations[cut].crossing_bytes for cut in along.cuts] == [cut.bytes for cut in report.cuts]


def test_an_unknown_format_of_pictures_is_answered_with_the_known(tmp_path):
    pytest.importorskip("matplotlib")
    with pytest.raises(UserError, match=r"Format 'xyz' is not supported .*png"):
        flops_command(FlopsConfig(image_size=32, plot=tmp_path / "a.xyz"))


def test_without_matplotlib_a_picture_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UserError, match=r"pip install 'isthmus\[plot\]'"):
        flops_command(FlopsConfig(image_size=32, plot=tmp_path / "a.png"))


def test_a_text_model_is_counted_from_its_configuration(tmp_path):
    model = write_model(tmp_path)
    report = reported("--model", model, "--max-length", "16", "--batch-size", "4", "--compress", "linear:8")
    assert (report["tokens"], report["image_size"], report["num_classes"]) == (16, None, 2)
    assert report["cut_points"] == ["bert.encoder.layer.0.attention", "bert.encoder.layer"]
    assert [(cut["cut"], cut["shape"], cut["dtype"]) for cut in report["cuts"]] == [
        (1, [4, 16], "bool"),
        (1, [4, 16, 8], "float32"),
        (2, [4, 16, 8], "float32"),
    ]
    tokens, hidden, inner = 4 * 16, 32, 48
    attention = tokens * 4 * hidden**2 + 2 * tokens * 16 * hidden
    feed_forward = tokens * 2 * hidden * inner
    pair = tokens * 2 * hidden * 8
    front, middle, back = (part["macs"] for part in report["partitions"])
    assert front == attention + pair // 2
    assert middle == attention + 2 * feed_forward + pair
    assert back == pair // 2 + 4 * (hidden**2 + 2 * hidden)


def test_a_picture_of_a_text_model_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    model = write_model(tmp_path / "model")
    reported("--model", model, "--max-length", "8", "--plot", str(tmp_path / "along.svg"))
    assert "</svg>" in (tmp_path / "along.svg").read_text()

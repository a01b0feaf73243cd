"""Settings are checked before anything is opened, and every refusal says what would be right."""

import contextlib
import dataclasses
import math
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import UserError
from edge.config import DEFAULT_PORT, TrainConfig, parse_address

PORTS = st.integers(1, 65535)
LABELS = st.text("abcdefghijklmnopqrstuvwxyz0123456789-", min_size=1, max_size=12)
NAMES = st.lists(LABELS, min_size=1, max_size=4).map(".".join)
V4 = st.ip_addresses(v=4).map(str)
V6 = st.ip_addresses(v=6).map(str)


def config(**changes):
    return TrainConfig(**{"server": "127.0.0.1:7433", **changes})


@settings(deadline=None)
@given(host=NAMES | V4, port=PORTS)
def test_a_host_and_a_port_come_apart(host, port):
    assert parse_address(f"{host}:{port}") == (host, port)


@settings(deadline=None)
@given(host=V6, port=PORTS)
def test_an_ipv6_address_in_brackets_comes_out_of_them(host, port):
    assert parse_address(f"[{host}]:{port}") == (host, port)
    assert parse_address(f"[{host}]") == (host, DEFAULT_PORT)


@settings(deadline=None)
@given(host=NAMES | V4)
def test_a_host_alone_has_the_default_port(host):
    assert parse_address(host) == (host, DEFAULT_PORT)


@pytest.mark.parametrize(
    "text",
    [
        *("", ":", ":7433", "host:", "host:0", "host:65536", "host:-1", "host:http", "host:7 433", "host:٣"),
        *("[]:1", "[::1", "host:1:2", "http://host:7433"),
    ],
)
def test_what_is_no_address_is_refused_with_one_that_is(text):
    with pytest.raises(UserError, match=r"is no address; give HOST:PORT, such as 10\.0\.0\.5:7433"):
        parse_address(text)
    with pytest.raises(UserError, match="is no address"):
        config(server=text)


@settings(deadline=None)
@given(host=V6)
def test_an_ipv6_address_without_brackets_is_ambiguous_and_refused(host):
    with pytest.raises(UserError, match="is no address"):
        parse_address(host)


@settings(deadline=None)
@given(text=st.text(max_size=30))
def test_any_text_is_an_address_or_refused(text):
    with contextlib.suppress(UserError):
        host, port = parse_address(text)
        assert host in text
        assert 1 <= port <= 65535


@pytest.mark.parametrize(
    ("field", "low"),
    [
        ("batch_size", 1),
        ("chunks", 1),
        ("epochs", 1),
        ("steps", 1),
        ("depth", 1),
        ("threads", 1),
        ("image_size", 1),
        ("num_classes", 1),
        ("train_limit", 1),
        ("test_limit", 1),
        ("eval_every", 0),
        ("seed", 0),
    ],
)
def test_a_number_below_its_range_is_refused_by_its_option_s_name(field, low):
    option = field.replace("_", "-")
    with pytest.raises(UserError, match=f"^--{option} must be at least {low}, not {low - 1}$"):
        config(**{field: low - 1})
    smallest = {"batch_size": {"chunks": 1}}.get(field, {})
    assert getattr(config(**{field: low, **smallest}), field) == low


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(TrainConfig) if f.default is None])
def test_what_is_left_open_may_be_none(field):
    assert getattr(config(**{field: None}), field) is None


def test_a_batch_has_a_sample_for_each_chunk():
    assert config(batch_size=8, chunks=8).chunks == 8
    with pytest.raises(UserError, match="a batch of 7 cannot be cut into 8 chunks: give --chunks 7 or fewer"):
        config(batch_size=7, chunks=8)


@pytest.mark.parametrize("cuts", [("a",), ("a", "b", "c")])
def test_a_model_is_cut_at_two_points_or_at_its_preset(cuts):
    with pytest.raises(UserError, match=f"two points, not {len(cuts)}"):
        config(cuts=cuts)
    assert config(cuts=("a", "b")).cuts == ("a", "b")
    assert config().cuts == ()


@pytest.mark.parametrize(
    ("field", "value", "choices"),
    [("amp", "fp8", "none, bf16, fp16"), ("memory_format", "NHWC", "auto, contiguous, channels_last")],
)
def test_an_unknown_choice_is_refused_with_those_there_are(field, value, choices):
    with pytest.raises(UserError, match=f"must be one of {choices}, not '{value}'"):
        config(**{field: value})


def test_one_compression_may_stand_without_a_tuple():
    assert config(compress="conv+int8") == config(compress=("conv+int8",))


@pytest.mark.parametrize("option", ["save", "trace", "metrics"])
def test_a_file_that_cannot_be_written_is_refused_before_training(option, tmp_path):
    with pytest.raises(UserError, match=f"^--{option} .*is a directory; name a file"):
        config(**{option: tmp_path})
    with pytest.raises(UserError, match=f"^--{option} .*there is no directory .*missing; create it first"):
        config(**{option: tmp_path / "missing" / "file"})
    assert getattr(config(**{option: tmp_path / "file"}), option) == tmp_path / "file"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("option", ["save", "trace"])
def test_what_is_no_file_is_not_replaced_by_one(option, tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(UserError, match=f"^--{option} .*is no regular file"):
        config(**{option: pipe})


def test_a_file_of_weights_may_have_any_ending(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert config(weights="good.st").weights == "good.st"
    Path("good.st").write_bytes(b"")
    assert config(weights="good.st").weights == "./good.st"
    assert config(weights="DEFAULT").weights == "DEFAULT"


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="may not be written"):
        config(save=tmp_path / "file")


def test_the_same_settings_at_another_server_differ_in_nothing_else():
    here = config(compress="int8", steps=3)
    there = here.at("cloud.example:1")
    assert there.server == "cloud.example:1"
    assert dataclasses.replace(there, server=here.server) == here
    with pytest.raises(UserError, match="is no address"):
        here.at("nowhere:none")


def test_the_defaults_are_good_for_an_address_alone():
    defaults = config()
    assert (defaults.batch_size, defaults.chunks, defaults.compress) == (64, 8, ("none",))
    assert defaults.batch_size % defaults.chunks == 0
    assert math.isfinite(defaults.momentum)

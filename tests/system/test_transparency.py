"""Invariant 1: split training equals unsplit training, bitwise on CPU."""

from pathlib import Path

import pytest
import torch

import dropout_model  # noqa: F401  (registers its model here too)
from edge.config import TrainConfig
from edge.trainer import TrainResult, train
from tests.system.conftest import CloudServer
from tests.system.processes import events
from tests.system.reference import Reference, train_unsplit

MOBILENET_PARTS = {"back": "classifier.0"}
DROPOUT_PARTS = {"front": "stem.0", "middle": "blocks.0", "back": "head.0"}
DROPOUT_CUTS = ("stem", "blocks")


def assert_bitwise_equal(result: TrainResult, reference: Reference, metrics: Path) -> None:
    lines = events(metrics)
    assert [line["loss"] for line in lines if line["event"] == "step"] == reference.losses
    assert result.state.keys() == reference.state.keys()
    for name, expected in reference.state.items():
        assert torch.equal(result.state[name], expected), name


@pytest.mark.parametrize("memory_format", ["contiguous", "channels_last"])
@pytest.mark.parametrize(("batch_size", "chunks"), [(8, 1), (8, 4), (10, 4)])
def test_mobilenet_trains_as_if_unsplit(
    cloud_server: CloudServer, tmp_path: Path, memory_format: str, batch_size: int, chunks: int
) -> None:
    config = TrainConfig(
        server=cloud_server.address,
        image_size=48,
        batch_size=batch_size,
        chunks=chunks,
        steps=3,
        lr=0.05,
        momentum=0.9,
        weight_decay=1e-4,
        threads=1,
        eval_every=2,
        test_limit=5,
        memory_format=memory_format,
        metrics=tmp_path / "metrics.jsonl",
    )
    result = train(config)
    reference = train_unsplit(
        config,
        image_size=48,
        parts=MOBILENET_PARTS,
        optimizer=torch.optim.SGD,
        options={"momentum": 0.9, "weight_decay": 1e-4},
        channels_last=memory_format == "channels_last",
    )
    assert_bitwise_equal(result, reference, tmp_path / "metrics.jsonl")


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_dropout_in_every_part_is_as_if_unsplit(
    cloud_server: CloudServer, tmp_path: Path, depth: int
) -> None:
    config = TrainConfig(
        server=cloud_server.address,
        model="dropout_net",
        cuts=DROPOUT_CUTS,
        image_size=24,
        batch_size=23,
        chunks=5,
        depth=depth,
        steps=8,
        optimizer="adamw",
        lr=0.01,
        weight_decay=0.05,
        train_limit=60,  # so that the second epoch's last batch is smaller
        threads=1,
        eval_every=3,
        test_limit=7,
        memory_format="contiguous",
        metrics=tmp_path / "metrics.jsonl",
    )
    result = train(config)
    reference = train_unsplit(
        config,
        image_size=24,
        parts=DROPOUT_PARTS,
        optimizer=torch.optim.AdamW,
        options={"weight_decay": 0.05},
        channels_last=False,
    )
    assert_bitwise_equal(result, reference, tmp_path / "metrics.jsonl")


def test_a_cut_inside_a_residual_block_is_as_if_unsplit(cloud_server: CloudServer, tmp_path: Path) -> None:
    config = TrainConfig(
        server=cloud_server.address,
        model="dropout_net",
        cuts=("blocks.1.conv", "blocks.4.norm"),  # two tensors cross each
        image_size=16,
        batch_size=9,
        chunks=2,
        steps=4,
        lr=0.05,
        threads=1,
        eval_every=0,
        memory_format="contiguous",
        metrics=tmp_path / "metrics.jsonl",
    )
    result = train(config)
    reference = train_unsplit(
        config,
        image_size=16,
        parts={"front": "stem.0", "middle": "blocks.1.norm", "back": "blocks.4.drop"},
        optimizer=torch.optim.SGD,
        options={"momentum": 0.9},
        channels_last=False,
    )
    assert_bitwise_equal(result, reference, tmp_path / "metrics.jsonl")


def test_clipping_by_global_norm_equals_torchs_own_on_the_whole_model(
    cloud_server: CloudServer, tmp_path: Path
) -> None:
    config = TrainConfig(
        server=cloud_server.address,
        model="dropout_net",
        cuts=DROPOUT_CUTS,
        image_size=24,
        batch_size=16,
        chunks=4,
        steps=5,
        lr=0.1,
        clip_norm=0.05,
        threads=1,
        eval_every=0,
        memory_format="contiguous",
        metrics=tmp_path / "metrics.jsonl",
    )
    result = train(config)
    reference = train_unsplit(
        config,
        image_size=24,
        parts=DROPOUT_PARTS,
        optimizer=torch.optim.SGD,
        options={"momentum": 0.9},
        channels_last=False,
        clip_norm=0.05,
    )
    for name, expected in reference.state.items():
        torch.testing.assert_close(result.state[name], expected, rtol=0, atol=1e-6, msg=name)

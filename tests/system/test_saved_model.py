"""The trained model belongs to the user: `--save` gives what the plain model loads, and what was reported of it."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from common.bottleneck import with_bottleneck
from common.model_spec import ModelSpec
from common.models import build_model
from common.partition import image_input, preset_cuts, split
from common.vision import models as vision_models
from common.weights import load_state, split_bottleneck
from edge.data.datasets import open_dataset
from edge.data.loader import eval_batches
from tests.system.processes import events, run, serving

SIZE = 32
JOB = (
    *("--image-size", SIZE, "--batch-size", 16, "--chunks", 2, "--steps", 4, "--lr", 0.05, "--threads", 1),
    *("--train-limit", 64, "--test-limit", 60),
)
Model = Callable[[Tensor], Tensor]


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with serving() as (server, address):
        yield address
        assert "Traceback" not in server.err


def trained(address: str, folder: Path, *arguments: object) -> tuple[Path, dict[str, Any]]:
    """Train; gives the file and the last evaluation's line."""
    saved, metrics = folder / "model.safetensors", folder / "metrics.jsonl"
    ended = run("edge-client", "--server", address, *JOB, *arguments, "--save", saved, "--metrics", metrics)
    assert (ended.status, ended.err) == (0, ""), ended
    lines = events(metrics)
    evaluation = [line for line in lines if line["event"] == "eval"][-1]
    assert f"test accuracy {evaluation['accuracy']:.2%}" in ended.out
    return saved, evaluation


def assert_gives(model: Model, evaluation: dict[str, Any]) -> None:
    """A model has the loss and the accuracy that were reported."""
    dataset = open_dataset("digits", seed=0, test_limit=60)
    losses, correct = [], 0
    with eval_batches(dataset.test, batch_size=60, image_size=SIZE, normalise=dataset.normalise) as batches:
        for batch in batches:
            with torch.inference_mode():
                logits = model(batch.inputs[0])
            losses.append(cross_entropy(logits, batch.labels).item())
            correct += int((logits.argmax(1) == batch.labels).sum())
    assert correct / 60 == evaluation["accuracy"]
    assert losses == [pytest.approx(evaluation["loss"], rel=1e-4)]


def plain(name: str) -> nn.Module:
    model = vision_models.get_model(name, weights=None, num_classes=10)
    assert isinstance(model, nn.Module)
    return model.eval()


@pytest.mark.parametrize("name", ["mobilenet_v2", "squeezenet1_1"])
def test_saved_model_loads_into_torchvisions_and_is_as_good_as_reported(
    address: str, tmp_path: Path, name: str
) -> None:
    saved, evaluation = trained(address, tmp_path, "--model", name)
    model = plain(name)
    model.load_state_dict(load_state(saved), strict=True)
    assert_gives(model, evaluation)


def test_saved_file_says_what_it_holds(address: str, tmp_path: Path) -> None:
    saved, _ = trained(address, tmp_path, "--model", "squeezenet1_1")
    with safe_open(saved, "pt") as file:
        assert file.metadata() == {"model": "squeezenet1_1", "steps": "4"}
        assert list(file.keys())
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ".jsonl"] == [saved.name]


def test_bottleneck_is_saved_beside_the_plain_model(address: str, tmp_path: Path) -> None:
    saved, evaluation = trained(address, tmp_path, "--compress", "conv")
    own, inserted = split_bottleneck(load_state(saved))
    plain("mobilenet_v2").load_state_dict(own, strict=True)
    assert inserted
    assert all(name.startswith("bottleneck.") for name in inserted)
    assert {tuple(name.split(".")[1:3]) for name in inserted} == {
        (cut, half) for cut in ("cut1", "cut2") for half in ("encoder", "decoder")
    }
    model = build_model(ModelSpec(name="mobilenet_v2", num_classes=10))
    parts = with_bottleneck(
        split(model, preset_cuts("mobilenet_v2"), image_input(SIZE)), ("conv", "conv"), seed=0
    )
    for part in parts.partitions.values():
        part.load_state_dict({name: {**own, **inserted}[name] for name in part.state_dict()}, strict=True)
        part.eval()
    assert_gives(lambda images: parts.run(images)[0], evaluation)


def test_saved_model_of_a_lossy_link_is_as_good_as_reported_within_rounding(
    address: str, tmp_path: Path
) -> None:
    saved, evaluation = trained(address, tmp_path, "--model", "squeezenet1_1", "--compress", "fp16+lz4")
    model = plain("squeezenet1_1")
    model.load_state_dict(load_state(saved), strict=True)
    dataset = open_dataset("digits", seed=0, test_limit=60)
    with eval_batches(dataset.test, batch_size=60, image_size=SIZE, normalise=dataset.normalise) as batches:
        (batch,) = batches
    with torch.inference_mode():
        loss = cross_entropy(model(batch.inputs[0]), batch.labels).item()
    assert loss == pytest.approx(evaluation["loss"], rel=1e-2)

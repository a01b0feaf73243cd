"""Single-process training of the unsplit model, written plainly: what invariant 1 compares with.

It shares with the product what both must agree on (initial weights, data order, seeds) and nothing of what is
tested (partitions, stages, pipeline, link, optimizers).
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from common.model_spec import ModelSpec
from common.models import build_model
from common.seeding import derive_seed
from edge.config import TrainConfig
from edge.data.datasets import open_dataset
from edge.data.loader import train_batches


@dataclass
class Reference:
    losses: list[float]
    state: dict[str, Tensor]


def train_unsplit(
    config: TrainConfig,
    *,
    image_size: int,
    parts: dict[str, str],
    optimizer: type[torch.optim.Optimizer],
    options: dict[str, float],
    channels_last: bool,
    clip_norm: float | None = None,
) -> Reference:
    """Train as `config` says; `parts` names the first random module of each part, whose entry reseeds."""
    torch.set_num_threads(1)
    dataset = open_dataset(config.data, seed=config.seed, train_limit=config.train_limit)
    model = build_model(
        ModelSpec(
            name=config.model, num_classes=len(dataset.classes), seed=config.seed, image_size=image_size
        )
    ).train()
    if channels_last:
        model = model.to(memory_format=torch.channels_last)
    trained = optimizer(model.parameters(), lr=config.lr, **options)
    place = {"step": 0, "chunk": 0}
    for part, module in parts.items():
        reseed_on_entry(model.get_submodule(module), config.seed, part, place)
    losses = []
    assert config.steps is not None
    batches = train_batches(
        dataset.train,
        batch_size=config.batch_size,
        seed=config.seed,
        epoch=0,
        epochs=config.steps,
        image_size=image_size,
        normalise=dataset.normalise,
        augment=dataset.augment if config.augment else None,
        channels_last=channels_last,
    )
    with batches:
        for step, batch in zip(range(1, config.steps + 1), batches, strict=False):
            images, labels = batch.inputs[0], batch.labels
            total = 0.0
            for chunk, (x, y) in enumerate(
                zip(images.chunk(config.chunks), labels.chunk(config.chunks), strict=True)
            ):
                place.update(step=step, chunk=chunk)
                loss = cross_entropy(model(x), y)
                (loss * (len(y) / len(labels))).backward()
                total += loss.item() * len(y)
            if clip_norm is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
            trained.step()
            trained.zero_grad(set_to_none=True)
            losses.append(total / len(labels))
    return Reference(losses, {name: tensor.detach().clone() for name, tensor in model.state_dict().items()})


def reseed_on_entry(module: nn.Module, seed: int, part: str, place: dict[str, int]) -> None:
    """Seed as a stage does before each of its chunks, where a part draws its first random number."""

    def reseed(*_: object) -> None:
        torch.manual_seed(derive_seed(seed, place["step"], place["chunk"], part))

    module.register_forward_pre_hook(reseed)

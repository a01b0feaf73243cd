"""MobileNetV2 cut by hand where the preset cuts it, and a batch for it: what the references in plain torch share.

Nothing of Isthmus is used but its way to import torchvision.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd import backward

from common.vision import models

# What the product sets up by itself: glibc keeps freed memory.
MALLOC_HELP = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
}
# And OpenMP's threads wait without spinning for long, which serves two processes that share cores. A process
# that has them to itself is faster with the default, so what is measured alone goes without.
RUNTIME_HELP = MALLOC_HELP | {"GOMP_SPINCOUNT": "10000"}
CLASSES = 10


@dataclass
class Split:
    """The three partitions of MobileNetV2, each with its optimizer, and the boundary's shapes."""

    front: nn.Module
    middle: nn.Module
    back: nn.Module

    def __post_init__(self) -> None:
        parts = (self.front, self.middle, self.back)
        self.optimizers = [torch.optim.SGD(part.parameters(), lr=0.005, momentum=0.1) for part in parts]

    def step(self, *optimizers: int) -> None:
        """Apply and clear the gradients of some of the partitions: 0 front, 1 middle, 2 back."""
        for index in optimizers:
            self.optimizers[index].step()
            self.optimizers[index].zero_grad()


def split_mobilenet_v2(bottleneck: str = "none") -> Split:
    """Cut MobileNetV2 (10 classes, seed 0) by hand; ``conv`` inserts the default pair at each cut."""
    torch.manual_seed(0)
    model = models.mobilenet_v2(num_classes=CLASSES)
    convolution, normalization, _ = model.features[0]
    front: list[nn.Module] = [convolution, normalization]
    # Its own ReLU6 works in place, which a tensor just received and to be differentiated does not allow.
    middle: list[nn.Module] = [nn.ReLU6(), *model.features[1:]]
    back: list[nn.Module] = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), model.classifier]
    if bottleneck == "conv":
        front.append(nn.Conv2d(32, 20, 3, stride=3))
        middle.insert(0, nn.ConvTranspose2d(20, 32, 3, stride=3, output_padding=1))
        middle.append(nn.Conv2d(1280, 360, 1))
        back.insert(0, nn.ConvTranspose2d(360, 1280, 1))
    parts = [nn.Sequential(*part) for part in (front, middle, back)]
    for module in (module for part in parts for module in part.modules()):
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last)
    return Split(*parts)


def random_batch(arguments: argparse.Namespace) -> tuple[list[Tensor], list[Tensor]]:
    """One batch of random images and labels, already cut into chunks, images channels-last."""
    size = arguments.image_size
    images = torch.randn(arguments.batch_size, 3, size, size).to(memory_format=torch.channels_last)
    labels = torch.randint(CLASSES, (arguments.batch_size,))
    return list(images.chunk(arguments.chunks)), list(labels.chunk(arguments.chunks))


def boundary_shapes(split: Split, images: list[Tensor]) -> list[tuple[torch.Size, torch.Size]]:
    """Shapes at cut 1 and cut 2 of each chunk; also warms both partitions up."""
    shapes = []
    for x in images:
        h = split.front(x)
        y = split.middle(h)
        backward(split.back(y).sum())
        shapes.append((h.shape, y.shape))
    for optimizer in split.optimizers:
        optimizer.zero_grad()
    return shapes


def add_workload_options(parser: argparse.ArgumentParser) -> None:
    """Let a command line say what `random_batch` and the model are to be, and how many steps to take."""
    parser.add_argument("--bottleneck", choices=["none", "conv"], default="none")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--chunks", type=int, default=8)
    parser.add_argument("--warm-up", type=int, default=1, help="steps left out of the median")
    parser.add_argument("--steps", type=int, default=3)

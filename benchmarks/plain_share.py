"""One side's part of MobileNetV2's training in plain torch, with a given number of chunks in flight.

    python -m benchmarks.plain_share edge --in-flight 4      # prints its peak memory as JSON

What the product's process would hold without a link: the same partitions, batch and chunks, the same malloc
settings and memory format. The other side's tensors are made up as they are needed.
"""

from __future__ import annotations

import argparse
import json
import os
from collections import deque

import torch
from torch import Tensor
from torch.autograd import backward

from benchmarks.mobilenet_split import Split, split_mobilenet_v2
from benchmarks.process_memory import PEAK, status_bytes

STEPS = 3


def edge_step(split: Split, images: Tensor, chunks: int, in_flight: int) -> None:
    """One step of front and back."""
    held: deque[Tensor] = deque()
    for x in images.chunk(chunks):
        if len(held) == in_flight:
            _finish(held.popleft())
        held.append(split.front(x))
        y = _map(len(x), 1280, x.shape[-1] // 32).requires_grad_()
        backward(split.back(y).sum())
    while held:
        _finish(held.popleft())
    split.step(0, 2)


def cloud_step(split: Split, batch: int, size: int, chunks: int, in_flight: int) -> None:
    """One step of middle."""
    held: deque[Tensor] = deque()
    for _ in range(chunks):
        if len(held) == in_flight:
            _finish(held.popleft())
        held.append(split.middle(_map(batch // chunks, 32, size // 2).requires_grad_()))
    while held:
        _finish(held.popleft())
    split.step(1)


def _map(batch: int, channels: int, side: int) -> Tensor:
    return torch.randn(batch, side, side, channels).permute(0, 3, 1, 2)


def _finish(output: Tensor) -> None:
    backward(output, torch.randn_like(output))


def main() -> None:
    """Train a few steps and print the peak of resident memory, in bytes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("side", choices=["edge", "cloud"])
    parser.add_argument("--in-flight", type=int, required=True)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--chunks", type=int, default=8)
    arguments = parser.parse_args()
    split = split_mobilenet_v2()
    size, batch, chunks = arguments.image_size, arguments.batch_size, arguments.chunks
    if arguments.side == "edge":
        # The edge reads images: what that imports is no part of splitting.
        import sklearn.datasets

        sklearn.datasets.load_digits()
        images = torch.randn(batch, 3, size, size).to(memory_format=torch.channels_last)
    for _ in range(STEPS):
        if arguments.side == "edge":
            edge_step(split, images, chunks, arguments.in_flight)
        else:
            cloud_step(split, batch, size, chunks, arguments.in_flight)
    print(json.dumps({"peak_bytes": status_bytes(os.getpid(), PEAK)}))


if __name__ == "__main__":
    main()

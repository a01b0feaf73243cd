"""What a training step's compute alone takes: the split of MobileNetV2 in one process, in plain torch, no link.

    python -m benchmarks.plain_compute --bottleneck conv      # prints JSON

All cores work on one action at a time, so the sum over the actions is what both sides together need of them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.autograd import backward
from torch.nn.functional import cross_entropy

from benchmarks.mobilenet_split import (
    Split,
    add_workload_options,
    boundary_shapes,
    random_batch,
    split_mobilenet_v2,
)


@contextmanager
def timed(seconds: dict[str, list[float]], kind: str) -> Iterator[None]:
    """Add what the block takes to a kind's list of seconds."""
    began = time.perf_counter()
    yield
    seconds[kind].append(time.perf_counter() - began)


def local_step(
    split: Split, images: list[Tensor], labels: list[Tensor], seconds: dict[str, list[float]]
) -> None:
    """One step in this process alone; adds the seconds of each chunk's five actions and of the update."""
    for x, target in zip(images, labels, strict=True):
        share = len(target) / sum(map(len, labels))
        with timed(seconds, "0F"):
            h = split.front(x)
        with timed(seconds, "1F"):
            y = split.middle(h_in := h.detach().requires_grad_())
        with timed(seconds, "2T"):
            y_in = y.detach().requires_grad_()
            backward(cross_entropy(split.back(y_in), target) * share)
        with timed(seconds, "1B"):
            backward(y, y_in.grad)
        with timed(seconds, "0B"):
            backward(h, h_in.grad)
    with timed(seconds, "update"):
        split.step(0, 1, 2)


def measure(arguments: argparse.Namespace) -> dict[str, object]:
    """Train without a link: median seconds of a step and of each action; elements of a chunk at each cut."""
    split = split_mobilenet_v2(arguments.bottleneck)
    images, labels = random_batch(arguments)
    shapes = boundary_shapes(split, images)
    steps, seconds = [], defaultdict[str, list[float]](list)
    for step in range(arguments.warm_up + arguments.steps):
        if step == arguments.warm_up:
            seconds.clear()
        began = time.perf_counter()
        local_step(split, images, labels, seconds)
        steps.append(time.perf_counter() - began)
    return {
        "median_step_s": statistics.median(steps[arguments.warm_up :]),
        "action_s": {kind: statistics.median(each) for kind, each in seconds.items()},
        "cut_elements": [shape.numel() for shape in shapes[0]],
        "threads": torch.get_num_threads(),
    }


def main() -> None:
    """Measure and print one line of JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_workload_options(parser)
    print(json.dumps(measure(parser.parse_args())))


if __name__ == "__main__":
    main()

"""The usual way, as the reference to beat: the same split written plainly with torch.distributed on gloo.

MobileNetV2 is cut by hand (`benchmarks.mobilenet_split`); nothing of Isthmus is used but its way to import
torchvision. Two schedules of one step:

    gpipe        all forwards, then all backwards; sends overlap what follows, receives block
    sequential   one chunk after another: send, wait, receive

Both get the same help as the product: glibc keeps freed memory and OpenMP's threads do not spin for long
(`mobilenet_split.RUNTIME_HELP`, set by whoever starts this), tensors are channels-last, and each process uses
all cores.

    python -m benchmarks.gloo_split cloud --host 10.77.0.2 --device c0
    python -m benchmarks.gloo_split edge --host 10.77.0.2 --device e0 --schedule gpipe     # prints JSON
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
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

PORT = 29500
CLOUD, EDGE = 0, 1


def as_bytes_in_order(x: Tensor) -> Tensor:
    """The same memory as a contiguous tensor: channels-last maps are sent as they lie."""
    return x.permute(0, 2, 3, 1).contiguous() if x.dim() == 4 else x.contiguous()


def receive(shape: torch.Size, peer: int) -> Tensor:
    """Wait for a tensor of this logical shape; channels-last if it is a map."""
    if len(shape) != 4:
        dist.recv(x := torch.empty(shape), peer)
        return x
    batch, channels, height, width = shape
    dist.recv(x := torch.empty(batch, height, width, channels), peer)
    return x.permute(0, 3, 1, 2)


@dataclass
class Sender:
    """Sends that go on while the caller computes; each tensor is kept until it is away."""

    peer: int
    sent_bytes: int = 0
    pending: list[tuple[dist.Work, Tensor]] = field(default_factory=list)

    def send(self, x: Tensor) -> None:
        """Start sending a tensor."""
        x = as_bytes_in_order(x.detach())
        self.sent_bytes += x.numel() * x.element_size()
        work = dist.isend(x, self.peer)
        assert work is not None
        self.pending.append((work, x))

    def wait(self) -> None:
        """Wait until everything is away."""
        for work, _ in self.pending:
            work.wait()
        self.pending.clear()


@dataclass
class Edge:
    """The edge's half of a step: front, back and loss."""

    split: Split
    images: list[Tensor]
    labels: list[Tensor]
    shapes: list[tuple[torch.Size, torch.Size]]
    sender: Sender

    def forward(self, chunk: int) -> Tensor:
        """Front forward; the activations go to the cloud."""
        h = self.split.front(self.images[chunk])
        self.sender.send(h)
        assert isinstance(h, Tensor)
        return h

    def turn(self, chunk: int) -> None:
        """Back forward, loss, back backward; the gradients go to the cloud."""
        y = receive(self.shapes[chunk][1], CLOUD).requires_grad_()
        share = len(self.labels[chunk]) / sum(map(len, self.labels))
        backward(cross_entropy(self.split.back(y), self.labels[chunk]) * share)
        assert y.grad is not None
        self.sender.send(y.grad)

    def backward(self, chunk: int, h: Tensor) -> None:
        """Front backward, from the cloud's gradients."""
        backward(h, receive(self.shapes[chunk][0], CLOUD))

    def step(self, schedule: str) -> None:
        """One optimizer step over all chunks."""
        chunks = range(len(self.images))
        if schedule == "gpipe":
            outputs = [self.forward(chunk) for chunk in chunks]
            for chunk in chunks:
                self.turn(chunk)
            for chunk, h in zip(chunks, outputs, strict=True):
                self.backward(chunk, h)
        else:
            for chunk in chunks:
                h = self.forward(chunk)
                self.turn(chunk)
                self.backward(chunk, h)
        self.sender.wait()
        self.split.step(0, 2)


@dataclass
class Cloud:
    """The cloud's half of a step: middle."""

    split: Split
    shapes: list[tuple[torch.Size, torch.Size]]
    sender: Sender

    def forward(self, chunk: int) -> tuple[Tensor, Tensor]:
        """Middle forward; the activations go back to the edge."""
        h = receive(self.shapes[chunk][0], EDGE).requires_grad_()
        y = self.split.middle(h)
        self.sender.send(y)
        return h, y

    def backward(self, chunk: int, h: Tensor, y: Tensor) -> None:
        """Middle backward; the gradients go back to the edge."""
        backward(y, receive(self.shapes[chunk][1], EDGE))
        assert h.grad is not None
        self.sender.send(h.grad)

    def step(self, schedule: str) -> None:
        """One optimizer step over all chunks."""
        chunks = range(len(self.shapes))
        if schedule == "gpipe":
            outputs = [self.forward(chunk) for chunk in chunks]
            for chunk in chunks:
                self.backward(chunk, *outputs[chunk])
        else:
            for chunk in chunks:
                self.backward(chunk, *self.forward(chunk))
        self.sender.wait()
        self.split.step(1)


def over_gloo(arguments: argparse.Namespace) -> dict[str, object] | None:
    """Join the other process and train; the edge's measurements."""
    split = split_mobilenet_v2(arguments.bottleneck)
    images, labels = random_batch(arguments)
    shapes = boundary_shapes(split, images)
    os.environ["GLOO_SOCKET_IFNAME"] = arguments.device
    rank = EDGE if arguments.role == "edge" else CLOUD
    address = f"tcp://{arguments.host}:{arguments.port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    sender = Sender(peer=1 - rank)
    half = Edge(split, images, labels, shapes, sender) if rank == EDGE else Cloud(split, shapes, sender)
    times = []
    for _ in range(arguments.warm_up + arguments.steps):
        dist.barrier()
        sender.sent_bytes = 0
        began = time.perf_counter()
        half.step(arguments.schedule)
        times.append(time.perf_counter() - began)
    dist.destroy_process_group()
    if rank == CLOUD:
        return None
    steps = times[arguments.warm_up :]
    return {"median_step_s": statistics.median(steps), "step_s": steps, "up_bytes": sender.sent_bytes}


def main() -> None:
    """Run one role and print its measurements as one line of JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("role", choices=["edge", "cloud"])
    parser.add_argument("--host", default="127.0.0.1", help="where the cloud is")
    parser.add_argument("--port", type=int, default=PORT)
    parser.add_argument("--device", default="lo", help="network device that gloo uses")
    parser.add_argument("--schedule", choices=["gpipe", "sequential"], default="gpipe")
    add_workload_options(parser)
    arguments = parser.parse_args()
    result = over_gloo(arguments)
    if result is not None:
        print(json.dumps(result))


if __name__ == "__main__":
    main()

"""Where the middle computes, and how tensors get there and back without stopping it.

On a GPU three CUDA streams match the three lanes: compute, encode (ends in a copy to pinned host memory) and
decode (begins with a copy from it). Events order them, so that only the lane that needs a result waits for it.
On a CPU all of this is nothing.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from common.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class Placed:
    """Tensors on the device, and the event after which they are there (None on a CPU)."""

    tensors: tuple[Tensor, ...]
    ready: torch.cuda.Event | None = None


class Device:
    """One compute device.

    Args:
        gpu: the index of the GPU, or None for the CPU.

    Raises:
        UserError: there is no such GPU; says which there are.
    """

    def __init__(self, gpu: int | None) -> None:
        if gpu is not None:
            count = torch.cuda.device_count() if torch.cuda.is_available() else 0
            if not 0 <= gpu < count:
                found = f"it sees GPUs 0 to {count - 1}" if count else "torch sees no GPU on this machine"
                raise UserError(f"there is no GPU {gpu}: {found}; choose another --gpu, or --cpu")
        self.torch_device = torch.device("cpu") if gpu is None else torch.device("cuda", gpu)

    @property
    def is_cuda(self) -> bool:
        """Whether this is a GPU."""
        return self.torch_device.type == "cuda"

    @property
    def name(self) -> str:
        """What people call it, such as ``cpu`` or ``cuda:0 NVIDIA H200``."""
        if not self.is_cuda:
            return "cpu"
        return f"{self.torch_device} {torch.cuda.get_device_name(self.torch_device)}"

    def allocate(self, size: int) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
        """Allocate a receive buffer of `size` bytes: pinned on a GPU, so that copies from it are asynchronous."""
        if not self.is_cuda:
            return np.empty(size, np.uint8)
        return torch.empty(size, dtype=torch.uint8, pin_memory=True).numpy()


def first_gpu() -> int | None:
    """Return 0 where there is a GPU, else None."""
    return 0 if torch.cuda.is_available() else None


class LaneStreams:
    """The CUDA streams of one session's lanes; on a CPU every method is a plain call."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._compute = self._encode = self._decode = None
        if device.is_cuda:
            self._compute = torch.cuda.Stream(device.torch_device)
            self._encode = torch.cuda.Stream(device.torch_device)
            self._decode = torch.cuda.Stream(device.torch_device)

    def compute(self, work: Callable[..., Sequence[Tensor | None]], *inputs: Placed) -> Placed:
        """Run stage work on the compute stream, after its inputs are there.

        Args:
            work: takes the tensors of each input in turn, returns the results (None where there is none).
            inputs: from `decode` (or results of `compute`).

        Returns:
            The results that are not None, with the event after which they are valid.
        """
        with self._on(self._compute):
            for placed in inputs:
                self._await(self._compute, placed)
            results = work(*(placed.tensors for placed in inputs))
            return self._mark(self._compute, tuple(t for t in results if t is not None))

    @property
    def settle(self) -> Callable[[], object] | None:
        """Waits until the compute stream has done what it was given; None on a CPU, where work returns when done."""
        return None if self._compute is None else self._compute.synchronize

    def computing(self) -> AbstractContextManager[object]:
        """Run a block on the compute stream."""
        return self._on(self._compute)

    def encode(self, work: Callable[[tuple[Tensor, ...]], T], placed: Placed) -> T:
        """Run an encoder on the encode stream; what it returns lies in host memory when this returns."""
        with self._on(self._encode):
            self._await(self._encode, placed)
            result = work(placed.tensors)
            if self._encode is not None:
                self._encode.synchronize()
            return result

    def decode(self, work: Callable[[], tuple[Tensor, ...]]) -> Placed:
        """Run a decoder on the decode stream; no copy reads the host buffer any more when this returns.

        On a CPU the tensors may be views of it, and keep it.
        """
        with self._on(self._decode):
            placed = self._mark(self._decode, work())
            if self._decode is not None:
                self._decode.synchronize()
            return placed

    def _on(self, stream: torch.cuda.Stream | None) -> AbstractContextManager[object]:
        return nullcontext() if stream is None else _stream(self._device.torch_device, stream)

    @staticmethod
    def _await(stream: torch.cuda.Stream | None, placed: Placed) -> None:
        if stream is not None and placed.ready is not None:
            stream.wait_event(placed.ready)
            for tensor in placed.tensors:
                if tensor.is_cuda:
                    tensor.record_stream(stream)

    @staticmethod
    def _mark(stream: torch.cuda.Stream | None, tensors: tuple[Tensor, ...]) -> Placed:
        return Placed(tensors, None if stream is None else stream.record_event())


@contextmanager
def _stream(device: torch.device, stream: torch.cuda.Stream) -> Iterator[None]:
    # The current device and stream are per thread: set them where the work runs.
    with torch.cuda.device(device), torch.cuda.stream(stream):
        yield

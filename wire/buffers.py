"""Receive buffers that are used again once nothing refers to them any more.

A fresh buffer of some megabytes costs a page fault for every 4 KiB of it, which on a fast link takes as
long as receiving into it. `BufferPool` keeps what it allocated and hands a buffer out again when the last
memoryview, array or tensor over it is gone. It knows that from the reference count of the owning array, so
the receiver of a message releases the payload by dropping it: nothing to call, nothing to forget.

Work that the interpreter cannot see, such as an asynchronous copy to a GPU that still reads the buffer,
does not count as a reference: keep the payload until that work is done.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["ALIGNMENT", "Allocate", "BufferPool", "allocate_numpy"]

ALIGNMENT = 64
"""Payloads, and the tensors within them, start at multiples of this many bytes."""

Allocate = Callable[[int], Any]
"""Returns a writable, contiguous buffer of at least as many bytes as it is asked for."""

_POOLED_FROM = 32 * 1024  # below this malloc has no page faults to save
_KEPT_TAKES = 64  # a buffer that nobody needed during so many takes is given back


def allocate_numpy(nbytes: int) -> NDArray[np.uint8]:
    """Allocate `nbytes` of ordinary memory without zeroing it."""
    return np.empty(nbytes, dtype=np.uint8)


@dataclass(slots=True)
class _Block:
    owner: NDArray[np.uint8]
    size: int  # that was asked for, without what alignment takes
    skip: int  # bytes from its start to the first aligned one
    last_take: int


class BufferPool:
    """Hands out writable, 64-byte aligned memory; takes it back when nothing refers to it.

    Not thread-safe: one pool belongs to one connection. Dropping the memory is allowed in any thread.

    Args:
        allocate: where memory comes from; a server with a GPU passes one that returns pinned memory.
        max_buffers: how many buffers the pool remembers; what is out beyond that is not used again.
    """

    def __init__(self, allocate: Allocate = allocate_numpy, max_buffers: int = 16) -> None:
        self._allocate = allocate
        self._max_buffers = max_buffers
        self._blocks: dict[int, list[_Block]] = {}  # by size class
        self._count = 0
        self._takes = 0
        unused = _Block(np.empty(0, dtype=np.uint8), 0, 0, 0)
        self._idle_count = sys.getrefcount(unused.owner)  # measured, for it is not the same in every Python

    def take(self, nbytes: int) -> memoryview:
        """Return `nbytes` of writable memory with undefined contents, as a memoryview of bytes."""
        if nbytes < _POOLED_FROM:
            block = self._new(nbytes)
        else:
            self._takes += 1
            size = _size_class(nbytes)
            for block in self._blocks.get(size, ()):
                if sys.getrefcount(block.owner) == self._idle_count:
                    break
            else:
                block = self._new(size)
                self._remember(size, block)
            block.last_take = self._takes
        return block.owner.data[block.skip : block.skip + nbytes]

    @property
    def idle_bytes(self) -> int:
        """Bytes that are kept and that nobody refers to."""
        return sum(block.owner.nbytes for block in self._idle())

    def _new(self, nbytes: int) -> _Block:
        owner: NDArray[np.uint8] = np.frombuffer(self._allocate(nbytes + ALIGNMENT), dtype=np.uint8)
        return _Block(owner, nbytes, -owner.__array_interface__["data"][0] % ALIGNMENT, self._takes)

    def _idle(self) -> list[_Block]:
        blocks = [block for kept in self._blocks.values() for block in kept]
        return [block for block in blocks if sys.getrefcount(block.owner) == self._idle_count]

    def _remember(self, size: int, block: _Block) -> None:
        """Keep a new buffer; let go of idle ones that are too many or that nobody has needed for long."""
        idle = sorted(self._idle(), key=lambda block: block.last_take)
        for old in idle:
            if self._count >= self._max_buffers or old.last_take < self._takes - _KEPT_TAKES:
                kept = self._blocks[old.size]
                kept[:] = [other for other in kept if other is not old]
                self._count -= 1
        if self._count < self._max_buffers:
            self._blocks.setdefault(size, []).append(block)
            self._count += 1


def _size_class(nbytes: int) -> int:
    """Round up to one of eight sizes an octave, so that payloads of nearly one size share buffers."""
    step = 1 << max(nbytes.bit_length() - 4, 0)
    return -(-nbytes // step) * step

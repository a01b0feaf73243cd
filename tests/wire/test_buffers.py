"""Receive buffers that are used again."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wire.buffers import BufferPool, allocate_numpy

LARGE = 100_000


class Allocations:
    """Ordinary memory, and what was asked for."""

    def __init__(self, more: int = 0) -> None:
        self.sizes: list[int] = []
        self._more = more

    def __call__(self, nbytes: int) -> Any:
        self.sizes.append(nbytes)
        return np.empty(nbytes + self._more, np.uint8)


def address(view: memoryview) -> int:
    pointer: int = np.frombuffer(view, np.uint8).__array_interface__["data"][0]
    return pointer


def test_memory_is_writable_aligned_and_of_the_size_asked_for() -> None:
    pool = BufferPool()
    for nbytes in (1, 64, 100, 32_767, 32_768, 1_000_003):
        view = pool.take(nbytes)
        assert view.nbytes == nbytes
        assert not view.readonly
        assert address(view) % 64 == 0


def test_buffer_is_used_again_once_nobody_refers_to_it() -> None:
    allocations = Allocations()
    pool = BufferPool(allocations)
    for _ in range(10):
        view = pool.take(LARGE)
        view[0] = 1
        del view
    assert len(allocations.sizes) == 1


@pytest.mark.parametrize(
    "keep",
    [
        lambda view: view,
        lambda view: view[10:20],
        lambda view: view.cast("d"),
        lambda view: np.frombuffer(view, np.uint8),
        lambda view: torch.frombuffer(view, dtype=torch.float32),
        lambda view: torch.frombuffer(view, dtype=torch.float32).view(100, -1)[3],
    ],
    ids=["view", "slice", "cast", "array", "tensor", "row of a tensor"],
)
def test_buffer_is_not_used_again_while_something_refers_to_it(keep: Any) -> None:
    pool = BufferPool()
    view = pool.take(LARGE)
    place = address(view)
    kept = keep(view)
    del view
    assert address(pool.take(LARGE)) != place
    del kept
    assert pool.idle_bytes >= 2 * LARGE


def test_sizes_that_are_nearly_alike_share_buffers() -> None:
    allocations = Allocations()
    pool = BufferPool(allocations)
    for nbytes in (LARGE, LARGE - 1000, LARGE + 500, LARGE):
        pool.take(nbytes)
    assert len(allocations.sizes) == 1


def test_small_memory_is_not_kept() -> None:
    pool = BufferPool()
    pool.take(1000)
    assert pool.idle_bytes == 0


def test_pool_keeps_no_more_buffers_than_it_was_told() -> None:
    pool = BufferPool(max_buffers=3)
    views = [pool.take(LARGE) for _ in range(5)]
    del views
    assert pool.idle_bytes <= 3 * (LARGE + LARGE // 8 + 64)


def test_new_size_drives_out_the_buffer_that_was_idle_longest() -> None:
    allocations = Allocations()
    pool = BufferPool(allocations, max_buffers=2)
    for nbytes in (LARGE, 2 * LARGE, 4 * LARGE):
        pool.take(nbytes)
    allocations.sizes.clear()
    pool.take(4 * LARGE)
    pool.take(2 * LARGE)
    assert allocations.sizes == []
    pool.take(LARGE)
    assert len(allocations.sizes) == 1


def test_buffers_that_nobody_has_needed_for_long_are_let_go() -> None:
    pool = BufferPool()
    pool.take(10 * LARGE)
    for _ in range(100):
        pool.take(LARGE)
    pool.take(2 * LARGE)  # the pool looks around when it needs a new one
    assert pool.idle_bytes < 10 * LARGE


@pytest.mark.parametrize("more", [1, 4096, 10 * LARGE])
def test_allocator_may_give_more_than_it_was_asked_for(more: int) -> None:
    pool = BufferPool(Allocations(more), max_buffers=2)
    for nbytes in (LARGE, 2 * LARGE, 4 * LARGE, 8 * LARGE):
        assert pool.take(nbytes).nbytes == nbytes


def test_allocator_may_give_any_writable_buffer() -> None:
    for allocate in (bytearray, lambda nbytes: torch.empty(nbytes, dtype=torch.uint8).numpy()):
        view = BufferPool(allocate).take(LARGE)
        view[:3] = b"abc"
        assert address(view) % 64 == 0


def test_ordinary_allocator_gives_what_it_is_asked_for() -> None:
    assert allocate_numpy(1000).nbytes == 1000


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(30_000, 200_000), st.integers(0, 5)), max_size=60))
def test_memory_that_is_out_never_overlaps(takes: list[tuple[int, int]]) -> None:
    pool = BufferPool(max_buffers=4)
    out: list[memoryview] = []
    for nbytes, dropped in takes:
        view = pool.take(nbytes)
        start = address(view)
        for other in out:
            assert start + nbytes <= address(other) or address(other) + other.nbytes <= start
        out = [*out[dropped:], view]
        del view

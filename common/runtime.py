"""The process's own set-up, done before torch does any work: memory allocation, threads, what it used and may use.

glibc gives memory of 32 MB and more back to the system when it is freed, and from threads other than the
first nearly all of it: their arenas are cut into heaps of 64 MB. A training step frees and takes the same
hundreds of megabytes again and again, so every step pays for new pages: up to a million page faults a step
of MobileNetV2 (batch 64 at 224 px). `raise_malloc_thresholds` ends that; `benchmarks/cpu_compute.py`
measures it. `use_huge_pages` has the memory that is kept in pages of 2 MiB, which the processor finds faster.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import resource
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

__all__ = [
    "default_threads",
    "machine_bytes",
    "peak_rss_bytes",
    "prepare_process",
    "raise_malloc_thresholds",
    "release_memory",
    "rss_bytes",
    "set_threads",
    "use_huge_pages",
]

_log = logging.getLogger(__name__)

# From malloc.h: each parameter, its number, the environment variable that also sets it, and our value.
_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_THRESHOLD: Final = -3
_M_MMAP_MAX: Final = -4
_M_ARENA_MAX: Final = -8
_SETTINGS: Final = (
    # One arena for all threads: it alone grows without heaps of 64 MB. First, before threads make their own.
    (_M_ARENA_MAX, "MALLOC_ARENA_MAX", 1),
    # Tensors below 1 GiB come from memory that is kept, and all of it is kept, until `release_memory`. Any limit is
    # exceeded by some number of chunks in flight, and from there on every step pays for all its pages again.
    (_M_MMAP_THRESHOLD, "MALLOC_MMAP_THRESHOLD_", 1 << 30),
    (_M_TRIM_THRESHOLD, "MALLOC_TRIM_THRESHOLD_", -1),
)

_HUGE_PAGES: Final = Path("/sys/kernel/mm/transparent_hugepage")
_HUGE_PAGE_BYTES: Final = 2 << 20  # larger ones, of some processors, would take memory that nothing is in
_OVERCOMMIT: Final = Path("/proc/sys/vm/overcommit_memory")
_MADV_HUGEPAGE: Final = 14
_BLOCK_BYTES: Final = 512 << 20  # below the threshold from which a block is mapped by itself
_BLOCKS: Final = 16

_SPINS: Final = "10000"  # 0.1 to 0.2 ms: most waits within an operation are shorter, a time slice is longer

_asked_for_huge_pages = False  # by this process, as it was prepared


def prepare_process() -> None:
    """Do what a process that computes should do first, before torch is imported and threads start."""
    global _asked_for_huge_pages
    _asked_for_huge_pages = raise_malloc_thresholds() and use_huge_pages()
    wait_without_spinning()


def wait_without_spinning() -> None:
    """Let torch's threads sleep soon while they wait for each other, instead of keeping a core busy.

    GNU OpenMP spins for milliseconds by default. That is free on cores of one's own; where anything else runs, the
    spinning threads hold up the very ones that they wait for. Seen with both sides and other work on two cores:
    4 samples/s with the default, 30 with this. A user's own OMP_WAIT_POLICY or GOMP_SPINCOUNT stays.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", _SPINS)


def raise_malloc_thresholds() -> bool:
    """Make glibc keep freed memory for the next tensor instead of giving it back to the system.

    Call it first thing in a process, before threads start. A setting that the user has made by its
    environment variable (`MALLOC_ARENA_MAX` and so on) stays as it is.

    Returns:
        Whether it took effect; False, with a line in the log, where the C library is not glibc.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
        ctypes.CDLL(None).gnu_get_libc_version  # noqa: B018  (musl has a mallopt that does nothing)
    except (AttributeError, OSError, TypeError):
        _log.info("memory allocation is left as it is: this is not glibc")
        return False
    mallopt.argtypes, mallopt.restype = [ctypes.c_int, ctypes.c_int], ctypes.c_int
    for parameter, variable, value in _SETTINGS:
        if variable in os.environ or mallopt(parameter, value):
            continue
        # Older glibc takes no mmap threshold above 32 MB: there, no tensor at all is mapped by itself.
        if parameter != _M_MMAP_THRESHOLD or not mallopt(_M_MMAP_MAX, 0):
            _log.info("glibc refuses to set %s", variable.rstrip("_"))
            return False
    return True


def use_huge_pages() -> bool:
    """Ask the system to back glibc's heap, up to its first 8 GiB, with pages of 2 MiB.

    Most distributions' Linux gives them to whoever asks. glibc asks only where GLIBC_TUNABLES had
    `glibc.malloc.hugetlb` when the process started. So the heap is made to grow once, by blocks that are freed
    again: that takes addresses, but no memory. Call it after `raise_malloc_thresholds`, without which freed blocks
    go back to the system.

    A page takes its 2 MiB as soon as there is anything in it, and the system may put whole ones again where
    `release_memory` left holes.

    Returns:
        Whether the system was asked. Not where it gives such pages to all processes or to none, where they have
        another size, where it limits addresses or counts them as memory, and where a user set the thresholds.
    """
    if not _huge_pages_help():
        return False
    libc = ctypes.CDLL(None)
    malloc, free, madvise = libc.malloc, libc.free, libc.madvise
    malloc.argtypes, malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    free.argtypes, free.restype = [ctypes.c_void_p], None
    blocks = [block for _ in range(_BLOCKS) if (block := malloc(_BLOCK_BYTES)) is not None]
    page = resource.getpagesize()
    # A page more than the block, for the next one begins some bytes behind it.
    advised = [madvise(block // page * page, _BLOCK_BYTES + page, _MADV_HUGEPAGE) == 0 for block in blocks]
    for block in blocks:
        free(block)
    return any(advised)


def _huge_pages_help() -> bool:
    try:
        given = "[madvise]" in (_HUGE_PAGES / "enabled").read_text(encoding="ascii")  # to whoever asks
        size = int((_HUGE_PAGES / "hpage_pmd_size").read_text(encoding="ascii"))
        strict = _OVERCOMMIT.read_text(encoding="ascii").strip() == "2"
    except (OSError, ValueError):
        return False
    limits = {resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA)}
    # With the last of these, every block that malloc returns is written to, and so takes memory.
    by_user = {"MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_PERTURB_"} & os.environ.keys()
    roomy = sys.maxsize > 1 << 32 and limits == {resource.RLIM_INFINITY}
    return given and size == _HUGE_PAGE_BYTES and not strict and roomy and not by_user


def release_memory() -> None:
    """Give back to the system what the C library keeps of memory that is free; takes milliseconds.

    With the thresholds of `raise_malloc_thresholds` it gives nothing back by itself. Elsewhere than on glibc nothing
    happens.
    """
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    if _asked_for_huge_pages:
        use_huge_pages()  # for the heap has shrunk, and grows anew


def default_threads() -> int:
    """Count the cores that this process may use: its affinity, and its control group's quota rounded up."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        cores = min(cores, max(1, -(-int(quota) // int(period))))  # "max", for no quota, is a ValueError
    return cores


def set_threads(count: int | None = None) -> int:
    """Set how many threads one torch operation uses, in this thread and in those that first use torch later.

    A thread that computes calls it for itself. torch's own default counts the machine's cores where a
    container's quota allows fewer, and threads that wait for each other then run far slower than fewer would.

    Args:
        count: at least 1; None for `default_threads`.

    Returns:
        The count.

    Raises:
        ValueError: if count is less than 1.
    """
    import torch  # here, so that the rest can run before torch is loaded

    threads = default_threads() if count is None else count
    if threads < 1:
        raise ValueError(f"torch needs at least 1 thread, not {threads}")
    # A thread's first use of torch takes over the number last set anywhere: let that be now, then set ours.
    torch.get_num_threads()
    torch.set_num_threads(threads)
    return threads


def peak_rss_bytes() -> int:
    """Return the most memory this process has had resident so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB


def rss_bytes() -> int:
    """Return the memory this process has resident now; where /proc is missing, the most it has had."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except (OSError, ValueError, IndexError):
        return peak_rss_bytes()
    return pages * resource.getpagesize()


def machine_bytes(gpu: int | None = None, *, root: Path = Path("/")) -> int:
    """Return the memory that there is to compute in: the machine's or what its control group allows, or a GPU's.

    Args:
        gpu: index of the GPU; None for the CPU.
        root: where the system's files are.
    """
    if gpu is not None:
        import torch

        return int(torch.cuda.get_device_properties(gpu).total_memory)
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min((total, *_group_limits(root)))


def _group_limits(root: Path) -> Iterator[int]:
    """What the process's control groups, and those that they are part of, allow; of either version."""
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        number, kinds, path = line.split(":", 2)
        if number != "0" and "memory" not in kinds.split(","):
            continue
        below, name = ("", "memory.max") if number == "0" else ("memory", "memory.limit_in_bytes")
        top = root / "sys/fs/cgroup" / below
        group = top / path.lstrip("/")  # which a container may not see: then the top is its own
        for folder in (group, *group.parents):
            with contextlib.suppress(OSError, ValueError):
                yield int((folder / name).read_text(encoding="ascii"))  # "max", for no limit, is a ValueError
            if folder == top:
                break

"""The process's set-up: what it changes is seen from a process of its own."""

import ctypes
import json
import os
import resource
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from common import runtime
from common.runtime import (
    default_threads,
    machine_bytes,
    peak_rss_bytes,
    raise_malloc_thresholds,
    rss_bytes,
    set_threads,
)

GLIBC = hasattr(ctypes.CDLL(None), "gnu_get_libc_version")


def run_python(code: str, **env: str) -> Any:
    """Run code in a fresh interpreter and return what it prints, read as JSON."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], env=env, capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


# Frees and takes some blocks of 48 MB again and again on a thread, as a stage's compute thread does.
CHURN = """
    import ctypes, json, resource, threading
    from common.runtime import raise_malloc_thresholds
    {call}
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    faults = []
    def churn():
        for _ in range({times}):
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            blocks = [libc.malloc(48 << 20) for _ in range({blocks})]
            for block in blocks:
                ctypes.memset(block, 1, 48 << 20)
            for block in blocks:
                libc.free(block)
            faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    thread = threading.Thread(target=churn)
    thread.start()
    thread.join()
    print(json.dumps(faults[1:]))
"""


def faults(call: str, *, blocks: int = 1, times: int = 6) -> str:
    """The program that counts page faults, after a first call."""
    return CHURN.format(call=call, blocks=blocks, times=times)


@pytest.mark.skipif(not GLIBC, reason="only glibc has these settings")
def test_freed_memory_is_taken_again_without_page_faults() -> None:
    assert max(run_python(faults("assert raise_malloc_thresholds()"))) < 100


@pytest.mark.skipif(not GLIBC, reason="only glibc has these settings")
def test_more_than_two_gibibytes_are_taken_again_without_page_faults() -> None:
    assert max(run_python(faults("assert raise_malloc_thresholds()", blocks=45, times=2))) < 100


@pytest.mark.skipif(not GLIBC, reason="only glibc has these settings")
def test_glibc_alone_faults_every_page_in_again() -> None:
    assert min(run_python(faults(""))) > 48 * 2**20 // 65536


@pytest.mark.skipif(not GLIBC, reason="only glibc has these settings")
def test_a_setting_of_the_user_s_own_stays() -> None:
    call = faults("assert raise_malloc_thresholds()")
    assert min(run_python(call, MALLOC_MMAP_THRESHOLD_="1000000", MALLOC_MMAP_MAX_="65536")) > 100


# Takes 256 MiB of memory, and prints whether huge pages were asked for there and what asking took of memory.
HUGE = """
    import ctypes, json, pathlib, re
    from common import runtime
    def status(field):
        text = pathlib.Path("/proc/self/status").read_text()
        return int(re.search(field + r":\\s*(\\d+)", text)[1])
    before = status("VmHWM")
    {call}
    asking_kib = status("VmHWM") - before
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    middle = libc.malloc(256 << 20) + (128 << 20)
    text = pathlib.Path("/proc/self/smaps").read_text()
    for start, end, flags in re.findall(r"^([0-9a-f]+)-([0-9a-f]+) .*?^VmFlags:(.*?)$", text, re.M | re.S):
        if int(start, 16) <= middle < int(end, 16):
            print(json.dumps([" hg" in flags, asking_kib]))
"""
HELPFUL = GLIBC and runtime._huge_pages_help()


@pytest.mark.skipif(not HELPFUL, reason="here, no process need ask for huge pages, or none gets them")
@pytest.mark.parametrize("more", ["", "runtime.release_memory()"])
def test_a_prepared_process_has_asked_for_huge_pages_and_that_took_no_memory(more: str) -> None:
    asked, asking_kib = run_python(HUGE.format(call=f"runtime.prepare_process(); {more}"))
    assert asked
    assert asking_kib < 8 * 1024
    assert run_python(HUGE.format(call=more))[0] is False


@pytest.mark.skipif(not GLIBC, reason="only glibc has this heap")
@pytest.mark.parametrize(
    ("call", "env"),
    [
        ("resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))", {}),
        ("resource.setrlimit(resource.RLIMIT_DATA, (4 << 30, 4 << 30))", {}),
        ("", {"MALLOC_PERTURB_": "1"}),
        ("", {"MALLOC_MMAP_THRESHOLD_": "1000000"}),
    ],
)
def test_where_blocks_are_limited_or_take_memory_huge_pages_are_left(call: str, env: dict[str, str]) -> None:
    code = """
        import json, resource
        from common.runtime import use_huge_pages
        {call}
        print(json.dumps(use_huge_pages()))
    """
    assert run_python(code.format(call=call), **env) is False


@pytest.mark.skipif(not GLIBC, reason="only glibc has this heap")
@pytest.mark.parametrize(
    ("pages", "size", "overcommit", "wanted"),
    [
        ("always [madvise] never", "2097152", "0", True),
        ("[always] madvise never", "2097152", "0", False),
        ("always madvise [never]", "2097152", "0", False),
        ("always [madvise] never", "536870912", "0", False),
        ("always [madvise] never", "2097152", "2", False),
        ("always [madvise] never", "", "0", False),
    ],
)
def test_huge_pages_are_asked_for_only_where_that_helps(
    pages: str, size: str, overcommit: str, wanted: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, text in (("enabled", pages), ("hpage_pmd_size", size), ("overcommit", overcommit)):
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(runtime, "_HUGE_PAGES", tmp_path)
    monkeypatch.setattr(runtime, "_OVERCOMMIT", tmp_path / "overcommit")
    for name in ("MALLOC_PERTURB_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(runtime.resource, "getrlimit", lambda kind: (resource.RLIM_INFINITY,) * 2)
    assert runtime._huge_pages_help() is wanted


@pytest.mark.parametrize("libc", [object(), None])
def test_without_glibc_nothing_is_set_and_the_log_says_so(
    libc: object, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def load(name: None) -> object:
        if libc is None:
            raise OSError("no C library")
        return libc

    monkeypatch.setattr(runtime.ctypes, "CDLL", load)
    with caplog.at_level("INFO"):
        assert raise_malloc_thresholds() is False
    assert "this is not glibc" in caplog.text


PREPARED = """
    import json, os, sys
    from common.runtime import prepare_process
    prepare_process()
    print(json.dumps([os.environ.get("GOMP_SPINCOUNT"), "torch" in sys.modules]))
"""


def test_a_prepared_process_lets_waiting_threads_sleep_and_has_not_loaded_torch() -> None:
    assert run_python(PREPARED) == ["10000", False]


def test_how_threads_wait_stays_as_the_user_set_it() -> None:
    assert run_python(PREPARED, GOMP_SPINCOUNT="7") == ["7", False]
    assert run_python(PREPARED, OMP_WAIT_POLICY="ACTIVE") == [None, False]


def test_the_default_is_at_least_one_thread_and_at_most_the_cores() -> None:
    assert 1 <= default_threads() <= (os.cpu_count() or 1)


def test_a_cgroup_s_quota_limits_the_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime.os, "sched_getaffinity", lambda pid: set(range(64)), raising=False)
    monkeypatch.setattr(runtime.sys, "platform", "linux")
    for text, threads in (("150000 100000\n", 2), ("max 100000\n", 64), ("10000 100000\n", 1), ("", 64)):
        monkeypatch.setattr(runtime.Path, "read_text", lambda self, encoding, text=text: text)
        assert default_threads() == threads


def test_threads_hold_for_threads_that_start_later() -> None:
    code = """
        import json, threading, torch
        from common.runtime import set_threads
        seen = [set_threads(3), torch.get_num_threads()]
        thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        print(json.dumps(seen))
    """
    assert run_python(code) == [3, 3, 3]


def test_each_thread_keeps_its_own_count() -> None:
    code = """
        import json, threading, torch
        from common.runtime import set_threads
        seen, both_set = {}, threading.Barrier(2)
        def work(count):
            set_threads(count)
            both_set.wait()
            torch.ones(100_000).add_(1)  # the first operation, when torch would take over another's count
            seen[count] = torch.get_num_threads()
        threads = [threading.Thread(target=work, args=(count,)) for count in (1, 2)]
        for thread in threads: thread.start()
        for thread in threads: thread.join()
        print(json.dumps([seen[1], seen[2]]))
    """
    assert run_python(code) == [1, 2]


def test_fewer_than_one_thread_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1 thread"):
        set_threads(0)


def test_the_peak_is_no_less_than_what_is_resident() -> None:
    block = bytearray(64 << 20)
    assert rss_bytes() > len(block) // 2
    # The two counters are kept apart in the kernel and may differ by some pages.
    assert peak_rss_bytes() >= rss_bytes() - (8 << 20)


def test_resident_memory_falls_back_to_the_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime.Path, "read_text", lambda self, encoding: "")
    assert rss_bytes() == peak_rss_bytes()


# ---- how much memory there is ----


def write_files(root, files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_memory_is_the_machine_s_where_nothing_limits_it(tmp_path):
    whole = machine_bytes(root=tmp_path)
    assert whole > 1 << 28
    write_files(tmp_path, {"proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/a/memory.max": "max\n"})
    assert machine_bytes(root=tmp_path) == whole
    assert 1 << 20 < machine_bytes() <= whole


@pytest.mark.parametrize(
    ("cgroup", "limits", "expected"),
    [
        ("0::/a/b\n", {"a/b/memory.max": "max", "a/memory.max": "2000", "memory.max": "3000"}, 2000),
        ("0::/a/b\n", {"a/b/memory.max": "1000", "a/memory.max": "2000"}, 1000),
        # In a container the group's path is another's, and the top is its own.
        ("0::/docker/abc\n", {"memory.max": "5000"}, 5000),
        ("3:cpu:/x\n4:memory:/a\n0::/\n", {"memory/a/memory.limit_in_bytes": "700"}, 700),
        ("4:cpu,memory:/a\n", {"memory/memory.limit_in_bytes": "800"}, 800),
        ("4:cpu,memory:/a\n", {"memory/memory.limit_in_bytes": str((1 << 63) - 4096)}, None),
    ],
)
def test_memory_is_what_a_control_group_allows(tmp_path, cgroup, limits, expected):
    whole = machine_bytes(root=tmp_path)
    write_files(tmp_path, {"proc/self/cgroup": cgroup})
    write_files(tmp_path / "sys/fs/cgroup", {name: f"{text}\n" for name, text in limits.items()})
    assert machine_bytes(root=tmp_path) == (expected or whole)

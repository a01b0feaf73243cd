"""Two threads on two cores keep to one each while inside, and are free again outside."""

import os
import sys
import threading
from pathlib import Path

import pytest
import torch

from common import cores as cores_module
from common.cores import OwnCores
from common.runtime import set_threads

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="only Linux binds threads to cores"),
    pytest.mark.skipif(torch.accelerator.is_available(), reason="with a GPU nothing is bound"),
]


@pytest.fixture
def in_thread():
    """Runs a function in a thread of its own, on two cores and with two of torch's threads."""
    allowed, before = os.sched_getaffinity(0), torch.get_num_threads()
    if len(allowed) < 2:
        pytest.skip("one core")

    def run(work, cores=2, threads=2):
        made = []

        def start():
            set_threads(threads)
            made.append(work())

        os.sched_setaffinity(0, set(sorted(allowed)[:cores]))
        try:
            thread = threading.Thread(target=start)
            thread.start()
            thread.join()
        finally:
            os.sched_setaffinity(0, allowed)
        return made[0]

    yield run
    torch.set_num_threads(before)


def affinities(own):
    """Cores of this thread and of the one that helps it."""
    return os.sched_getaffinity(0), os.sched_getaffinity(own._other)


def test_each_thread_has_a_core_inside_and_both_outside(in_thread):
    def work():
        own = OwnCores(2)
        both = affinities(own)
        with own:
            inside = affinities(own)
        return both, inside, affinities(own)

    before, inside, after = in_thread(work)
    assert before == after
    assert len(before[0]) == 2
    assert before[0] == before[1]
    assert [len(cores) for cores in inside] == [1, 1]
    assert inside[0] | inside[1] == before[0]


def test_the_other_thread_is_the_one_that_takes_half_of_the_work(in_thread):
    def spent(thread):
        fields = Path(f"/proc/self/task/{thread}/schedstat").read_text(encoding="ascii").split()
        return int(fields[0])  # nanoseconds on a core

    def work():
        own = OwnCores(2)
        start = spent(own._other)
        a = torch.rand(512, 512)
        with own:
            for _ in range(20):
                a = torch.tanh(a @ a)
        return spent(own._other) - start

    assert in_thread(work) > 0


def test_an_error_inside_frees_both(in_thread):
    def work():
        own = OwnCores(2)
        with pytest.raises(RuntimeError, match="inside"), own:
            raise RuntimeError("inside")
        return affinities(own)

    assert [len(cores) for cores in in_thread(work)] == [2, 2]


@pytest.mark.parametrize("threads", [1, 3])
def test_other_numbers_of_threads_are_left_alone(in_thread, threads):
    def work():
        with OwnCores(threads):
            return os.sched_getaffinity(0)

    assert len(in_thread(work, threads=threads)) == 2


def test_a_process_with_one_core_is_left_alone(in_thread):
    def work():
        own = OwnCores(2)
        with own:
            return affinities(own)

    mine, other = in_thread(work, cores=1)
    assert mine == other
    assert len(mine) == 1


@pytest.mark.parametrize("failing", [0, 1])
def test_where_threads_may_not_be_bound_nothing_stays_bound_and_nothing_fails(
    in_thread, monkeypatch, failing
):
    bind, calls = os.sched_setaffinity, []

    def refuses(thread, cores):
        if threading.current_thread() is threading.main_thread():
            bind(thread, cores)
            return
        calls.append(thread)
        if len(calls) == failing + 1:
            raise PermissionError
        bind(thread, cores)

    def work():
        own = OwnCores(2)
        other = own._other
        with own:
            inside = os.sched_getaffinity(0)
        return inside, os.sched_getaffinity(0), os.sched_getaffinity(other)

    monkeypatch.setattr(cores_module.os, "sched_setaffinity", refuses)
    assert [len(cores) for cores in in_thread(work)] == [2, 2, 2]
    tried = len(calls)
    assert tried >= failing + 1


def test_where_the_core_is_not_told_nothing_is_bound(in_thread, monkeypatch):
    monkeypatch.setattr(cores_module, "_this_core", lambda: None)

    def work():
        own = OwnCores(2)
        with own:
            return affinities(own)

    assert [len(cores) for cores in in_thread(work)] == [2, 2]


def test_where_threads_are_not_listed_nothing_is_bound(in_thread, monkeypatch):
    def fails():
        raise FileNotFoundError("/proc/self/task")

    monkeypatch.setattr(cores_module, "_threads", fails)

    def work():
        with OwnCores(2):
            return os.sched_getaffinity(0)

    assert len(in_thread(work)) == 2


def test_where_there_is_a_gpu_nothing_is_bound(in_thread, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)

    def work():
        with OwnCores(2):
            return os.sched_getaffinity(0)

    assert len(in_thread(work)) == 2


def test_where_another_thread_starts_meanwhile_nothing_is_bound(in_thread, monkeypatch):
    counts = iter([{1}, {1, 2, 3}])
    monkeypatch.setattr(cores_module, "_threads", lambda: next(counts))

    def work():
        with OwnCores(2):
            return os.sched_getaffinity(0)

    assert len(in_thread(work)) == 2

"""The values that delta keeps on disk."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from wire.codecs.store import SampleStore
from wire.errors import StorageFailed

PLACE = 1 << 14


def values(size: int, seed: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).half()


def open_files() -> set[str]:
    return {
        os.readlink(entry) for entry in map(str, Path("/proc/self/fd").iterdir()) if os.path.islink(entry)
    }


def test_values_come_back_in_the_order_asked_for() -> None:
    store = SampleStore(1 << 20)
    for sample, size in ((3, 10), (2**62, 9000), (0, 1)):
        store.write(sample, values(size, sample % 7), "C")
    assert torch.equal(
        store.read([0, 3, 2**62]), torch.cat([values(1, 0), values(10, 3), values(9000, 2**62 % 7)])
    )
    assert len(store) == 3


@pytest.mark.parametrize(("numel", "order"), [(11, "C"), (10, "NHWC"), (0, "C")])
def test_values_of_another_kind_are_not_there(numel: int, order: str) -> None:
    store = SampleStore(1 << 20)
    store.write(1, values(10, 0), "C")
    assert store.holds(1, 10, "C")
    assert not store.holds(1, numel, order)
    assert not store.holds(2, 10, "C")


def test_samples_that_do_not_fit_are_left_out() -> None:
    store = SampleStore(3 * PLACE - 1)
    for sample in range(4):
        store.write(sample, values(10, sample), "C")
    assert [store.holds(sample, 10, "C") for sample in range(4)] == [True, True, False, False]


def test_sample_that_has_grown_beyond_the_limit_is_dropped() -> None:
    store = SampleStore(PLACE)
    store.write(1, values(10, 0), "C")
    store.commit()
    store.write(1, values(PLACE, 1), "C")
    assert not store.holds(1, PLACE, "C")
    assert not store.holds(1, 10, "C")
    store.rollback()
    assert torch.equal(store.read([1]), values(10, 0))


OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.integers(0, 5), st.sampled_from([0, 1, 900, PLACE // 2, PLACE]), st.integers(0, 99)),
        st.sampled_from(["commit", "rollback"]),
    ),
    max_size=30,
)


@settings(max_examples=60, deadline=None)
@given(OPERATIONS, st.integers(0, 8))
def test_rollback_goes_back_to_the_last_commit_and_both_ends_keep_the_same(
    operations: list[tuple[int, int, int] | str], places: int
) -> None:
    """Compared with copies of everything, and with a store at which every step undone was never begun."""
    store, clean = SampleStore(places * PLACE), SampleStore(places * PLACE)
    undone: list[tuple[int, int, int]] = []
    for operation in [*operations, "rollback"]:
        if not isinstance(operation, str):
            undone.append(operation)
            sample, size, seed = operation
            store.write(sample, values(size, seed), "C")
            continue
        if operation == "commit":
            for sample, size, seed in undone:
                clean.write(sample, values(size, seed), "C")
        undone.clear()
        (store.commit if operation == "commit" else store.rollback)()
        clean.commit()
        mine, other = store.state_dict(), clean.state_dict()
        assert mine["used"] == other["used"] <= places * PLACE
        assert dict(zip(mine["places"][:, 0].tolist(), mine["places"].tolist(), strict=True)) == dict(
            zip(other["places"][:, 0].tolist(), other["places"].tolist(), strict=True)
        )
        for sample in range(6):
            if clean.holds(sample, 1, "C"):
                assert torch.equal(store.read([sample]), clean.read([sample]))
        assert store.read(sorted(store._index)).equal(clean.read(sorted(clean._index)))


def test_copy_holds_the_same_and_later_writes_do_not_change_it() -> None:
    store = SampleStore(1 << 20)
    store.write(7, values(100, 1), "NHWC")
    store.write(8, values(50, 2), "C")
    state = store.state_dict()
    store.write(7, values(100, 3), "NHWC")
    other = SampleStore(1 << 20)
    other.load_state_dict(state)
    assert other.holds(7, 100, "NHWC")
    assert torch.equal(other.read([7, 8]), torch.cat([values(100, 1), values(50, 2)]))
    other.write(8, values(50, 9), "C")
    other.rollback()
    assert torch.equal(other.read([8]), values(50, 2))
    with pytest.raises(ValueError, match="does not fit its limit"):
        SampleStore(PLACE).load_state_dict(state)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    return tmp_path


def test_file_has_no_name_and_is_gone_with_the_store(folder: Path) -> None:
    before = open_files()
    store = SampleStore(1 << 20)
    assert open_files() == before
    store.write(1, values(100, 0), "C")
    (opened,) = open_files() - before
    assert opened.startswith(str(folder))
    assert list(folder.iterdir()) == []
    store.close()
    assert open_files() == before
    store = SampleStore(1 << 20)
    store.write(1, values(100, 0), "C")
    del store
    assert open_files() == before


def test_disk_is_taken_for_what_is_written_and_no_more(folder: Path) -> None:
    store = SampleStore(1 << 40)
    for sample in range(64):
        store.write(sample, values(PLACE, sample), "C")
    assert store._file is not None
    assert os.fstat(store._file.fileno()).st_size == 64 * PLACE * 2


def test_full_disk_is_one_line_that_says_what_to_do(folder: Path) -> None:
    store = SampleStore(1 << 30)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (PLACE, hard))  # beyond it a write fails as on a full disk
    try:
        store.write(1, values(PLACE // 4, 0), "C")
        with pytest.raises(StorageFailed) as error:
            store.write(2, values(PLACE // 2, 0), "C")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(folder) in str(error.value)
    assert "free some space there, set TMPDIR" in str(error.value)
    assert "\n" not in str(error.value)
    store.rollback()
    assert len(store) == 0


def test_folder_that_is_not_there_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", "/nowhere/at/all")
    with pytest.raises(StorageFailed, match="in /nowhere/at/all: no such file or directory"):
        SampleStore(1 << 20).write(1, values(10, 0), "C")

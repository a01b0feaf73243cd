"""Values of many samples on disk: what the next change of each is measured against.

The file has no name, so that nothing of it is left behind whatever happens. It is read and written, not
mapped: a write to a mapped page of a full disk kills the process, and pages count as the process's memory.
"""

from __future__ import annotations

import os
import tempfile
import weakref
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import torch

from wire.errors import StorageFailed

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

STORED = torch.float16

_LEAST_PLACE = 1 << 14
"""Bytes that a sample takes of the limit at least, so that the index of a full store stays small."""

_ON_DISK = "/var/tmp"
"""Where large files belong on Unix; elsewhere `tempfile` knows. Its own first choice, /tmp, is often memory."""


class _Record(NamedTuple):
    """Where a sample's values are; `numel` is 0 where there are none."""

    offset: int
    capacity: int
    numel: int
    order: str


class SampleStore:
    """Float16 values by sample. What does not fit is not kept; all calls alike, two stores keep the same.

    What changes between two commits can be undone: values that are overwritten are in memory until then, those
    of one step.

    Args:
        limit: the most bytes on disk.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._file: BinaryIO | None = None
        self._index: dict[int, _Record] = {}
        self._used = 0
        self._before: dict[int, tuple[_Record | None, bytes | bytearray]] = {}
        self._used_before = 0

    def __len__(self) -> int:
        return len(self._index)

    def holds(self, sample: int, numel: int, order: str) -> bool:
        """Whether there are so many values of a sample, in that memory order."""
        record = self._index.get(sample)
        return record is not None and 0 < numel == record.numel and record.order == order

    def read(self, samples: Sequence[int]) -> Tensor:
        """The values of samples that are there, one after the other, in host memory."""
        records = [self._index[sample] for sample in samples]
        values = torch.empty(sum(record.numel for record in records), dtype=STORED)
        for record, part in zip(records, values.split([record.numel for record in records]), strict=True):
            self._read(record.offset, _bytes_of(part))
        return values

    def write(self, sample: int, values: Tensor, order: str) -> None:
        """Keep a sample's values, in the place of what was there; or nothing of it, where they do not fit.

        Args:
            sample: its id.
            values: `STORED`, `[numel]`, contiguous, in host memory.
            order: the memory order in which they stand.

        Raises:
            StorageFailed: the disk is full.
        """
        before = self._index.get(sample)
        if sample not in self._before:
            self._before[sample] = before, b"" if before is None else self._bytes(before)
        size = values.numel() * STORED.itemsize
        if before is not None and size <= before.capacity:
            record = before._replace(numel=values.numel(), order=order)
        else:
            capacity = -(-max(size, _LEAST_PLACE) // 4096) * 4096
            if self._used + capacity > self._limit:
                if before is not None:
                    self._index[sample] = before._replace(numel=0)
                return
            record = _Record(self._used, capacity, values.numel(), order)
        self._used = max(self._used, record.offset + record.capacity)
        self._index[sample] = record
        self._write(record.offset, _bytes_of(values))

    def commit(self) -> None:
        """Make the present state the one that `rollback` goes back to."""
        self._before.clear()
        self._used_before = self._used

    def rollback(self) -> None:
        """Undo what was written since the last `commit`."""
        for sample, (record, overwritten) in self._before.items():
            if record is None:
                self._index.pop(sample, None)
            else:
                self._index[sample] = record
                self._write(record.offset, memoryview(overwritten))
        self._before.clear()
        self._used = self._used_before

    def close(self) -> None:
        """Give the disk space back."""
        if self._file is not None:
            self._file.close()
        self._index, self._file = {}, None

    def state_dict(self) -> dict[str, Any]:
        """A copy of everything, in memory."""
        places = [(sample, *record[:3], record.order == "NHWC") for sample, record in self._index.items()]
        return {
            "used": self._used,
            "places": torch.tensor(places, dtype=torch.int64).view(-1, 5),
            "values": self.read(list(self._index)),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take a copy over that `state_dict` returned, in the place of everything.

        Raises:
            ValueError: it is none, or does not fit the limit.
        """
        places, values, used = state["places"], state["values"], state["used"]
        if not 0 <= used <= self._limit or int(places[:, 3].sum()) != values.numel():
            raise ValueError("what a store held does not fit its limit, or is not what it says")
        self._index, self._used, at = {}, used, 0
        for sample, offset, capacity, numel, channels_last in places.tolist():
            self._index[sample] = _Record(offset, capacity, numel, "NHWC" if channels_last else "C")
            self._write(offset, _bytes_of(values[at : at + numel]))
            at += numel
        self.commit()

    def _bytes(self, record: _Record) -> bytearray:
        data = bytearray(record.numel * STORED.itemsize)
        self._read(record.offset, memoryview(data))
        return data

    def _read(self, offset: int, view: memoryview) -> None:
        if not view.nbytes:
            return
        assert self._file is not None
        self._file.seek(offset)
        if self._file.readinto(view) != view.nbytes:  # type: ignore[attr-defined]
            raise StorageFailed(self._folder(), "what was written is not there any more")

    def _write(self, offset: int, view: memoryview) -> None:
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile(dir=self._folder(), buffering=0)  # noqa: SIM115 (kept open)
                weakref.finalize(self, self._file.close)
            self._file.seek(offset)
            while view:
                view = view[self._file.write(view) :]
        except OSError as error:
            raise StorageFailed(self._folder(), (error.strerror or str(error)).lower()) from error

    @staticmethod
    def _folder() -> str:
        is_there = os.path.isdir(_ON_DISK)
        return os.environ.get("TMPDIR") or (_ON_DISK if is_there else tempfile.gettempdir())


def _bytes_of(values: Tensor) -> memoryview:
    return values.view(torch.uint8).numpy().data

"""Tensors kept on disk, for what memory cannot hold: 2048 maps of a large cut are gigabytes."""

import tempfile
from types import TracebackType
from typing import Self

import numpy as np
import torch
from torch import Tensor

from common.errors import UserError

_ALIGNMENT = 64  # of the largest element, many times over


class Recording:
    """A temporary file without a name; it is gone with the process, however that ends."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115  (closed by __exit__)
        self._size = 0

    def keep(self, tensor: Tensor) -> Tensor:
        """Write a tensor down; returns it as it lies in the file, read when it is used.

        Raises:
            UserError: the disk is full.
        """
        data = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
        if not data.size:
            return tensor
        try:
            self._file.write(data.data)
            self._file.write(bytes(-data.size % _ALIGNMENT))
            self._file.flush()
        except OSError as error:
            raise UserError(
                f"what crosses the cuts does not fit into {tempfile.gettempdir()} ({error.strerror}): use fewer "
                "--samples, or name a larger place in TMPDIR"
            ) from error
        # Private: torch wants memory that could be written to.
        mapped = np.memmap(self._file, np.uint8, "c", self._size, (data.size,))
        self._size += data.size + -data.size % _ALIGNMENT
        return torch.from_numpy(mapped).view(tensor.dtype).view(tensor.shape)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

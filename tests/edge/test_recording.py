"""Tensors on disk come back as they were, and a full disk is said in a line."""

import errno

import pytest
import torch

from common.errors import UserError
from edge.recording import Recording


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.uint8])
@pytest.mark.parametrize("shape", [(3, 5, 7), (1,), (), (0, 4)])
def test_what_was_kept_is_what_comes_back(dtype, shape):
    tensors = [(torch.rand(shape) * 9 * index).to(dtype) for index in range(4)]
    with Recording() as recording:
        kept = [recording.keep(tensor) for tensor in tensors]
        for tensor, back in zip(tensors, kept, strict=True):
            assert back.dtype == dtype
            assert torch.equal(back, tensor)


def test_order_in_memory_does_not_matter():
    tensor = torch.arange(24.0).reshape(1, 2, 3, 4).to(memory_format=torch.channels_last)
    with Recording() as recording:
        assert torch.equal(recording.keep(tensor), tensor)


def test_changing_what_came_back_changes_nothing_of_the_record():
    with Recording() as recording:
        first = recording.keep(torch.ones(5000))
        second = recording.keep(torch.ones(5000))
        first.zero_()
        assert second.sum() == 5000


def test_a_full_disk_says_what_to_do(monkeypatch):
    with Recording() as recording:

        class Full:
            def write(self, data):
                raise OSError(errno.ENOSPC, "No space left on device")

        file, recording._file = recording._file, Full()
        with pytest.raises(UserError, match=r"No space left on device.*use fewer --samples, or .*TMPDIR"):
            recording.keep(torch.ones(3))
        recording._file = file

"""The transposed convolution of blocks is torch's, in another order of the same sums."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from common.block_transpose import BlockTranspose2d

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = st.integers(1, 4)


@settings(deadline=None)
@given(
    count=SMALL,
    channels=st.tuples(SMALL, SMALL),
    sides=st.tuples(SMALL, SMALL),
    size=SMALL,
    data=st.data(),
    last=st.booleans(),
)
def test_it_equals_torch_s_own(count, channels, sides, size, data, last) -> None:
    beyond = (data.draw(st.integers(0, size - 1)), data.draw(st.integers(0, size - 1)))
    ours = BlockTranspose2d(*channels, size, beyond).double()
    theirs = nn.ConvTranspose2d(*channels, size, size, output_padding=beyond).double()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    memory_format = torch.channels_last if last else torch.contiguous_format
    leaf = torch.randn(count, channels[0], *sides, dtype=torch.double).to(memory_format=memory_format)
    results = []
    for layer in (ours, theirs):
        source = leaf.clone().requires_grad_()
        result = layer(source)
        weights = torch.arange(result.numel(), dtype=torch.double).view(result.shape)
        (result * weights).sum().backward()
        results.append([result.detach(), source.grad, layer.weight.grad, layer.bias.grad])
    for mine, its in zip(*results, strict=True):
        torch.testing.assert_close(mine, its)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_the_layout_stays(memory_format) -> None:
    source = torch.randn(2, 3, 5, 4).to(memory_format=memory_format).requires_grad_()
    result = BlockTranspose2d(3, 6, 2, (1, 0))(source)
    assert result.shape == (2, 6, 11, 8)
    assert result.is_contiguous(memory_format=memory_format)
    result.sum().backward()
    assert source.grad.is_contiguous(memory_format=memory_format)


def test_it_runs_without_data() -> None:
    """`common.flops` runs models without data."""
    with torch.device("meta"):
        assert BlockTranspose2d(3, 6, 2, (1, 0))(torch.empty(2, 3, 5, 4)).shape == (2, 6, 11, 8)


def test_it_can_be_copied_and_evaluates_as_it_trains() -> None:
    layer = BlockTranspose2d(3, 6, 2, (1, 1))
    source = torch.randn(2, 3, 5, 4)
    with torch.inference_mode():
        evaluated = copy.deepcopy(layer).eval()(source)
    assert torch.equal(layer(source).detach(), evaluated)

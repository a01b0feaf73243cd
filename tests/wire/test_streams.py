"""Named tensors to messages and back."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.wire.pair import ROOMY, joined, read_frames, to_bytes
from wire.errors import CorruptPayload, SpecError
from wire.frames import FrameReader
from wire.messages import Backward, Forward
from wire.serialize import decode
from wire.streams import StreamDecoder, StreamEncoder, chunk_message

CHAINS = ["none", "fp16", "bf16", "int8", "lz4", "int8+lz4", "fp16+lz4"]
LARGE = 1 << 30


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def crossed(message: Any) -> Any:
    """A message after its way over the wire."""
    (frame,) = read_frames(FrameReader(ROOMY), to_bytes(message))
    return decode(frame)


def sent(
    tensors: dict[str, Tensor], chain: str = "none", *, gradient: bool = False, seed: int = 0
) -> Forward | Backward:
    encodings = StreamEncoder(chain, gradient=gradient).encode(tensors, seed=seed)
    message: Forward | Backward = crossed(chunk_message(encodings, list(tensors), 3, 1, backward=gradient))
    return message


def read(
    message: Forward | Backward, names: list[str], chain: str = "none", *, gradient: bool = False
) -> Any:
    return StreamDecoder(chain, gradient=gradient, max_bytes=LARGE).decode(message, names)


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("chain", CHAINS)
def test_tensors_cross_within_their_codecs_bounds(chain: str, gradient: bool) -> None:
    tensors = {"a": random(4, 8, 16, 16), "b": random(4, 200), "c": torch.arange(7)}
    back = read(sent(tensors, chain, gradient=gradient), list(tensors), chain, gradient=gradient)
    assert list(back) == list(tensors)
    for name, tensor in tensors.items():
        assert back[name].dtype == tensor.dtype
        assert back[name].shape == tensor.shape
        torch.testing.assert_close(back[name], tensor, atol=0.05, rtol=0.01)
    assert torch.equal(back["c"], tensors["c"])
    if chain in ("none", "lz4"):
        assert all(torch.equal(back[name], tensors[name]) for name in tensors)


def test_activations_go_in_forward_and_gradients_in_backward_messages() -> None:
    forward = sent({"a": random(2, 3)})
    backward = sent({"a": random(2, 3)}, gradient=True)
    assert isinstance(forward, Forward)
    assert (forward.step, forward.chunk, forward.evaluate, list(forward.names)) == (3, 1, False, ["a"])
    assert isinstance(backward, Backward)
    assert backward.norm_sq is None


def test_evaluation_and_norm_are_carried_along() -> None:
    encodings = StreamEncoder("none", gradient=False).encode({}, seed=0)
    evaluated = chunk_message(encodings, [], 1, 2, backward=False, evaluate=True)
    assert isinstance(evaluated, Forward)
    assert evaluated.evaluate
    last = chunk_message(encodings, [], 1, 2, backward=True, norm_sq=0.5)
    assert isinstance(last, Backward)
    assert last.norm_sq == 0.5


def test_raw_tensors_cross_without_a_copy() -> None:
    tensor = random(1000)
    _, buffers = StreamEncoder("none", gradient=False).encode({"a": tensor}, seed=0)
    tensor.zero_()
    assert joined(buffers)[:4000] == bytes(4000)
    message = sent({"a": random(1000)})
    arrived = read(message, ["a"])["a"]
    message.payload[:4] = bytes(4)
    assert arrived[0] == 0


def test_tensors_begin_at_multiples_of_64() -> None:
    message = sent({"a": torch.zeros(1, dtype=torch.uint8), "b": torch.ones(1, dtype=torch.uint8)})
    assert message.payload.nbytes == 128
    assert message.payload[64] == 1
    assert sum(message.payload) == 1


def test_no_tensor_at_all_crosses() -> None:
    assert read(sent({}), []) == {}


def test_channels_last_tensor_keeps_its_memory_order() -> None:
    tensor = random(2, 8, 4, 4).contiguous(memory_format=torch.channels_last)
    for chain in CHAINS:
        assert read(sent({"a": tensor}, chain), ["a"], chain)["a"].stride() == tensor.stride()


@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_tensor_that_is_not_finite_arrives_as_it_is(chain: str, value: float) -> None:
    tensor = random(4, 64)
    tensor[1, 2] = value
    arrived = read(sent({"a": tensor}, chain), ["a"], chain)["a"]
    assert not torch.isfinite(arrived[1, 2])
    assert torch.isfinite(arrived).sum() == arrived.numel() - 1


@pytest.mark.parametrize("chain", CHAINS)
def test_same_seed_gives_the_same_bytes(chain: str) -> None:
    tensors = {"a": random(4, 100), "b": random(4, 100)}
    one, other = (sent(tensors, chain, gradient=True, seed=5) for _ in range(2))
    assert bytes(one.payload) == bytes(other.payload)


def test_gradients_are_rounded_by_the_seed_and_each_tensor_in_its_own_way() -> None:
    tensors = {"a": random(4, 100), "b": random(4, 100)}
    payload = bytes(sent(tensors, "int8", gradient=True, seed=5).payload)
    assert payload != bytes(sent(tensors, "int8", gradient=True, seed=6).payload)
    assert payload[: len(payload) // 2] != payload[len(payload) // 2 :]


def test_activations_are_rounded_alike_whatever_the_seed() -> None:
    tensors = {"a": random(4, 100)}
    assert bytes(sent(tensors, "int8", seed=5).payload) == bytes(sent(tensors, "int8", seed=6).payload)


@pytest.mark.parametrize("names", [[], ["b"], ["b", "a"], ["a", "b", "c"], ["a", "x"]])
def test_other_names_than_those_due_are_refused(names: list[str]) -> None:
    message = sent({"a": random(3), "b": random(3)})
    with pytest.raises(CorruptPayload, match=r"a forward message carries \['a', 'b'\]"):
        read(message, names)


def test_tensor_larger_than_expected_is_refused() -> None:
    message = sent({"a": random(100)})
    decoder = StreamDecoder("none", gradient=False, max_bytes=399)
    with pytest.raises(CorruptPayload, match="limit, 399 bytes"):
        decoder.decode(message, ["a"])


def test_codec_that_was_not_agreed_on_is_refused() -> None:
    with pytest.raises(CorruptPayload, match="not agreed on"):
        read(sent({"a": random(4, 100)}, "int8"), ["a"], "fp16")


def test_chain_that_does_not_parse_is_refused_by_both_ends() -> None:
    with pytest.raises(SpecError, match="zip"):
        StreamEncoder("zip", gradient=False)
    with pytest.raises(SpecError, match="zip"):
        StreamDecoder("int8+zip", gradient=True, max_bytes=1)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(CHAINS),
    st.booleans(),
    st.lists(st.lists(st.integers(0, 9), max_size=5), max_size=3),
    st.integers(0, 2**63 - 1),
)
def test_tensors_of_any_shape_cross(chain: str, gradient: bool, shapes: list[list[int]], seed: int) -> None:
    tensors = {str(number): random(*shape, seed=number) for number, shape in enumerate(shapes)}
    back = read(sent(tensors, chain, gradient=gradient, seed=seed), list(tensors), chain, gradient=gradient)
    for name, tensor in tensors.items():
        assert back[name].shape == tensor.shape
        torch.testing.assert_close(back[name], tensor, atol=0.05, rtol=0.01)


WILD = st.recursive(
    st.none() | st.integers(-9, 2**64) | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["codec", "meta", "dtype", "shape", "order", "parts", "size"]), inner, max_size=7
        )
    ),
    max_leaves=8,
)


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(CHAINS), WILD, st.integers(0, 4))
def test_arbitrary_description_is_corrupt_or_decodes_to_little(chain: str, desc: Any, leaves: int) -> None:
    message = Forward(1, 0, False, ["a"], [desc], bytearray(64 * leaves))
    try:
        tensor = read(message, ["a"], chain)["a"]
    except CorruptPayload:
        return
    assert tensor.nbytes <= 255 * 64 * leaves

"""A partition's weights cross whole, in messages of a few megabytes, or are refused."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.wire.test_streams import crossed, random
from wire.errors import CorruptPayload
from wire.messages import Weights
from wire.streams import StreamEncoder
from wire.weights import WeightsReceiver, weights_messages


def state() -> dict[str, Tensor]:
    return {
        "conv.weight": random(8, 3, 3, 3).contiguous(memory_format=torch.channels_last),
        "bn.num_batches_tracked": torch.tensor(7),
        "large": random(1_500_000),
        "empty": torch.empty(0, 4),
        "half": random(10).half(),
        "large too": random(900_000),
        "mask": torch.tensor([True, False]),
    }


def test_state_crosses_in_messages_of_a_few_megabytes() -> None:
    weights = state()
    messages = [crossed(message) for message in weights_messages(weights)]
    assert [message.seq for message in messages] == list(range(len(messages)))
    assert [message.last for message in messages] == [False] * (len(messages) - 1) + [True]
    assert len(messages) == 2
    receiver = WeightsReceiver(weights)
    results = [receiver.take(message) for message in messages]
    assert results[:-1] == [None] * (len(messages) - 1)
    arrived = results[-1]
    assert arrived is not None
    assert arrived.keys() == weights.keys()
    for name, tensor in weights.items():
        assert torch.equal(arrived[name], tensor)
        assert arrived[name].dtype == tensor.dtype


def test_state_of_nothing_is_one_message() -> None:
    (message,) = weights_messages({})
    assert (message.seq, message.last, list(message.names)) == (0, True, [])
    assert WeightsReceiver({}).take(crossed(message)) == {}


def test_weights_may_be_cut_into_messages_in_any_way() -> None:
    weights = {"a": random(3), "b": random(4), "c": random(5)}
    receiver = WeightsReceiver(weights)
    pieces = [next(weights_messages({name: weights[name]})) for name in ("c", "a", "b")]
    pieces = [replace(piece, seq=number, last=number == 2) for number, piece in enumerate(pieces)]
    arrived = [receiver.take(crossed(piece)) for piece in pieces][-1]
    assert arrived is not None
    assert all(torch.equal(arrived[name], weights[name]) for name in weights)


def message_of(tensors: dict[str, Tensor], **changes: Any) -> Weights:
    (message,) = weights_messages(tensors)
    changed: Weights = crossed(replace(message, **changes))
    return changed


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({"a": torch.zeros(3)}, "the weights lack b"),
        ({"a": torch.zeros(3), "b": torch.zeros(4), "c": torch.zeros(1)}, "'c' .* does not fit"),
        ({"a": torch.zeros(3), "b": torch.zeros(2, 2)}, "'b' .* does not fit"),
        ({"a": torch.zeros(3), "b": torch.zeros(4).int()}, "'b' as torch.int32 .* does not fit"),
        ({"a": torch.zeros(3), "b": torch.zeros(400)}, "sizes up to 16"),
    ],
)
def test_weights_other_than_the_expected_are_refused(tensors: dict[str, Tensor], says: str) -> None:
    receiver = WeightsReceiver({"a": torch.zeros(3), "b": torch.zeros(4)})
    with pytest.raises(CorruptPayload, match=says):
        receiver.take(message_of(tensors))


def test_weights_that_come_twice_are_refused() -> None:
    receiver = WeightsReceiver({"a": torch.zeros(3), "b": torch.zeros(4)})
    receiver.take(message_of({"a": torch.zeros(3)}, last=False))
    with pytest.raises(CorruptPayload, match="'a'"):
        receiver.take(message_of({"a": torch.zeros(3)}, seq=1))


@pytest.mark.parametrize("seq", [1, 5])
def test_weights_out_of_order_are_refused(seq: int) -> None:
    receiver = WeightsReceiver({"a": torch.zeros(3)})
    with pytest.raises(CorruptPayload, match=f"message {seq} came where 0 was due"):
        receiver.take(message_of({"a": torch.zeros(3)}, seq=seq))


def test_weights_must_come_raw() -> None:
    encodings = StreamEncoder("fp16", gradient=False).encode({"a": torch.zeros(300)}, seed=0)
    message = crossed(Weights(0, True, ["a"], *encodings))
    with pytest.raises(CorruptPayload, match="not agreed on"):
        WeightsReceiver({"a": torch.zeros(300)}).take(message)

"""What both ends of a stream know of a chunk: its mask and its samples' ids."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.wire.codecs.chunks import hidden, mask, only
from tests.wire.test_streams import crossed
from wire.codecs.base import NOTHING_KNOWN, Facts
from wire.errors import CorruptPayload
from wire.streams import IDS, StreamDecoder, StreamEncoder, chunk_message, facts_of, uses_ids

KEPT = mask((40, 3, 9), 64)
HIDDEN = hidden(KEPT, 16)


def sent(tensors: dict[str, Tensor], chain: str, *, gradient: bool = False, facts: Facts) -> Any:
    encodings = StreamEncoder(chain, gradient=gradient).encode(tensors, seed=0, facts=facts)
    return crossed(chunk_message(encodings, list(tensors), 1, 0, backward=gradient))


def read(message: Any, chain: str, facts: Facts | None = None) -> dict[str, Tensor]:
    decoder = StreamDecoder(chain, gradient=message.kind == "backward", max_bytes=1 << 20)
    return decoder.decode(message, message.names, facts=facts)


@pytest.mark.parametrize(
    "names", [("hidden", "mask", "more"), ("mask", "hidden", "more"), ("more", "hidden", "mask")]
)
def test_mask_is_read_before_the_tensors_that_it_says_how_to_read(names: tuple[str, ...]) -> None:
    tensors = {"hidden": HIDDEN, "mask": KEPT, "more": hidden(KEPT, 4, seed=1)}
    tensors = {name: tensors[name] for name in names}
    back = read(sent(tensors, "ragged", facts=facts_of(tensors)), "ragged")
    assert list(back) == list(names)
    for name, tensor in tensors.items():
        assert torch.equal(back[name], tensor if name == "mask" else only(KEPT, tensor))


def test_mask_crosses_once_and_serves_the_other_three_streams() -> None:
    tensors = {"hidden": HIDDEN, "mask": KEPT}
    up = sent(tensors, "ragged", facts=facts_of(tensors))
    known = facts_of(read(up, "ragged"))
    assert len(up.payload) == 52 * 16 * 4 + 64
    for gradient in (False, True):
        message = sent({"hidden": HIDDEN}, "ragged+int8", gradient=gradient, facts=known)
        assert len(message.payload) == 52 * 16 + 52 * 8 + 32
        back = read(message, "ragged+int8", facts_of(tensors))["hidden"]
        torch.testing.assert_close(back, only(KEPT, HIDDEN), atol=0.05, rtol=0)


@pytest.mark.parametrize("chain", ["ragged", "ragged+delta:first=full"])
def test_a_tensor_that_the_mask_tells_nothing_of_crosses_whole_whatever_its_shape(chain: str) -> None:
    tensors = {IDS: torch.arange(3), "mask": KEPT, "bias": torch.ones(3, 64, 64)}
    encoder = StreamEncoder(chain, gradient=False)
    encodings = encoder.encode(tensors, seed=0, facts=facts_of(tensors), unmasked={"bias"})
    message = crossed(chunk_message(encodings, list(tensors), 1, 0, backward=False))
    decoder = StreamDecoder(chain, gradient=False, max_bytes=1 << 20)
    assert torch.equal(decoder.decode(message, message.names, unmasked={"bias"})["bias"], tensors["bias"])


def test_first_of_several_masks_is_the_chunks() -> None:
    other = mask((1, 1, 1), 64)
    tensors = {"one": KEPT, "hidden": HIDDEN, "other": other}
    known = facts_of(tensors)
    assert known.kept is not None
    assert torch.equal(known.kept, KEPT)
    back = read(sent(tensors, "ragged", facts=known), "ragged")
    assert torch.equal(back["hidden"], only(KEPT, HIDDEN))
    assert torch.equal(back["other"], other)


def test_tensors_of_other_dimensions_are_no_mask() -> None:
    flags = torch.ones(3, dtype=torch.bool)
    pairs = torch.ones(3, 64, 64, dtype=torch.bool)
    assert facts_of({"flags": flags, "pairs": pairs, "numbers": KEPT.int()}).kept is None


@pytest.mark.parametrize("facts", [NOTHING_KNOWN, Facts(kept=mask((40, 3, 8), 64)), Facts(kept=KEPT[:2])])
def test_tensors_of_a_chunk_with_another_mask_are_corrupt(facts: Facts) -> None:
    message = sent({"hidden": HIDDEN}, "ragged", gradient=True, facts=Facts(kept=KEPT))
    with pytest.raises(CorruptPayload):
        read(message, "ragged", facts)


def test_message_cannot_bring_a_mask_where_one_is_known_already() -> None:
    message = sent({"hidden": HIDDEN, "mask": KEPT}, "ragged", facts=Facts(kept=KEPT))
    with pytest.raises(CorruptPayload, match="its mask is not known"):
        read(message, "ragged", NOTHING_KNOWN)


def test_tensor_that_is_not_finite_crosses_whole_beside_its_mask() -> None:
    broken = HIDDEN.clone()
    broken[0, 0, 0] = torch.nan
    tensors = {"hidden": broken, "mask": KEPT}
    back = read(sent(tensors, "ragged+int8", facts=facts_of(tensors)), "ragged+int8")
    torch.testing.assert_close(back["hidden"], broken, equal_nan=True, rtol=0, atol=0)


def test_ids_are_told_from_the_models_own_tensors() -> None:
    ids = torch.tensor([7, 0, 2**62])
    tensors = {IDS: ids, "hidden": HIDDEN, "mask": KEPT}
    message = sent(tensors, "ragged+int8", facts=facts_of(tensors))
    back = read(message, "ragged+int8")
    assert facts_of(back).ids == (7, 0, 2**62)
    assert torch.equal(back[IDS], ids)
    assert facts_of({"hidden": HIDDEN}).ids is None


@pytest.mark.parametrize(
    "ids", [torch.tensor([0, -1]), torch.tensor([[0, 1]]), torch.tensor([0.0, 1.0]), torch.tensor(3)]
)
def test_ids_that_are_none_are_corrupt(ids: Tensor) -> None:
    message = sent({IDS: ids, "x": torch.zeros(2, 3)}, "none", facts=NOTHING_KNOWN)
    with pytest.raises(CorruptPayload, match="sample ids"):
        read(message, "none")


def test_ids_are_wanted_where_an_activation_is_sent_as_a_change() -> None:
    assert uses_ids({"cut1.act": "delta+int4", "cut1.grad": "int8"})
    assert not uses_ids({"cut1.act": "ragged+int8", "cut1.grad": "delta+int4"})


def test_description_cut_short_is_corrupt() -> None:
    message = sent({"hidden": HIDDEN, "mask": KEPT}, "ragged", facts=Facts(kept=KEPT))
    object.__setattr__(message, "tensors", [{"parts": [{"parts": [7]}]}, *message.tensors[1:]])
    with pytest.raises(CorruptPayload, match="malformed"):
        read(message, "ragged")

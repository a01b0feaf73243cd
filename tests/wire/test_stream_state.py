"""Both ends of a stream, brought back from a file, go on byte for byte as if nothing had been."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from common.checkpoints import CheckpointFolder
from tests.wire.codecs.chunks import hidden, mask
from wire.codecs.base import NOTHING_KNOWN
from wire.codecs.registry import codec_class, codec_names
from wire.codecs.spec import parse_chain
from wire.errors import SpecError
from wire.messages import Forward
from wire.streams import IDS, StreamDecoder, StreamEncoder, facts_of

pytestmark = pytest.mark.usefixtures("one_thread")

SAMPLES = 4
CHUNKS = 3


def alone() -> list[str]:
    """Every codec with each of its examples, as chains."""
    chains = []
    for name in codec_names():
        for example in codec_class(name).examples:
            chain = f"{name}:{example}" if example else name
            try:
                parse_chain(chain)
            except SpecError:
                continue
            chains.append(chain)
    return chains


MIXED = ["lowrank:4+int8", "topk:0.1,feedback+int4+lz4", "delta+int4", "ragged+delta:first=rest+int6+zstd"]
KEEP_STATE = {"lowrank", "topk", "delta"}
LEARNING = ["int8", *MIXED, *(chain for chain in alone() if chain.partition(":")[0] in KEEP_STATE)]


def chunk(step: int, number: int) -> dict[str, Tensor]:
    """Tensors of one chunk; the samples of every other step are the same, with other values."""
    first = (step % 2 * CHUNKS + number) * SAMPLES
    kept = mask((5, 16, 9, 12), 16)
    return {
        IDS: torch.arange(first, first + SAMPLES),
        "mask": kept,
        "hidden": hidden(kept, 24, seed=step * CHUNKS + number),
        "map": torch.randn(
            SAMPLES, 8, 6, 6, generator=torch.Generator().manual_seed(100 + step * CHUNKS + number)
        ).contiguous(memory_format=torch.channels_last),
    }


class Ends:
    """The two ends of one stream."""

    def __init__(self, chain: str, *, gradient: bool = False) -> None:
        self.encoder = StreamEncoder(chain, gradient=gradient)
        self.decoder = StreamDecoder(chain, gradient=gradient, max_bytes=1 << 20)
        self._gradient = gradient

    def send(self, step: int, number: int) -> tuple[bytes, dict[str, Tensor]]:
        """Send a chunk; returns its bytes and what arrives."""
        tensors = chunk(step, number)
        facts = facts_of(tensors)
        if self._gradient:
            tensors, facts = {name: tensors[name] for name in ("hidden", "map")}, NOTHING_KNOWN
        descs, buffers = self.encoder.encode(tensors, seed=step * CHUNKS + number, facts=facts)
        payload = bytearray(b"".join(buffers))
        message = Forward(step, number, False, list(tensors), descs, payload)
        arrived = self.decoder.decode(message, list(tensors), facts=facts if self._gradient else None)
        # Copied, for what is sent raw arrives as a view of the payload.
        return bytes(payload), {name: tensor.clone() for name, tensor in arrived.items()}

    def step(self, step: int) -> list[tuple[bytes, dict[str, Tensor]]]:
        """Send a step's chunks and commit it."""
        sent = [self.send(step, number) for number in range(CHUNKS)]
        for end in (self.encoder, self.decoder):
            end.commit()
        return sent

    def rollback(self) -> None:
        for end in (self.encoder, self.decoder):
            end.rollback()

    def close(self) -> None:
        for end in (self.encoder, self.decoder):
            end.close()

    def through_file(self, folder: Path) -> list[Any]:
        """What both ends know, after its way through a file."""
        state = [self.encoder.state_dict(), self.decoder.state_dict()]
        CheckpointFolder(folder).write(1, state, {})
        back: list[Any] = CheckpointFolder(folder).read(1)[0]
        return back

    def load(self, states: list[Any]) -> None:
        for end, state in zip((self.encoder, self.decoder), states, strict=True):
            end.load_state_dict(state)


def assert_same_sent(ours: list[Any], theirs: list[Any]) -> None:
    for (payload, arrived), (other_payload, other_arrived) in zip(ours, theirs, strict=True):
        assert payload == other_payload
        for name, tensor in arrived.items():
            assert torch.equal(tensor, other_arrived[name])
            assert tensor.stride() == other_arrived[name].stride()


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("chain", [*alone(), *MIXED])
def test_both_ends_go_on_from_a_checkpoint_byte_for_byte(tmp_path: Path, chain: str, gradient: bool) -> None:
    straight, back = Ends(chain, gradient=gradient), Ends(chain, gradient=gradient)
    for step in range(3):
        straight.step(step)
    back.load(straight.through_file(tmp_path))
    for step in (3, 4, 5):
        assert_same_sent(back.step(step), straight.step(step))
    straight.close()
    back.close()


@pytest.mark.parametrize("chain", LEARNING)
def test_a_rollback_after_a_restore_goes_back_to_what_was_restored(tmp_path: Path, chain: str) -> None:
    straight, back = Ends(chain), Ends(chain)
    for step in range(2):
        straight.step(step)
    back.step(9)  # what it knew is forgotten
    back.send(10, 0)
    back.load(straight.through_file(tmp_path))
    back.rollback()
    back.send(2, 0)
    back.send(2, 1)
    back.rollback()
    for step in (2, 3):
        assert_same_sent(back.step(step), straight.step(step))
    straight.close()
    back.close()


@pytest.mark.parametrize("chain", LEARNING)
def test_an_empty_state_is_that_of_a_new_stream(chain: str) -> None:
    used, new = Ends(chain), Ends(chain)
    used.step(0)
    used.step(2)
    used.load([{}, {}])
    assert used.encoder.state_dict() == {}
    assert_same_sent(used.step(0), new.step(0))
    used.close()
    new.close()


def test_the_codecs_that_are_known_to_learn_have_something_to_keep() -> None:
    learnt = set()
    for chain in alone():
        for gradient in (False, True):
            ends = Ends(chain, gradient=gradient)
            ends.step(0)
            if ends.encoder.state_dict() or ends.decoder.state_dict():
                learnt.add(chain.partition(":")[0])
            ends.close()
    assert learnt == KEEP_STATE


def test_the_state_is_by_tensor_and_what_is_learnt_later_does_not_change_it() -> None:
    ends = Ends("lowrank:4")
    ends.step(0)
    state = ends.encoder.state_dict()
    assert state.keys() == {"hidden", "map"}
    (starts,) = (value["starts"] for value in state["hidden"].values())
    before = [start.clone() for start in starts]
    ends.step(1)
    assert all(torch.equal(start, kept) for start, kept in zip(starts, before, strict=True))


def test_the_state_of_another_chain_is_refused() -> None:
    ends = Ends("lowrank:4")
    ends.step(0)
    with pytest.raises(ValueError, match="does not belong to int8"):
        StreamEncoder("int8", gradient=False).load_state_dict(ends.encoder.state_dict())
